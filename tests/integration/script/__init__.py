"""The proxy command over real sockets."""
