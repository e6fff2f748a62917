"""Free TCP ports on loopback."""

import socket


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens now.

    Another process may take it before the caller does; the kernel hands out ephemeral
    ports in random order, so on one machine that is rare.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
