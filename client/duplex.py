"""One socket, TLS or plain, for one reading and one writing thread at once.

Two locks, taken in this order (rule 4 of the design):

- `_send_lock` from a frame's first byte to its last, waits included: whole frames;
- `_tls_lock`, TLS only, for one non-blocking read or write and never across a wait:
  OpenSSL's connection object must not be entered by two threads (CPython does not
  guard it), and nothing seen from outside tells when it was.

The reader never takes `_send_lock`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from typing import Any

# The largest TLS record: a longer write would hold `_tls_lock` for several of them.
_TLS_WRITE_BYTES = 16 * 1024
# OpenSSL may want the other direction's event (a key update). The other thread may
# take that event away, so such a wait is short and then tries again.
_CROSS_WAIT_S = 0.05


def wait_ready(sock: socket.socket, *, write: bool, timeout_s: float | None) -> bool:
    """Wait until the socket can be read or written, or has failed; False: timed out."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if write else select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
    both = ([], [sock], [sock]) if write else ([sock], [], [sock])
    return any(select.select(*both, timeout_s))


class Duplex:
    """Owns `sock` (connected, TLS handshake done) until close()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        # Plain sockets block in the kernel, where two threads are safe.
        sock.settimeout(0.0 if self._is_tls else None)
        self._send_lock = threading.Lock()  # Makes frames whole.
        self._tls_lock = threading.Lock()  # Guards the OpenSSL object.
        # When any byte last came, monotonic. Written by the reader, read by the timer.
        self.heard_at = time.monotonic()

    def recv(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end of the stream. Raises OSError."""
        data = self._recv_tls(size) if self._is_tls else self._sock.recv(size)
        self.heard_at = time.monotonic()
        return data

    def _recv_tls(self, size: int) -> bytes:
        while True:
            # Try first: bytes that OpenSSL has decrypted already are invisible to poll.
            try:
                with self._tls_lock:
                    return self._sock.recv(size)
            except ssl.SSLWantReadError:
                wait_ready(self._sock, write=False, timeout_s=None)
            except ssl.SSLWantWriteError:
                wait_ready(self._sock, write=True, timeout_s=_CROSS_WAIT_S)

    def send(self, *parts: Any) -> None:
        """Write all bytes of `parts` as one unit. Raises OSError; woken by abort()."""
        with self._send_lock:
            if self._is_tls:
                self._send_tls(memoryview(b"".join(parts)))
            elif hasattr(self._sock, "sendmsg"):
                self._send_parts(parts)
            else:
                self._sock.sendall(b"".join(parts))

    def _send_parts(self, parts: Any) -> None:
        """Write without joining: a header and its payload cross as they are."""
        sent = self._sock.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._sock.sendall(memoryview(part)[sent:])
                sent = 0
            else:
                sent -= len(part)

    def _send_tls(self, view: memoryview) -> None:
        while view:
            try:
                # The very same slice after a Want*: OpenSSL insists on it.
                with self._tls_lock:
                    sent = self._sock.send(view[:_TLS_WRITE_BYTES])
            except ssl.SSLWantWriteError:
                wait_ready(self._sock, write=True, timeout_s=None)
            except ssl.SSLWantReadError:
                wait_ready(self._sock, write=False, timeout_s=_CROSS_WAIT_S)
            else:
                view = view[sent:]

    def abort(self) -> None:
        """Wake both threads for good: their next or present call ends or fails. Any thread."""
        with contextlib.suppress(OSError):  # Not connected any more: nothing waits.
            # Not SSLSocket.shutdown(), which takes the object away under the threads.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor; only when neither thread can enter any more."""
        with contextlib.suppress(OSError):
            self._sock.close()
