"""The client's code over real sockets."""
