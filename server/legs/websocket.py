"""One WebSocket of the server, over simple-websocket. The only file that knows it.

The library does the handshake and the unusual frames; three things are ours:

- its reader thread is a class that does nothing: the handler's thread runs the library's
  loop itself, and messages are dispatched as they come, so no list of them can grow;
- it gets LegSocket instead of the socket: whole messages are taken off the stream before it
  sees them, and what it wants to write (pongs, close frames) goes through the outbox;
- our own frames are written by hand (framing.py, outlet.py).

Threads: the handler (prepare, read), the leg's writer (write), any (push, abort).
"""

from __future__ import annotations

import contextlib
import enum
import socket
from collections.abc import Callable
from typing import Any

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import (
    MASK_HEADER,
    MASK_ZERO,
    MAX_MESSAGE_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_PING,
    OP_PONG,
    OP_TEXT,
    RELAY_HEADER,
    RELAY_HEADER_VALUE,
    SUBPROTOCOL,
)
from http_network_relay.wire.controls import decode_text

# What the library reads at once, and what is dropped at once after the end.
_RECEIVE_BYTES = 16 * 1024
# What the kernel may hold unsent: more only delays the keystroke that comes behind it.
_UNSENT_BYTES = 128 * 1024


# A binary message, or a text.
Message = bytes | bytearray | memoryview | str


class _NoThread:
    """Takes the place of the library's reader thread; the handler runs its loop."""

    name = "unused"

    def __init__(self, target: Callable[[], None]) -> None:
        del target

    def start(self) -> None:
        """Do nothing."""


class _NoEvent:
    """Nobody waits in the library's receive(), so nobody needs to be woken."""

    def set(self) -> None:
        """Do nothing."""


# For flask-sock, which passes them to simple-websocket.
SERVER_OPTIONS: dict[str, Any] = {
    "subprotocols": [SUBPROTOCOL],
    "receive_bytes": _RECEIVE_BYTES,
    "max_message_size": MAX_MESSAGE_BYTES,
    "thread_class": _NoThread,
    "event_class": _NoEvent,
}


class ReadEnd(enum.Enum):
    """Why reading has ended."""

    LOST = "lost"  # the stream ended or failed: nobody is there
    CLOSED = "closed"  # the peer sent a close frame, and nothing comes after it
    BROKEN = "broken"  # the library refused what came, and queued a close frame


class LegSocket:
    """What the library takes for a socket: it reads what is not ours, writes are diverted."""

    def __init__(self, sock: socket.socket, *, agrees_to_zero: bool) -> None:
        self._sock = sock
        self.duplex = DuplexSocket(sock)
        self._frames = FrameReader(self.duplex, is_masked=True)
        self._agrees_to_zero = agrees_to_zero
        self.is_lost = False
        # Set when the upgrade is done; the reader's thread alone uses them.
        self.outbox: FrameSender | None = None
        self.on_message: Callable[[Message], None] = _nobody

    def recv(self, size: int) -> bytes:
        """As socket.recv, but whole messages are dispatched here."""
        try:
            while (message := self._frames.read_message()) is not None:
                self._dispatch(*message)
            data_for_library = self._frames.read(size)
        except OSError:
            self.is_lost = True
            raise
        self.is_lost = not data_for_library
        return data_for_library

    def _dispatch(self, opcode: int, data: Any) -> None:
        if opcode == OP_BINARY:
            self.on_message(data)
        elif opcode == OP_TEXT:
            self.on_message(decode_text(data))
        elif opcode == OP_PING:
            self._put_pong(Frame(OP_PONG, b"", data))

    def _put_pong(self, frame: Frame) -> None:
        if self.outbox is not None:
            self.outbox.put_leg("pong", frame)
            self.outbox.push()

    def send(self, data: bytes) -> int:
        """Send the handshake's answer; later queue what the library wants to write."""
        if self.outbox is None:
            # The library cannot add headers to its 101.
            marks = f"\r\n{RELAY_HEADER}: {RELAY_HEADER_VALUE}\r\n"
            marks += f"{MASK_HEADER}: {MASK_ZERO}\r\n" if self._agrees_to_zero else ""
            answer = bytes(data).replace(b"\r\n\r\n", f"{marks}\r\n".encode(), 1)
            try:
                self.duplex.send(memoryview(answer))
            except OSError:
                # Gone before it was answered: a lost leg as any other, which the reader finds.
                self.duplex.abort()
        else:
            for frame in _control_frames(bytes(data)):
                if frame.opcode == OP_CLOSE:
                    self.outbox.close(frame, flush=False)
                elif frame.opcode == OP_PONG:
                    self._put_pong(frame)
        return len(data)

    def close(self) -> None:
        """Nothing: gunicorn owns the descriptor, and the writer may be inside it."""

    def finish_sending(self) -> None:
        """Tell the peer that nothing follows; reading goes on."""
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown(): it takes the object away under the reader.
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def tune(self) -> None:
        """Set what a leg wants of TCP; a Unix socket has none of it."""
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                lowat = socket.TCP_NOTSENT_LOWAT
                self._sock.setsockopt(socket.IPPROTO_TCP, lowat, _UNSENT_BYTES)


