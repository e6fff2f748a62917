"""Free TCP ports on loopback."""

from __future__ import annotations

import random
import socket

# Below those that a kernel hands out by itself, so that no connection and no listener of another
# test takes one before the caller does.
_PORTS = range(10_000, 32_000)
# Not the module's own generator, which a test may have seeded.
_random = random.SystemRandom()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens now."""
    for port in _random.sample(_PORTS, 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("a hundred ports in a row are taken")
