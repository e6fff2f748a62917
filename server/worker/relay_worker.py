"""gunicorn's threaded worker, for a relay: a thread only for a whole request head.

The stock worker gives each connection a thread at once, waits there for the head and
lingers on the accept thread at the end; a handful of peers without any secret stop it.
Here heads are collected in the accept thread's own poller, one request is served per
connection, nothing lingers, and every stop signal leads to the one drain.

Threads: the process's main thread accepts, polls and drains; the pool's threads serve.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from concurrent import futures
from typing import Any

from gunicorn import http
from gunicorn import sock as gunicorn_sock
from gunicorn.workers.gthread import TConn, ThreadWorker

from http_network_relay.wire.constants import RELAY_HEADER, RELAY_HEADER_VALUE
from server.app import EXTENSION
from server.config import Config
from server.logs import ROOT_NAME

_log = logging.getLogger(f"{ROOT_NAME}.worker")

# Threads beyond the slots: health checks and refusals are answered while all legs are up.
SPARE_THREADS = 8
# What is read of a head at once.
_READ_BYTES = 16 * 1024
_HEAD_END = b"\r\n\r\n"
# What a peer says first who takes a port without TLS for one with it (RFC 8446, 5.1). It waits
# for an answer of TLS, and learns of its mistake at once instead of after HEAD_TIMEOUT_S.
_TLS_HANDSHAKE = b"\x16"
# Heads that may be on their way at once; the oldest gives way to a newcomer.
MAX_PENDING = 512
# Connections accepted per round, so that the other events get their turn.
_ACCEPTS_PER_ROUND = 32
# A rest of the listener when the system cannot give a descriptor.
_ACCEPT_REST_S = 0.2
# What is read and dropped before a close: unread bytes would make it a reset.
_MAX_DRAIN_BYTES = 64 * 1024
# Answers to a head that no thread ever sees.
_HEAD_TOO_LARGE = ("head_too_large", "the request's head is larger than the relay takes")
_HEAD_TIMEOUT = ("head_timeout", "the request's head did not come in time")
# The drain: legs leave, those that stay flush, then threads end; all is gone within 2 s of the
# signal (rule 9 of the design), whatever is stuck. Not the whole second that the wire allows for
# the flush: the master needs 0.2 s to notice and to end itself, 0.4 s on a busy machine.
# To leave is to have the next leg up first: one TLS handshake, and the tries before it.
_LEAVE_S = 0.5
_FLUSH_S = 0.5
_JOIN_S = 0.3
_GONE_S = 1.4


class _Head:
    """A connection whose request head is still on its way."""

    __slots__ = ("conn", "data", "deadline", "events", "is_shaking_hands")

    def __init__(self, conn: Any, deadline: float, is_shaking_hands: bool) -> None:
        self.conn = conn
        self.deadline = deadline
        self.is_shaking_hands = is_shaking_hands
        self.data = bytearray()
        self.events = selectors.EVENT_READ


class RelayWorker(ThreadWorker):
    """The only worker class under which the relay takes WebSockets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Also where our conf file is not in force. One request per connection.
        self.cfg.set("keepalive", 0)
        # Pending heads, legs and answers must all fit: accept is never switched off for them.
        room = MAX_PENDING + 2 * (self.cfg.threads + SPARE_THREADS)
        self.worker_connections: int = max(self.cfg.worker_connections, room)
        # While the open files are used up; the listener would wake us without end.
        self._accept_again_at = 0.0
        # In the order of their deadlines, which is that of accept.
        self._pending: dict[_Head, None] = {}
        self._tls_context: ssl.SSLContext | None = None
        self._relay: Any = None
        # --handshake-timeout, TLS handshake included, and --max-header-bytes.
        self._head_timeout_s = Config.handshake_timeout_s
        self._max_head_bytes = Config.max_header_bytes

    # Start.

    def get_thread_pool(self) -> futures.ThreadPoolExecutor:
        """Return a pool with a thread for each slot and some for the rest."""
        return futures.ThreadPoolExecutor(self.cfg.threads + SPARE_THREADS, "handler")

    def load_wsgi(self) -> None:
        """Load the application, then tell the relay how many legs there is room for."""
        super().load_wsgi()
        if self.cfg.is_ssl:
            self._tls_context = gunicorn_sock.ssl_context(self.cfg)
        self._relay = getattr(self.wsgi, "extensions", {}).get(EXTENSION)
        if self._relay is not None:
            self._head_timeout_s = self._relay.config.handshake_timeout_s
            self._max_head_bytes = self._relay.config.max_header_bytes
            self._relay.start(self.cfg.threads)

    def run(self) -> None:
        """Accept and poll until a signal says stop, then drain."""
        self.poller.register(
            self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks
        )
        self.set_accept_enabled(True)
        while self.alive:
            self.notify()
            has_room = self.nr_conns < self.worker_connections
            self.set_accept_enabled(has_room and time.monotonic() >= self._accept_again_at)
            self.wait_for_and_dispatch_events(self._next_wait_s())
            if not self.is_parent_alive():
                break
            self._drop_late()
        self._drain()

    # Signals: all lead to the one drain, and do next to nothing by themselves.

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT and SIGQUIT: as SIGTERM."""
        self.handle_exit(sig, frame)

    # Heads.

    def accept(self, listener: Any) -> None:
        """Take new connections into the poller."""
        for _ in range(_ACCEPTS_PER_ROUND):
            try:
                client_sock, address = listener.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room(exc)
                return
            self.nr_conns += 1
            self._begin_head(client_sock, address, listener.getsockname())

    def _make_room(self, error: OSError) -> None:
        """The system has no descriptor or memory left for a connection."""
        if self._pending:
            self._drop(next(iter(self._pending)))
            return
        _log.warning("connections wait error=%s fix=raise-the-limit-of-open-files", error)
        self._accept_again_at = time.monotonic() + _ACCEPT_REST_S

    def _begin_head(self, client_sock: socket.socket, address: Any, server: Any) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._drop(next(iter(self._pending)))
        conn = TConn(self.cfg, client_sock, address, server)
        try:
            if self._tls_context is not None:
                conn.sock = self._tls_context.wrap_socket(
                    client_sock,
                    server_side=True,
                    do_handshake_on_connect=False,
                    suppress_ragged_eofs=self.cfg.suppress_ragged_eofs,
                )
        except OSError:  # The peer is gone already.
            self.nr_conns -= 1
            client_sock.close()
            return
        is_tls = self._tls_context is not None
        head = _Head(conn, time.monotonic() + self._head_timeout_s, is_tls)
        self._pending[head] = None
        self.poller.register(conn.sock, head.events, lambda _sock: self._continue_head(head))

    def _continue_head(self, head: _Head) -> None:
        """Take in what has come, without waiting."""
        if head not in self._pending:
            return  # Dropped for a newcomer in this same round.
        try:
            if head.is_shaking_hands:
                head.conn.sock.do_handshake()
                head.is_shaking_hands = False
            # Until it would block: bytes that TLS has decrypted wake no poller.
            while True:
                data = head.conn.sock.recv(_READ_BYTES)
                begin = max(0, len(head.data) - len(_HEAD_END) + 1)
                head.data += data
                end = head.data.find(_HEAD_END, begin)
                size = end + len(_HEAD_END) if end >= 0 else len(head.data)
                is_tls_by_mistake = head.data[:1] == _TLS_HANDSHAKE
                if not data or is_tls_by_mistake:
                    self._drop(head)
                    return
                if size > self._max_head_bytes:
                    self._refuse(head, "431 Request Header Fields Too Large", *_HEAD_TOO_LARGE)
                    return
                if end >= 0:
                    self._serve(head, size)
                    return
        except (BlockingIOError, ssl.SSLWantReadError):
            self._await(head, selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._await(head, selectors.EVENT_WRITE)
        except (OSError, ValueError):
            self._drop(head)

    def _await(self, head: _Head, events: int) -> None:
        if events != head.events:
            head.events = events
            self.poller.modify(head.conn.sock, events, lambda _sock: self._continue_head(head))

    def _serve(self, head: _Head, size: int) -> None:
        """Give the whole head to a thread.

        gunicorn's parser gets these bytes and no socket, so that no thread can wait for
        more of them. What follows the head is a body, which no path of ours takes; a
        WebSocket peer has to wait for the answer (RFC 6455, 4.1).
        """
        self._forget(head)
        conn = head.conn
        conn.parser = http.get_parser(self.cfg, [bytes(head.data[:size])], conn.client)
        conn.initialized = conn.data_ready = True
        self.enqueue_req(conn)

    def _forget(self, head: _Head) -> None:
        del self._pending[head]
        self.poller.unregister(head.conn.sock)

    def _drop(self, head: _Head) -> None:
        self._forget(head)
        self.nr_conns -= 1
        head.conn.close()

    def _refuse(self, head: _Head, status: str, code: str, message: str) -> None:
        """Answer, as far as that does not wait, and drop: no thread ever sees it."""
        if head.data:  # Who said nothing does not speak HTTP, or not yet.
            _log.info("request refused code=%s address=%s", code, _address(head.conn.client))
            _send_now(head.conn.sock, status, code, message)
        self._forget(head)
        self.nr_conns -= 1
        _close_now(head.conn.sock)

    def _drop_late(self) -> None:
        now = time.monotonic()
        while self._pending and (head := next(iter(self._pending))).deadline <= now:
            self._refuse(head, "408 Request Timeout", *_HEAD_TIMEOUT)

    def _next_wait_s(self) -> float:
        """How long to poll: at most a second, for the heartbeat and the parent check."""
        if not self._accepting:
            return _ACCEPT_REST_S
        if not self._pending:
            return 1.0
        deadline: float = next(iter(self._pending)).deadline
        return min(1.0, max(0.0, deadline - time.monotonic()))

    # The end of a request.

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """Never: one request per connection, so no thread waits for another one."""
        return False

    def finish_request(self, conn: Any, fs: futures.Future[Any]) -> None:
        """Close the connection, without lingering: this is the accept thread."""
        self.nr_conns -= 1
        if not fs.cancelled() and fs.exception() is not None:
            _log.error("request failed", exc_info=fs.exception())
        _close_now(conn.sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer a request that gunicorn cannot read, or that failed in it.

        Not gunicorn's own: its answer lacks our header, and its log line repeats the
        request's bytes, secrets included.
        """
        if isinstance(exc, (OSError, http.errors.ParseException)):
            _log.info("request unreadable error=%s", type(exc).__name__)
            status, code = "400 Bad Request", "bad_request"
        else:
            _log.error("request failed", exc_info=exc)
            status, code = "500 Internal Server Error", "internal_error"
        _send_now(client, status, code, "the request cannot be served")

    # The drain.

    def _drain(self) -> None:
        """End everything; the process is gone within 2 s, whatever is stuck."""
        _start_backstop()
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        for head in list(self._pending):
            self._drop(head)
        if self._relay is not None:
            self._relay.drain()
            if not self._relay.join(_LEAVE_S):
                self._relay.end()
                if not self._relay.join(_FLUSH_S):
                    self._relay.stop()
                    self._relay.join(_JOIN_S)
            self._relay.stop_threads(_JOIN_S)
        self.tpool.shutdown(wait=False, cancel_futures=True)
        self.method_queue.run_callbacks(None)
        # The interpreter joins the pool's threads and the legs' writers at its end; the
        # backstop covers one that is stuck.


