"""One leg of a client or a proxy command: a WebSocket over websocket-client.

The library makes the handshake and reads frames. Its recv() and send() are not used:
they answer pings under the send lock, follow redirects with secrets, and bound neither
time nor size. Threads: one reader calls receive(), the writer thread drains the outbox,
the timer calls tick(); any thread may put into the outbox, close() or abort().
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from http_network_relay.dial.connect import dial_server, source_address
from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.http_proxy import printable
from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import MessageReader
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CLOSE_RESTART, CLOSE_TOO_BIG, Code, find_code
from http_network_relay.wire.constants import (
    FLUSH_S,
    MASK_HEADER,
    MASK_ZERO,
    MAX_MESSAGE_BYTES,
    OP_CLOSE,
    OP_PING,
    RELAY_HEADER,
    SILENCE_INTERVALS,
    SUBPROTOCOL,
)
from http_network_relay.wire.errors import LegError, RelayError
from http_network_relay.wire.frames import ZERO_KEY

# The whole way from the name lookup to the 101.
DIAL_SERVER_S = 20.0
# Of an answer to the handshake: a head, and the body of a refusal.
_MAX_ANSWER_BYTES = 64 * 1024
# A machine that slept, or came into another network, pings at once and waits this long.
_AFTER_SLEEP_S = 3.0
# How often to look whether the way to the server goes out by another address.
_LOOK_S = 2.0
_INTERNET = (socket.AF_INET, socket.AF_INET6)
# A `Retry-After` counts up to here: a typo must not park a client for years.
_MAX_RETRY_AFTER_S = 300.0


def websocket_client() -> Any:
    """Import websocket-client late: the import costs a start 50 ms and may be missing."""
    try:
        import websocket
    except ImportError as exc:
        raise RelayError(
            "usage",
            "the Python package websocket-client is missing:"
            " `pip install websocket-client`, or `apt install python3-websocket`",
        ) from exc
    if not hasattr(websocket, "frame_buffer") or not hasattr(websocket, "WebSocket"):
        raise RelayError(
            "usage",
            "the Python module `websocket` here is another package of that name:"
            " `pip uninstall websocket`, then `pip install websocket-client`",
        )
    # Debian 12's version takes 1012, with which a server restarts, for a broken frame.
    known = getattr(websocket._abnf, "VALID_CLOSE_STATUS", ())
    if CLOSE_RESTART not in known:
        websocket._abnf.VALID_CLOSE_STATUS = (*known, CLOSE_RESTART)
    return websocket


class _HandshakeSocket:
    """What the library gets as a socket: every call ends by one deadline.

    Keeps what was read too far, and survives the library's close(), so that the body
    of a refusal can be read with every version of the library.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._taken = 0
        self.buffer = b""

    def gettimeout(self) -> None:
        return None

    def settimeout(self, _: float | None) -> None:
        pass

    def close(self) -> None:
        pass

    def recv(self, size: int) -> bytes:
        while not self.buffer:
            try:
                # Small: the library takes it byte by byte, and each takes the rest along.
                self.buffer = self._sock.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._deadline.wait_ready(self._sock, write=False, what="the server")
            else:
                if not self.buffer:
                    return b""
        piece, self.buffer = self.buffer[:size], self.buffer[size:]
        self._taken += len(piece)
        if self._taken > _MAX_ANSWER_BYTES:
            raise RelayError("not_a_relay", "the answer to the WebSocket handshake is too long")
        return piece

    def send(self, data: Any) -> int:
        while True:
            try:
                return self._sock.send(data)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._deadline.wait_ready(self._sock, write=True, what="the server")


