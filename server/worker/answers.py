"""Answers and closes a connection that no thread serves. Nothing here waits."""

from __future__ import annotations

import contextlib
import socket

from http_network_relay.wire.constants import RELAY_HEADER, RELAY_HEADER_VALUE

# Bytes that are read and dropped before a close: unread bytes would make the close a reset.
_MAX_DROPPED_BYTES = 64 * 1024


def send_answer(sock: socket.socket, status: str, code: str, message: str) -> None:
    """Send as much of an answer as the socket takes at once."""
    body = f'{{"code":"{code}","message":"{message}"}}\n'
    head = (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"{RELAY_HEADER}: {RELAY_HEADER_VALUE}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        sock.settimeout(0)
        sock.send((head + body).encode("ascii"))
    except (OSError, ValueError):
        pass  # The peer has gone, or its TLS handshake has not ended.


def close_now(sock: socket.socket) -> None:
    """End our direction, drop the bytes that have come, and close."""
    try:
        sock.setblocking(False)
        # The plain socket's methods, also for TLS: SSLSocket.shutdown() would not send more.
        socket.socket.shutdown(sock, socket.SHUT_WR)
        dropped = 0
        while dropped < _MAX_DROPPED_BYTES and (data := socket.socket.recv(sock, 16 * 1024)):
            dropped += len(data)
    except (OSError, ValueError):
        pass  # The call would wait, or the peer has gone.
    finally:
        with contextlib.suppress(OSError):
            sock.close()
