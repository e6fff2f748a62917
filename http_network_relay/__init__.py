"""The code that server, client and proxy command share. Imports neither server nor client."""

__version__ = "0.1.0"
