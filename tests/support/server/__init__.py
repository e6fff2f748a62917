"""Fakes for the tests of the server."""
