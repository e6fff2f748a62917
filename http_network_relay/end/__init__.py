"""One end of a tunnel: the same code in the client and in the proxy command."""
