"""Fakes for the tests of the client and of the proxy command."""
