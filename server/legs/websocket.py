"""One WebSocket of the server, over simple-websocket and wsproto. The only file that knows them.

simple-websocket makes the handshake. Its read loop is not used: the handler's thread takes whole
messages off the stream (FrameReader), and feeds all other frames to wsproto, which does no I/O.
Our own frames are made by FrameSender.

Threads: the handler (prepare_upgrade, start, receive, stop), any (abort).
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from wsproto import WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import NO_STATUS, MessageReader
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import (
    MASK_HEADER,
    MASK_ZERO,
    OP_BINARY,
    OP_CLOSE,
    OP_CONTINUATION,
    OP_PING,
    OP_PONG,
    OP_TEXT,
    RELAY_HEADER,
    RELAY_HEADER_VALUE,
    SUBPROTOCOL,
)
from http_network_relay.wire.errors import LegError

# Bytes of one read for wsproto, or of one read that is dropped after the end.
_RECEIVE_BYTES = 16 * 1024
# Bytes that the kernel may hold unsent: more would only delay the keystroke behind them.
_UNSENT_BYTES = 128 * 1024


class _Unused:
    """Takes the place of the library's reader thread, and of the event that would wake one."""

    name = "unused"

    def __init__(self, target: object = None) -> None:
        del target

    def start(self) -> None:
        """Do nothing."""

    def set(self) -> None:
        """Do nothing."""


# For flask-sock, which passes them to simple-websocket.
SERVER_OPTIONS: dict[str, Any] = {
    "subprotocols": [SUBPROTOCOL],
    "thread_class": _Unused,
    "event_class": _Unused,
}

_HANDSHAKE_HEADERS = frozenset(
    {
        "HTTP_HOST",
        "HTTP_UPGRADE",
        "HTTP_CONNECTION",
        "HTTP_SEC_WEBSOCKET_KEY",
        "HTTP_SEC_WEBSOCKET_VERSION",
        "HTTP_SEC_WEBSOCKET_PROTOCOL",
    }
)


class HandshakeSocket:
    """What the library gets as a socket: it writes the answer to the handshake, nothing else."""

    def __init__(self, sock: socket.socket, *, agrees_to_zero: bool) -> None:
        self.sock = sock
        self.duplex = DuplexSocket(sock)
        self._agrees_to_zero = agrees_to_zero

    def send(self, data: bytes) -> int:
        """Send the answer with our headers: the library cannot add any to its 101."""
        marks = f"\r\n{RELAY_HEADER}: {RELAY_HEADER_VALUE}\r\n"
        marks += f"{MASK_HEADER}: {MASK_ZERO}\r\n" if self._agrees_to_zero else ""
        answer = bytes(data).replace(b"\r\n\r\n", f"{marks}\r\n".encode(), 1)
        try:
            self.duplex.send(memoryview(answer))
        except OSError:
            # The peer has gone before its answer: a lost leg, which its reader finds.
            self.duplex.abort()
        return len(data)


def prepare_upgrade(environ: dict[str, Any]) -> HandshakeSocket:
    """Leave the library only what it may see: our socket and the handshake's headers.

    Extensions are dropped because the library would agree to permessage-deflate. The other
    headers are dropped because they hold secrets.
    """
    asked = environ.get("HTTP_" + MASK_HEADER.upper().replace("-", "_"))
    for name in [name for name in environ if name.startswith("HTTP_")]:
        if name not in _HANDSHAKE_HEADERS:
            del environ[name]
    sock = HandshakeSocket(environ["gunicorn.socket"], agrees_to_zero=asked == MASK_ZERO)
    environ["gunicorn.socket"] = sock
    return sock


class Connection:
    """One WebSocket, from before its upgrade."""

    def __init__(self, sock: HandshakeSocket) -> None:
        self._sock = sock.sock
        self._duplex = sock.duplex
        self._frames = FrameReader(self._duplex, is_masked=True)
        # From start() on.
        self._messages: MessageReader | None = None
        self._websocket: Any = None
        # Whether wsproto has begun a message.
        self._is_in_message = False
        self._tune()

    def _tune(self) -> None:
        """Set the socket options of TCP; a Unix socket has none."""
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                lowat = socket.TCP_NOTSENT_LOWAT
                self._sock.setsockopt(socket.IPPROTO_TCP, lowat, _UNSENT_BYTES)

    @property
    def heard_at(self) -> float:
        """When any byte last came, monotonic."""
        return self._duplex.heard_at

    def start(self, websocket: Any, frame_sender: FrameSender) -> None:
        """Send the frames of `frame_sender`. The caller MUST stop(). `websocket`: the library's."""
        self._websocket = websocket
        self._messages = MessageReader(self._frames, frame_sender, self._read_odd)
        frame_sender.start(self._duplex)

    # The reader.

    def receive(self) -> tuple[int, Any]:
        """As MessageReader.receive()."""
        if self._messages is None:
            raise ValueError("receive() before start()")
        return self._messages.receive()

    def _read_odd(self) -> tuple[int, Any, bool]:
        library: WSConnection = self._websocket.ws
        # First what wsproto has been fed already: behind a fragment all of the stream is.
        while (event := next(library.events(), None)) is None:
            data = self._frames.read(_RECEIVE_BYTES)
            if not data:
                raise EOFError
            library.receive_data(data)
        if isinstance(event, CloseConnection):
            if library.state is not ConnectionState.REMOTE_CLOSING:
                raise LegError(event.reason or "bad frame", event.code)
            code = b"" if event.code == NO_STATUS else event.code.to_bytes(2, "big")
            return OP_CLOSE, code, True
        if isinstance(event, TextMessage | BytesMessage):
            opcode = OP_TEXT if isinstance(event, TextMessage) else OP_BINARY
            payload = event.data.encode() if isinstance(event, TextMessage) else event.data
            is_first, self._is_in_message = not self._is_in_message, not event.message_finished
            return opcode if is_first else OP_CONTINUATION, payload, event.message_finished
        if isinstance(event, Ping):
            return OP_PING, event.payload, True
        return OP_PONG, b"", True

    def discard_input(self) -> None:
        """Read and drop until the stream ends or abort() is called.

        Closing with bytes unread would reset the connection, and the peer would lose
        our close frame.
        """
        with contextlib.suppress(OSError):
            while self._duplex.recv(_RECEIVE_BYTES):
                pass

    # For the sender thread.

    @property
    def wants_read(self) -> bool:
        """Whether OpenSSL has to read before it can write on."""
        return self._duplex.wants_read

    def fileno(self) -> int:
        """Return the number of the socket."""
        return self._sock.fileno()

    # The end.

    def abort(self) -> None:
        """End the leg now: its reader and whoever sends wake."""
        self._duplex.abort()

    def stop(self) -> None:
        """Say that the leg is over; gunicorn owns the descriptor, and closes it."""
        self.abort()
        # Else flask-sock writes a close frame behind our end.
        self._websocket.connected = False


def close_frame(code: int) -> Frame:
    """Return a close frame without a reason: the code alone reports the end."""
    return Frame(OP_CLOSE, b"", code.to_bytes(2, "big"))
