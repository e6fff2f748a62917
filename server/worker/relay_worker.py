"""gunicorn's threaded worker, for a relay: a thread only for a whole request head.

The stock worker gives each connection a thread at once, waits there for the head, and lingers on
the accept thread at the end. A few peers without any secret stop that worker. Here the accept
thread's own poller collects the heads, each connection carries one request, no close lingers, and
every stop signal leads to the one drain.

Threads: the process's main thread accepts, polls and drains; the pool's threads serve.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import ssl
import time
from concurrent import futures
from types import FrameType
from typing import Any

from gunicorn import http
from gunicorn import sock as gunicorn_sock
from gunicorn.workers.gthread import TConn, ThreadWorker

from server.app import EXTENSION
from server.config import Config
from server.logs import ROOT_NAME
from server.relay import Relay
from server.worker.answers import close_now, send_answer
from server.worker.drain import drain_relay, start_backstop
from server.worker.request_heads import MAX_PENDING, RequestHeads

_log = logging.getLogger(f"{ROOT_NAME}.worker")

# Threads beyond the slots: health checks and refusals are answered while all legs are up.
SPARE_THREADS = 8
# Connections accepted per round, so that the other events get their turn.
_ACCEPTS_PER_ROUND = 32
# A rest of the listener when the system cannot give a descriptor.
_ACCEPT_REST_S = 0.2
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class RelayWorker(ThreadWorker):
    """The only worker class under which the relay takes WebSockets."""

    # Made by load_wsgi(): gunicorn makes the poller, and the application has the settings.
    _heads: RequestHeads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Also where our conf file is not in force. One request per connection.
        self.cfg.set("keepalive", 0)
        # Pending heads, legs and answers must all fit: accept is never switched off for them.
        room = MAX_PENDING + 2 * (self.cfg.threads + SPARE_THREADS)
        self.worker_connections: int = max(self.cfg.worker_connections, room)
        # While the open files are used up; the listener would wake the poller without end.
        self._accept_again_at = 0.0
        self._tls_context: ssl.SSLContext | None = None
        self._relay: Relay | None = None

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
        self._heads = self.make_heads(self._relay.config if self._relay else Config())
        if self._relay is not None:
            self._relay.start(self.cfg.threads)

    def make_heads(self, config: Config) -> RequestHeads:
        """Return the collection of heads, with --handshake-timeout and --max-header-bytes."""
        return RequestHeads(
            self.poller,
            config.handshake_timeout_s,
            config.max_header_bytes,
            self._serve,
            self._count_end,
        )

    def run(self) -> None:
        """Accept and poll until a signal says stop, then drain."""
        self.poller.register(
            self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks
        )
        self.set_accept_enabled(True)
        while self.alive:
            self.notify()
            has_room = self.nr_conns < self.worker_connections
            is_accepting = has_room and time.monotonic() >= self._accept_again_at
            self.set_accept_enabled(is_accepting)
            poll_s = self._heads.next_poll_s() if is_accepting else _ACCEPT_REST_S
            self.wait_for_and_dispatch_events(poll_s)
            if not self.is_parent_alive():
                break
            self._heads.refuse_late()
        self._drain()

    # Signals: all lead to the one drain, and do next to nothing by themselves.

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT and SIGQUIT: as SIGTERM."""
        self.handle_exit(sig, frame)

    # A connection: accept, head, request, end.

    def accept(self, listener: socket.socket) -> None:
        """Take new connections into the poller."""
        for _ in range(_ACCEPTS_PER_ROUND):
            try:
                client_sock, address = listener.accept()
            except OSError as exc:
                if exc.errno in _OUT_OF_RESOURCES:
                    self._make_room(exc)
                return
            self.nr_conns += 1
            self._begin_head(client_sock, address, listener.getsockname())

    def _make_room(self, error: OSError) -> None:
        """The system has no descriptor or memory left for a connection."""
        if not self._heads.drop_oldest():
            _log.warning("connections wait error=%s fix=raise-the-limit-of-open-files", error)
            self._accept_again_at = time.monotonic() + _ACCEPT_REST_S

    def _begin_head(self, client_sock: socket.socket, address: Any, server: Any) -> None:
        conn = TConn(self.cfg, client_sock, address, server)
        handshake = None
        try:
            if self._tls_context is not None:
                conn.sock = handshake = self._tls_context.wrap_socket(
                    client_sock,
                    server_side=True,
                    do_handshake_on_connect=False,
                    suppress_ragged_eofs=self.cfg.suppress_ragged_eofs,
                )
        except OSError:  # The peer is gone already.
            self.nr_conns -= 1
            client_sock.close()
            return
        self._heads.add(conn, handshake)

    def _serve(self, conn: Any, head: bytes) -> None:
        """Give a whole head to a thread.

        gunicorn's parser gets these bytes and no socket, so that no thread can wait for more.
        """
        conn.parser = http.get_parser(self.cfg, [head], conn.client)
        conn.initialized = conn.data_ready = True
        self.enqueue_req(conn)

    def _count_end(self) -> None:
        self.nr_conns -= 1

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """Never: one request per connection, so no thread waits for another one."""
        return False

    def finish_request(self, conn: Any, fs: futures.Future[Any]) -> None:
        """Close the connection, without lingering: this is the accept thread."""
        self.nr_conns -= 1
        if not fs.cancelled() and fs.exception() is not None:
            _log.error("request failed", exc_info=fs.exception())
        close_now(conn.sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer a request that gunicorn cannot read, or that failed in gunicorn.

        gunicorn's own answer lacks our header, and its log line repeats the request's bytes,
        secrets included.
        """
        if isinstance(exc, (OSError, http.errors.ParseException)):
            _log.info("request unreadable error=%s", type(exc).__name__)
            status, code = "400 Bad Request", "bad_request"
        else:
            _log.error("request failed", exc_info=exc)
            status, code = "500 Internal Server Error", "internal_error"
        send_answer(client, status, code, "the request cannot be served")

    # The drain.

    def _drain(self) -> None:
        """End everything; the process is gone within 2 s, whatever is stuck."""
        start_backstop()
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        self._heads.drop_all()
        if self._relay is not None:
            drain_relay(self._relay)
        self.tpool.shutdown(wait=False, cancel_futures=True)
        self.method_queue.run_callbacks(None)
        # The interpreter joins the pool's threads and the legs' writers at its end; the
        # backstop covers one that is stuck.
