"""Unit tests of the server: no network, no process."""
