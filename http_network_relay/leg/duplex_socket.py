"""One socket, TLS or plain, for one reading and one sending thread at once.

FrameSender decides which thread sends. This class keeps two threads out of OpenSSL's object,
which CPython does not: `_tls_lock` is held for one non-blocking read or write, and never across
a wait. A race inside OpenSSL shows in no error.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

# The largest TLS record: a longer write would hold `_tls_lock` for several of them.
_TLS_WRITE_BYTES = 16 * 1024
# Linux and macOS: one call without waiting, whatever the socket's mode. 0: not available.
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
# OpenSSL may wait for the other direction (a key update). The other thread may take
# that event, so such a wait is short, and the call is tried again.
_CROSS_WAIT_S = 0.05
# Without a byte for this long, a stream has paused.
PAUSE_S = 0.002


def wait_ready(sock: socket.socket, *, write: bool, timeout_s: float | None) -> bool:
    """Wait until the socket can be read or written, or has failed; False: timed out."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if write else select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
    both = ([], [sock], [sock]) if write else ([sock], [], [sock])
    return any(select.select(*both, timeout_s))


class DuplexSocket:
    """Owns `sock` (connected, TLS handshake done) until close()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        # Plain sockets block in the kernel, where two threads are safe.
        sock.settimeout(0.0 if self._is_tls else None)
        self._tls_lock = threading.Lock()  # Guards the OpenSSL object.
        # Whether the last read emptied the kernel's buffer. The reader's own.
        self._is_drained = True
        # Whether OpenSSL has to read before the rest of send_now() can be written.
        self.wants_read = False
        # When any byte last came, monotonic. Written by the reader, read by the timer.
        self.heard_at = time.monotonic()

    def recv(self, size: int, on_pause: Callable[[], None] | None = None) -> bytes:
        """Return 1 to `size` bytes, b"" at the end of the stream. Raises OSError.

        Calls `on_pause`, if given, once nothing has come for PAUSE_S, and waits on.
        """
        if self._is_tls:
            data = self._recv_tls(size, on_pause)
        else:
            # Before the buffer of `size` is made: an idle leg has none.
            if on_pause is not None or self._is_drained:
                self._wait_readable(on_pause)
            data = self._sock.recv(size)
            self._is_drained = len(data) < size
        self.heard_at = time.monotonic()
        return data  # type: ignore[no-any-return]

    def _wait_readable(self, on_pause: Callable[[], None] | None) -> None:
        if on_pause is not None:
            if wait_ready(self._sock, write=False, timeout_s=PAUSE_S):
                return
            on_pause()
        wait_ready(self._sock, write=False, timeout_s=None)

    def recv_into(self, view: memoryview) -> int:
        """As recv(), into `view`; returns how many bytes, 0 at the end of the stream."""
        count = self._recv_tls(view) if self._is_tls else self._sock.recv_into(view)
        self.heard_at = time.monotonic()
        return int(count)

    def _recv_tls(self, where: Any, on_pause: Callable[[], None] | None = None) -> Any:
        while True:
            # Read before the wait: poll does not see bytes that OpenSSL has decrypted.
            try:
                with self._tls_lock:
                    if isinstance(where, int):
                        return self._sock.recv(where)
                    return self._sock.recv_into(where)
            except ssl.SSLWantReadError:
                self._wait_readable(on_pause)
                on_pause = None
            except ssl.SSLWantWriteError:
                wait_ready(self._sock, write=True, timeout_s=_CROSS_WAIT_S)

    def send_now(self, header: bytes, payload: Any) -> memoryview | None:
        """Write as much as the socket takes without waiting; return the rest, None if none.

        The rest must be written before anything else. Raises OSError.
        """
        if self._is_tls:
            whole = memoryview(header + payload if header else payload)
            return self._send_tls(whole, waits=False)
        if not DONT_WAIT:
            return memoryview(header + payload)
        try:
            # In two parts: to join them would copy the payload.
            sent = self._sock.sendmsg((header, payload), (), DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent >= len(header):
            rest = memoryview(payload)[sent - len(header) :]
            return rest if rest else None
        return memoryview(header + payload)[sent:]

    def send(self, data: memoryview) -> None:
        """Write all of it, however long that takes. Raises OSError; woken by abort()."""
        if self._is_tls:
            self._send_tls(data, waits=True)
        else:
            self._sock.sendall(data)

    def _send_tls(self, view: memoryview, *, waits: bool) -> memoryview | None:
        while view:
            try:
                # The same slice again after a Want*: OpenSSL requires it.
                with self._tls_lock:
                    sent = self._sock.send(view[:_TLS_WRITE_BYTES])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError) as exc:
                is_write = isinstance(exc, ssl.SSLWantWriteError)
                if not waits:
                    self.wants_read = not is_write
                    return view
                timeout_s = None if is_write else _CROSS_WAIT_S
                wait_ready(self._sock, write=is_write, timeout_s=timeout_s)
            else:
                view = view[sent:]
        return None

    def finish_sending(self) -> None:
        """Tell the peer that nothing follows; reading goes on."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def abort(self) -> None:
        """Wake both threads: their present call and all later ones end or fail. Any thread."""
        with contextlib.suppress(OSError):  # Not connected any more: nothing waits.
            # Not SSLSocket.shutdown(), which sets its object to None under the threads.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor. Both threads MUST have ended."""
        with contextlib.suppress(OSError):
            self._sock.close()
