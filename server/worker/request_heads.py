"""Collects request heads in the worker's poller: a peer that is slow takes no thread.

The process's main thread, which polls, makes every call.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from server.logs import ROOT_NAME
from server.worker.answers import close_now, send_answer

_log = logging.getLogger(f"{ROOT_NAME}.worker")

# Heads that are collected at once. The oldest gives way to a newcomer.
MAX_PENDING = 512
# Bytes of a head that one call reads.
_READ_BYTES = 16 * 1024
_HEAD_END = b"\r\n\r\n"
# First byte of a peer that takes a port without TLS for one with it (RFC 8446, 5.1). The peer
# waits for an answer of TLS. A close at once tells of the mistake before the timeout does.
_TLS_HANDSHAKE = b"\x16"
# The worker's heartbeat and its check of the parent need a turn each second.
_LONGEST_POLL_S = 1.0
# Answers to a head that no thread ever sees.
_HEAD_TOO_LARGE = ("head_too_large", "the request's head is larger than the relay takes")
_HEAD_TIMEOUT = ("head_timeout", "the request's head did not come in time")


class HeadConnection(Protocol):
    """A connection, as gunicorn's TConn is one."""

    sock: socket.socket
    # The peer's address; empty for a peer of a socket file.
    client: tuple[str, int] | str

    def close(self) -> None:
        """Close the socket."""


class _Head:
    """A connection whose request head has not come whole."""

    __slots__ = ("conn", "data", "deadline", "events", "handshake")

    def __init__(
        self, conn: HeadConnection, deadline: float, handshake: ssl.SSLSocket | None
    ) -> None:
        self.conn = conn
        self.deadline = deadline
        # The socket until its TLS handshake has ended.
        self.handshake = handshake
        self.data = bytearray()
        self.events = selectors.EVENT_READ


class RequestHeads:
    """The connections whose heads are collected.

    Each connection leaves once: `on_head` gets the connection and the bytes of the head, or
    `on_drop` is called after the connection was closed.
    """

    def __init__(
        self,
        poller: selectors.BaseSelector,
        timeout_s: float,
        max_bytes: int,
        on_head: Callable[[HeadConnection, bytes], None],
        on_drop: Callable[[], None],
    ) -> None:
        self._poller = poller
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._on_head = on_head
        self._on_drop = on_drop
        # In the order of the deadlines, which is the order of accept.
        self._pending: dict[_Head, None] = {}

    def add(self, conn: HeadConnection, handshake: ssl.SSLSocket | None) -> None:
        """Collect the head of a new connection; with TLS, `handshake` is its socket."""
        if len(self._pending) >= MAX_PENDING:
            self.drop_oldest()
        head = _Head(conn, time.monotonic() + self._timeout_s, handshake)
        self._pending[head] = None
        self._poller.register(conn.sock, head.events, lambda _sock: self._continue(head))

    def drop_oldest(self) -> bool:
        """Drop the connection that has waited longest; False if there is none."""
        head = next(iter(self._pending), None)
        if head is not None:
            self._drop(head)
        return head is not None

    def refuse_late(self) -> None:
        """Answer and close the connections whose deadline is over."""
        now = time.monotonic()
        while self._pending and (head := next(iter(self._pending))).deadline <= now:
            self._refuse(head, "408 Request Timeout", *_HEAD_TIMEOUT)

    def drop_all(self) -> None:
        """Drop every connection."""
        while self.drop_oldest():
            pass

    def next_poll_s(self) -> float:
        """Return how long the next poll may take, in seconds."""
        if not self._pending:
            return _LONGEST_POLL_S
        deadline = next(iter(self._pending)).deadline
        return min(_LONGEST_POLL_S, max(0.0, deadline - time.monotonic()))

    def _continue(self, head: _Head) -> None:
        """Read the bytes that have come, without waiting."""
        if head not in self._pending:
            return  # Dropped for a newcomer in this round of the poller.
        try:
            if head.handshake is not None:
                head.handshake.do_handshake()
                head.handshake = None
            # Until a read would block: bytes that TLS has decrypted wake no poller.
            while self._read(head):
                pass
        except (BlockingIOError, ssl.SSLWantReadError):
            self._await(head, selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._await(head, selectors.EVENT_WRITE)
        except (OSError, ValueError):
            self._drop(head)

    def _read(self, head: _Head) -> bool:
        """Read once; return False if the connection has left."""
        data = head.conn.sock.recv(_READ_BYTES)
        begin = max(0, len(head.data) - len(_HEAD_END) + 1)
        head.data += data
        end = head.data.find(_HEAD_END, begin)
        size = end + len(_HEAD_END) if end >= 0 else len(head.data)
        is_tls_by_mistake = head.data[:1] == _TLS_HANDSHAKE
        if not data or is_tls_by_mistake:
            self._drop(head)
        elif size > self._max_bytes:
            self._refuse(head, "431 Request Header Fields Too Large", *_HEAD_TOO_LARGE)
        elif end >= 0:
            self._forget(head)
            # The bytes behind the head are a body, which no path takes. A WebSocket peer has to
            # wait for the answer before it sends more (RFC 6455, 4.1).
            self._on_head(head.conn, bytes(head.data[:size]))
        else:
            return True
        return False

    def _await(self, head: _Head, events: int) -> None:
        if events != head.events:
            head.events = events
            self._poller.modify(head.conn.sock, events, lambda _sock: self._continue(head))

    def _forget(self, head: _Head) -> None:
        del self._pending[head]
        self._poller.unregister(head.conn.sock)

    def _drop(self, head: _Head) -> None:
        self._forget(head)
        head.conn.close()
        self._on_drop()

    def _refuse(self, head: _Head, status: str, code: str, message: str) -> None:
        """Answer, as far as the socket takes the answer at once, and close."""
        # A peer that has sent nothing may not speak HTTP.
        if head.data:
            _log.info("request refused code=%s address=%s", code, _address(head.conn.client))
            send_answer(head.conn.sock, status, code, message)
        self._forget(head)
        close_now(head.conn.sock)
        self._on_drop()


def _address(client: tuple[str, int] | str) -> str:
    return str(client[0]) if isinstance(client, tuple) and client else "unix"
