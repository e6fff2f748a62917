"""The shared package over real sockets."""