def connect(
    endpoint: Endpoint,
    headers: list[str],
    *,
    context: ssl.SSLContext | None,
    environ: Mapping[str, str],
    ping_interval_s: float,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Connection:
    """Dial, upgrade and return the leg; raises RelayError, within 20 s."""
    library = websocket_client()
    deadline = Deadline(DIAL_SERVER_S, is_cancelled)
    sock = dial_server(endpoint, context, environ, deadline)
    shim = _HandshakeSocket(sock, deadline)
    # Nobody on the way can read what is masked; so it need not be, if the server agrees.
    is_here = endpoint.is_loopback and _far_peer(sock) is None  # And by no proxy elsewhere.
    asks_for_zero = endpoint.is_tls or is_here
    if asks_for_zero:
        headers = [*headers, f"{MASK_HEADER}: {MASK_ZERO}"]
    try:
        answered = _upgrade(library, endpoint, headers, shim).get(MASK_HEADER.lower())
    except BaseException:
        sock.close()
        raise
    make_key = _zero_key if asks_for_zero and answered == MASK_ZERO else _random_key
    return Connection(library, sock, shim.buffer, ping_interval_s, make_key)


def _zero_key() -> bytes:
    return ZERO_KEY


def _random_key() -> bytes:
    return os.urandom(4)


def _upgrade(library: Any, endpoint: Endpoint, headers: list[str], shim: Any) -> Mapping[str, str]:
    """Make the handshake; return the headers of its answer, names in lower case."""
    where = f"{endpoint.host}:{endpoint.port}"
    web_socket = library.WebSocket()
    refusal: tuple[int, Mapping[str, str], bytes | None] | None = None
    try:
        web_socket.connect(
            endpoint.url,
            socket=shim,
            header=headers,
            subprotocols=[SUBPROTOCOL],
            suppress_origin=True,
            redirect_limit=0,
        )
        status = web_socket.status
    except library.WebSocketBadStatusException as exc:
        # Version 1.2.3 gives neither headers nor body by name.
        found = getattr(exc, "resp_headers", None) or {}
        refusal = (exc.status_code, found, getattr(exc, "resp_body", None))
        status = exc.status_code
    except library.WebSocketConnectionClosedException as exc:
        raise RelayError("server_unreachable", f"{where} ended the WebSocket handshake") from exc
    except library.WebSocketException as exc:
        status = web_socket.status
        if status is None or status == 101:
            raise RelayError(
                "not_a_relay",
                f"{where} does not speak the relay's WebSocket: {printable(str(exc))};"
                " check --server-url",
            ) from exc
    except RelayError:
        raise
    except OSError as exc:
        raise RelayError(
            "server_unreachable",
            f"{where} ended the WebSocket handshake: {printable(exc.strerror or str(exc))}",
        ) from exc
    except Exception as exc:
        # By what a server answers the library can be brought to raise nearly anything
        # (IndexError, CookieError, ...); an unattended client must live on.
        raise RelayError(
            "not_a_relay",
            f"{where} does not speak HTTP: {printable(repr(exc))}; check --server-url",
        ) from exc
    if refusal is None and status == 101:
        return dict(web_socket.getheaders())
    if status is None:  # A blank line for a status line.
        raise RelayError("not_a_relay", f"{where} does not speak HTTP; check --server-url")
    answer, body = (refusal[1], refusal[2]) if refusal else (web_socket.getheaders() or {}, None)
    raise _refusal(endpoint, int(status), answer, body if body is not None else _body(answer, shim))


def _body(headers: Mapping[str, str], shim: _HandshakeSocket) -> bytes:
    wanted = int(min(_number(headers.get("content-length", "")) or 0, _MAX_ANSWER_BYTES // 2))
    body = b""
    with contextlib.suppress(OSError, RelayError):
        while len(body) < wanted:
            piece = shim.recv(wanted - len(body))
            if not piece:
                break
            body += piece
    return body


def _refusal(
    endpoint: Endpoint, status: int, headers: Mapping[str, str], body: bytes
) -> RelayError:
    """Tell the relay's own refusals from answers of something in between."""
    where = f"{endpoint.host}:{endpoint.port}"
    location = headers.get("location")
    if 300 <= status < 400 and location:
        return RelayError(
            "not_a_relay",
            f"{where} redirects to {printable(location)}; redirects are not followed with"
            " secrets, so give that address as --server-url if it is right",
        )
    if RELAY_HEADER.lower() not in headers:
        server = printable(headers.get("server", "unknown"))
        return RelayError(
            "not_a_relay",
            f"something before the relay answered {status}, Server: {server};"
            f" check --server-url {endpoint.url}",
        )
    try:
        told = json.loads(body)
        code, message = str(told["code"]), printable(str(told["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"it answered {status}"
    if find_code(code) in (None, Code.INTERNAL_ERROR):  # Of the server, not of the tunnel.
        by_status = {401: "unauthorized", 403: "forbidden", 426: "version_unsupported"}
        code = by_status.get(status, "busy" if status in (429, 503) else "server_failed")
    retry_after_s = _number(headers.get("retry-after", ""))
    if retry_after_s is not None:
        retry_after_s = min(retry_after_s, _MAX_RETRY_AFTER_S)
    return RelayError(code, f"the relay at {where}: {message}", retry_after_s=retry_after_s)


def _number(text: str) -> float | None:
    """Read a header's number; None for anything else, however long."""
    return float(text) if text.isascii() and text.isdecimal() else None


def _far_peer(sock: Any) -> Any:
    """Return the address of a peer on another machine, None for one that is here."""
    try:
        peer = sock.getpeername() if sock.family in _INTERNET else None
    except OSError:
        return None
    return None if peer is None or ipaddress.ip_address(peer[0]).is_loopback else peer


class Connection:
    """A leg that is up. `outbox` is what it sends."""

    def __init__(
        self,
        library: Any,
        sock: Any,
        begun: bytes,
        ping_interval_s: float,
        make_key: Callable[[], bytes] = _random_key,
    ) -> None:
        self.outbox = FrameSender(make_key)
        self._library = library
        self._duplex = DuplexSocket(sock)
        self._reader = FrameReader(self._duplex, begun, is_masked=False)
        self._frames = library.frame_buffer(None, True)
        # The library reads by this one method; ours bounds a frame.
        self._frames.recv_strict = self._read_exactly
        self._messages = MessageReader(self._reader, self.outbox, self._read_odd)
        self._writer: threading.Thread | None = None
        self._ping_interval_s = ping_interval_s
        # The timer's own.
        self._ping_at = time.monotonic() + ping_interval_s
        self._woke_at = 0.0
        # How the server was reached last. On this machine it always is.
        self._peer = _far_peer(sock)
        self._look_at = float("inf") if self._peer is None else 0.0
        self._source: str | None = None
        # Set by any thread, read by the timer: abort then. Plain assignments.
        self._abort_at = float("inf")
        # Why the leg was given up from here, if it was.
        self.gave_up: RelayError | None = None

    def start(self, name: str) -> None:
        """Start the writer thread; stop() joins it."""
        self.outbox.start(self._duplex)
        writer = threading.Thread(target=self._write, name=f"leg-writer:{name}")
        writer.start()  # May fail on a machine out of threads; stop() joins what runs.
        self._writer = writer

    # The reader.

    def receive(self, on_pause: Callable[[], None] | None = None) -> tuple[int, Any]:
        """As MessageReader.receive()."""
        return self._messages.receive(on_pause)

    def _read_odd(self) -> tuple[int, Any, bool]:
        try:
            frame = self._frames.recv_frame()
        except self._library.WebSocketException as exc:
            raise LegError(f"bad frame from the server: {exc}") from exc
        return frame.opcode, frame.data, bool(frame.fin)

    def _read_exactly(self, size: int) -> bytes:
        if size > MAX_MESSAGE_BYTES:
            raise LegError("a frame is too long", CLOSE_TOO_BIG)
        data = b""
        while len(data) < size:
            piece = self._reader.read(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    # The writer.

    def _write(self) -> None:
        try:
            self.outbox.run()
        except OSError:
            # The reader sees the same loss and tells.
            self.abort()

    # The timer.

    def tick(self, now: float, *, slept: bool) -> float:
        """Ping, or give a silent leg up; return when to be called again.

        Called by the timer thread: never writes, never waits for a lock.
        """
        if slept or self._has_moved(now):
            self._woke_at = self._ping_at = now
        heard_at = self._duplex.heard_at
        if heard_at < self._woke_at:
            silent_at = self._woke_at + _AFTER_SLEEP_S
        else:
            silent_at = heard_at + SILENCE_INTERVALS * self._ping_interval_s
        if now >= silent_at:
            silence = f"nothing was heard from the server for {now - heard_at:.0f} s"
            self.give_up(RelayError("leg_lost", silence))
        if now >= self._abort_at:
            self.abort()
            self._abort_at = float("inf")
        if now >= self._ping_at:
            is_put = self.outbox.try_put_leg("ping", Frame(OP_PING, b"", b""))
            self._ping_at = now + (self._ping_interval_s if is_put else 0.01)
        silent_at = silent_at if now < silent_at else now + 1
        return min(self._ping_at, silent_at, self._abort_at, self._look_at)

    def _has_moved(self, now: float) -> bool:
        """Whether the server is reached from another address than before.

        A laptop that changes its Wi-Fi: the old connection is dead, and nothing says so.
        """
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_S
        before, after = self._source, source_address(self._peer)
        if after is not None:  # No network: what was before may come back as it was.
            self._source = after
        return None not in (before, after) and before != after

    def give_up(self, error: RelayError) -> None:
        """End the leg for a reason that only this end knows."""
        if self.gave_up is None:
            self.gave_up = error
        self.abort()

    # The end.

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        """Send a close behind what is queued; the leg is aborted a second later at the latest.

        The caller wakes the timer, whose clock it is.
        """
        payload = struct.pack("!H", code) + reason.encode("ascii", "replace")[:120]
        self._abort_at = min(self._abort_at, time.monotonic() + FLUSH_S)
        self.outbox.close(Frame(OP_CLOSE, b"", payload), flush=flush)

    def abort(self) -> None:
        """End the leg now: reader and writer wake."""
        self._duplex.abort()

    def stop(self) -> None:
        """End the writer, join it and free the socket. By the reader, or after it ended."""
        if self._writer is not None and self.outbox.is_closing:
            # So that the peer reads why. The writer ends by itself behind the close.
            self._writer.join(FLUSH_S)
        self.abort()
        self.outbox.stop()
        if self._writer is not None:
            self._writer.join()
        self._duplex.close()
