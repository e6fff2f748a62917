"""One leg of a client or a proxy command: a WebSocket over websocket-client.

The library makes the handshake and reads odd frames. Its recv() and send() are not used: they
answer pings under the send lock, and bound neither time nor size. Threads: one reader calls
receive(), a writer runs the frame sender, the timer calls tick(). Any thread may put frames,
or call close() and abort().
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from http_network_relay.dial.connect import dial_server
from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.http_proxy import printable
from http_network_relay.dial.keepalive import Keepalive, far_peer
from http_network_relay.dial.refusal import header_number, refusal
from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import MessageReader
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import (
    FLUSH_S,
    MASK_HEADER,
    MASK_ZERO,
    MAX_MESSAGE_BYTES,
    OP_CLOSE,
    SUBPROTOCOL,
)
from http_network_relay.wire.errors import LegError, RelayError
from http_network_relay.wire.frames import ZERO_KEY

# The whole way from the name lookup to the 101.
DIAL_SERVER_S = 20.0
# Of an answer to the handshake: a head, and the body of a refusal.
_MAX_ANSWER_BYTES = 64 * 1024


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
    # For Debian 12's version, a close with 1012 (the server restarts) is a bad frame.
    known = getattr(websocket._abnf, "VALID_CLOSE_STATUS", ())
    if CloseCode.RESTART not in known:
        websocket._abnf.VALID_CLOSE_STATUS = (*known, CloseCode.RESTART)
    return websocket


class _HandshakeSocket:
    """What the library gets as a socket: every call ends by one deadline.

    Keeps the bytes that were read behind the head, and ignores the library's close(), so that
    the body of a refusal can be read with every version of the library.
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
                # Small: the library takes single bytes, and each call copies the rest.
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
    # With TLS or on this machine nothing between the two ends reads the bytes: a mask of zero
    # does, if the server agrees.
    is_here = endpoint.is_loopback and far_peer(sock) is None  # No proxy on another machine.
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
    refused: tuple[int, Mapping[str, str], bytes | None] | None = None
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
        refused = (exc.status_code, found, getattr(exc, "resp_body", None))
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
        # Some answers make the library raise other errors (IndexError, CookieError, ...). An
        # unattended client must go on.
        raise RelayError(
            "not_a_relay",
            f"{where} does not speak HTTP: {printable(repr(exc))}; check --server-url",
        ) from exc
    if refused is None and status == 101:
        return dict(web_socket.getheaders())
    if status is None:  # A blank line for a status line.
        raise RelayError("not_a_relay", f"{where} does not speak HTTP; check --server-url")
    answer, body = (refused[1], refused[2]) if refused else (web_socket.getheaders() or {}, None)
    raise refusal(endpoint, int(status), answer, body if body is not None else _body(answer, shim))


def _body(headers: Mapping[str, str], shim: _HandshakeSocket) -> bytes:
    wanted = int(min(header_number(headers.get("content-length", "")) or 0, _MAX_ANSWER_BYTES // 2))
    body = b""
    with contextlib.suppress(OSError, RelayError):
        while len(body) < wanted:
            piece = shim.recv(wanted - len(body))
            if not piece:
                break
            body += piece
    return body


class Connection:
    """A leg that is up. `frame_sender` is what it sends."""

    def __init__(
        self,
        library: Any,
        sock: Any,
        begun: bytes,
        ping_interval_s: float,
        make_key: Callable[[], bytes] = _random_key,
    ) -> None:
        self.frame_sender = FrameSender(make_key)
        self._library = library
        self._duplex = DuplexSocket(sock)
        self._reader = FrameReader(self._duplex, begun, is_masked=False)
        self._frames = library.frame_buffer(None, True)
        # The library reads by this method alone; ours bounds a frame.
        self._frames.recv_strict = self._read_exactly
        self._messages = MessageReader(self._reader, self.frame_sender, self._read_odd)
        self._writer: threading.Thread | None = None
        self._keepalive = Keepalive(
            self.frame_sender, self._duplex, far_peer(sock), ping_interval_s
        )
        # When the timer aborts the leg. Any thread sets it; a float is read whole.
        self._abort_at = float("inf")
        # Why the leg was given up from here, if it was.
        self.gave_up: RelayError | None = None

    def start(self, name: str) -> None:
        """Start the writer thread; stop() joins it."""
        self.frame_sender.start(self._duplex)
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
            raise LegError("a frame is too long", CloseCode.TOO_BIG)
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
            self.frame_sender.run()
        except OSError:
            # The reader sees the same loss, and reports it.
            self.abort()

    # The timer.

    def tick(self, now: float, *, slept: bool) -> float:
        """Ping, or give a silent leg up; return when to be called again. Never waits."""
        if now >= self._abort_at:
            self.abort()
            self._abort_at = float("inf")
        try:
            due_at = self._keepalive.tick(now, slept=slept)
        except RelayError as exc:
            self.give_up(exc)
            due_at = now + 1.0
        return min(due_at, self._abort_at)

    def give_up(self, error: RelayError) -> None:
        """Abort the leg for a reason that this end alone knows."""
        if self.gave_up is None:
            self.gave_up = error
        self.abort()

    # The end.

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        """Send a close behind what is queued; a second later the timer aborts the leg.

        The caller MUST wake the timer.
        """
        payload = struct.pack("!H", code) + reason.encode("ascii", "replace")[:120]
        self._abort_at = min(self._abort_at, time.monotonic() + FLUSH_S)
        self.frame_sender.close(Frame(OP_CLOSE, b"", payload), flush=flush)

    def abort(self) -> None:
        """End the leg now: its reader and its writer wake."""
        self._duplex.abort()

    def stop(self) -> None:
        """End and join the writer, free the socket. The reader calls it, or has ended."""
        if self._writer is not None and self.frame_sender.is_closing:
            # The peer is to read the close, behind which the writer ends.
            self._writer.join(FLUSH_S)
        self.abort()
        self.frame_sender.stop()
        if self._writer is not None:
            self._writer.join()
        self._duplex.close()