def _nobody(_: Message) -> None:
    raise ValueError("a message before read()")


def _control_frames(data: bytes) -> list[Frame]:
    """Take apart what the library serialized: whole unmasked control frames."""
    frames = []
    while data:
        size = data[1]  # At most 125 in a control frame (RFC 6455, 5.5).
        frames.append(Frame(data[0] & 0x0F, b"", data[2 : 2 + size]))
        data = data[2 + size :]
    return frames


class _Dispatch:
    """Takes the place of the library's list of received messages."""

    def __init__(self, on_message: Callable[[Message], None]) -> None:
        # Messages in fragments, which come from some proxies.
        self.append = on_message


def prepare_upgrade(environ: dict[str, Any]) -> LegSocket:
    """Leave the library only what it may see: our socket and the handshake's headers.

    Extensions are dropped because it would agree to permessage-deflate; the others
    because it has no use for secrets.
    """
    asked = environ.get("HTTP_" + MASK_HEADER.upper().replace("-", "_"))
    for name in [name for name in environ if name.startswith("HTTP_")]:
        if name not in _HANDSHAKE_HEADERS:
            del environ[name]
    sock = LegSocket(environ["gunicorn.socket"], agrees_to_zero=asked == MASK_ZERO)
    environ["gunicorn.socket"] = sock
    return sock


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


class Connection:
    """One WebSocket, from before its upgrade."""

    def __init__(self, sock: LegSocket) -> None:
        self._sock = sock
        sock.tune()

    @property
    def heard_at(self) -> float:
        """When any byte last came, monotonic."""
        return self._sock.duplex.heard_at

    def read(
        self, websocket: Any, on_message: Callable[[Message], None], outbox: FrameSender
    ) -> ReadEnd:
        """Run the loop of the library's `websocket`: call `on_message` for each message.

        What `on_message` raises comes out here, but for OSError. Pongs and close
        replies go to `outbox`.
        """
        self._sock.outbox, self._sock.on_message = outbox, on_message
        websocket.input_buffer = _Dispatch(on_message)
        websocket._thread()
        if self._sock.is_lost:
            return ReadEnd.LOST
        # The library is through with both closes only if the peer's came first.
        return ReadEnd.CLOSED if websocket.ws.state.name == "CLOSED" else ReadEnd.BROKEN

    def discard_input(self) -> None:
        """Read and drop until the stream ends or abort() is called.

        Closing with bytes unread would reset the connection, and the peer would lose
        our close frame.
        """
        with contextlib.suppress(OSError):
            while self._sock.duplex.recv(_RECEIVE_BYTES):
                pass

    def start_sending(self, outbox: FrameSender) -> None:
        """Let `outbox` send on this connection."""
        outbox.start(self._sock.duplex)

    def finish_sending(self) -> None:
        """End our direction, after the close frame."""
        self._sock.finish_sending()

    def abort(self) -> None:
        """Wake reader and writer for good."""
        self._sock.duplex.abort()


def close_frame(code: int) -> Frame:
    """Return a close frame without prose: the code says it all."""
    return Frame(OP_CLOSE, b"", code.to_bytes(2, "big"))