def _send_now(sock: socket.socket, status: str, code: str, message: str) -> None:
    """Send an answer as far as it goes without waiting."""
    body = f'{{"code":"{code}","message":"{message}"}}\n'
    head = (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"{RELAY_HEADER}: {RELAY_HEADER_VALUE}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        sock.settimeout(0)
        sock.send((head + body).encode("ascii"))
    except (OSError, ValueError):
        pass  # Nobody is there to read it, or its TLS handshake has not ended.


def _address(client: Any) -> str:
    return str(client[0]) if isinstance(client, tuple) and client else "unix"


def _close_now(sock: socket.socket) -> None:
    """End our direction, drop what is there, close. Never waits."""
    try:
        sock.setblocking(False)
        # The plain socket's methods, also for TLS: SSLSocket.shutdown() would not send more.
        socket.socket.shutdown(sock, socket.SHUT_WR)
        dropped = 0
        while dropped < _MAX_DRAIN_BYTES and (data := socket.socket.recv(sock, 16 * 1024)):
            dropped += len(data)
    except (OSError, ValueError):
        pass  # It would wait, or the peer is gone.
    finally:
        with contextlib.suppress(OSError):
            sock.close()


def _start_backstop() -> None:
    """See to it that the process ends even if a thread does not."""
    due_at = time.monotonic() + _GONE_S

    def end() -> None:
        while (left_s := due_at - time.monotonic()) > 0:
            threading.Event().wait(left_s)
        names = [thread.name for thread in threading.enumerate()]
        _log.error("process ended hard threads=%s", ",".join(names))
        for handler in logging.getLogger(ROOT_NAME).handlers:
            handler.flush()
        os._exit(0)

    # A daemon: it must not keep alive the process that it ends.
    threading.Thread(target=end, name="backstop:drain", daemon=True).start()
