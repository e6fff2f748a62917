"""Fake servers and legs: plain sockets in a thread, with frames written byte by byte."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.wire.constants import (
    MAX_DATA_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_PING,
    OP_PONG,
    OP_TEXT,
)
from http_network_relay.wire.controls import encode_channel
from tests.support.controls import encode

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
SUBPROTOCOL = "http-network-relay.v1"


class Visitor:
    """One accepted connection; the socket's timeout ends every wait."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(5.0)
        self.sock = sock
        self.head = b""
        self.rest = b""

    def read_head(self) -> str:
        """Read to the blank line; what came behind it is in `rest`."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self.sock.recv(4096)
            if not piece:
                raise ConnectionError("no head")
            data += piece
        self.head, _, self.rest = data.partition(b"\r\n\r\n")
        return self.head.decode("latin-1")

    def header(self, name: str) -> str:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        raise KeyError(name)

    def upgrade(self, *more: bytes, **headers: str | None) -> None:
        """Read a request, answer 101, with `more` in the same segment."""
        self.read_head()
        key = self.header("Sec-WebSocket-Key").encode()
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
        answer: dict[str, str | None] = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Accept": accept,
            "Sec-WebSocket-Protocol": SUBPROTOCOL,
            "HTTP-Network-Relay": "v1",
        }
        answer.update({name.replace("_", "-"): value for name, value in headers.items()})
        lines = [f"{name}: {value}" for name, value in answer.items() if value is not None]
        head = "\r\n".join(["HTTP/1.1 101 Switching Protocols", *lines, "", ""]).encode()
        self.sock.sendall(head + b"".join(more))

    def answer(self, status: str, body: bytes = b"", **headers: str) -> None:
        """Answer a request that was read with this status."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def read_frame(self) -> tuple[int, bytes]:
        """The next frame of a client: opcode and payload, its mask off. It must be masked."""
        head = self._exactly(2)
        assert head[1] & 0x80, "a client's frame must be masked"
        assert head[0] & 0xF0 == 0x80, f"not a whole frame without extension: {head[0]:#x}"
        size = head[1] & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self._exactly(2))
            assert size > 125
        elif size == 127:
            (size,) = struct.unpack("!Q", self._exactly(8))
            assert size > 65535
        key = self._exactly(4)
        data = self._exactly(size)
        whole = int.from_bytes(data, "big") ^ int.from_bytes((key * (size // 4 + 1))[:size], "big")
        return head[0] & 0xF, whole.to_bytes(size, "big")

    def _exactly(self, size: int) -> bytes:
        data = bytearray(self.rest[:size])
        self.rest = self.rest[size:]
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise ConnectionError("the end")
            data += piece
        return bytes(data)

    def wait_gone(self) -> None:
        """Read until the other side has ended."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """A server's frame: without a mask."""
    first = (fin << 7) | (rsv << 4) | opcode
    if len(payload) < 126:
        return struct.pack("!BB", first, len(payload)) + payload
    if len(payload) < 65536:
        return struct.pack("!BBH", first, 126, len(payload)) + payload
    return struct.pack("!BBQ", first, 127, len(payload)) + payload


class HandServer:
    """Accepts one connection after the other and plays `serve` with each, in its own thread."""

    def __init__(self, serve: Callable[[Visitor], None], wrap: Any = None) -> None:
        self._serve = serve
        self._wrap = wrap
        self.errors: list[BaseException] = []
        # Guards heads; notified at each.
        self._changed = threading.Condition()
        self.visitors: list[Visitor] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name=f"hand:{self.port}")
        self._acceptor.start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self._wrap is not None, "127.0.0.1", self.port, "/ws_for_clients")

    def visitor(self, index: int = 0, timeout_s: float = 5.0) -> Visitor:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.visitors) > index, timeout_s)
            return self.visitors[index]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._play, args=(sock,), name="hand:visitor")
            self._threads.append(thread)
            thread.start()

    def _play(self, sock: socket.socket) -> None:
        sock.settimeout(5.0)
        visitor = Visitor(sock)
        with self._changed:
            self.visitors.append(visitor)
            self._changed.notify_all()
        try:
            if self._wrap is not None:
                visitor.sock = self._wrap(sock)
                visitor.sock.settimeout(5.0)
            self._serve(visitor)
        except OSError:
            pass  # The other side may close at any time.
        except BaseException as exc:
            self.errors.append(exc)
        finally:
            visitor.sock.close()

    def stop_listening(self) -> None:
        """Let the kernel refuse new connections; open ones stay."""
        # Linux: shutdown() wakes the thread in accept(); close() alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.stop_listening()
        self._acceptor.join()
        self._listener.close()
        for visitor in self.visitors:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(visitor.sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextmanager
def hand_server(serve: Callable[[Visitor], None], wrap: Any = None) -> Iterator[HandServer]:
    """A HandServer; a failure in its thread fails the test."""
    server = HandServer(serve, wrap)
    try:
        yield server
    finally:
        server.stop()
    if server.errors:
        raise server.errors[0]


def stay(visitor: Visitor) -> None:
    """Accept, and then send nothing."""
    visitor.wait_gone()


class PlayedLeg:
    """The server's end of a leg, in the test's own thread. The socket's timeout ends every wait."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.controls: list[dict[str, Any]] = []
        # By channel; 0 on a user leg.
        self.data: dict[int, bytearray] = {}
        self.close_code: int | None = None

    def say(self, kind: str, channel: int = 0, **fields: Any) -> None:
        self.visitor.sock.sendall(frame(OP_TEXT, encode(kind, channel, **fields)))

    def send(self, data: bytes, channel: int = 0) -> None:
        head = encode_channel(channel) if channel else b""
        for start in range(0, len(data), MAX_DATA_BYTES):
            piece = head + data[start : start + MAX_DATA_BYTES]
            self.visitor.sock.sendall(frame(OP_BINARY, piece))

    def read(self) -> None:
        """Receive one message."""
        opcode, payload = self.visitor.read_frame()
        if opcode == OP_TEXT:
            self.controls.append(json.loads(payload))
        elif opcode == OP_BINARY:
            split = 4 if self.is_clients else 0
            channel = int.from_bytes(payload[:split], "big")
            self.data.setdefault(channel, bytearray()).extend(payload[split:])
        elif opcode == OP_PING:
            self.visitor.sock.sendall(frame(OP_PONG, payload))
        elif opcode == OP_CLOSE:
            self.close_code = int.from_bytes(payload[:2], "big")

    @property
    def is_clients(self) -> bool:
        return b"/ws_for_clients" in self.visitor.head.split(b"\r\n")[0]

    def until(self, predicate: Callable[[], Any]) -> Any:
        """Read until the predicate's value is true, and return the value."""
        while not (value := predicate()):
            self.read()
        return value

    def control(self, kind: str, channel: int = 0) -> dict[str, Any]:
        """Read until the first control of this kind (on this channel) has come."""
        found: dict[str, Any] = self.until(
            lambda: next(
                (
                    control
                    for control in self.controls
                    if control["type"] == kind and control.get("channel", 0) == channel
                ),
                None,
            )
        )
        return found

    def wait_bytes(self, count: int, channel: int = 0) -> bytes:
        self.until(lambda: len(self.data.get(channel, b"")) >= count)
        return bytes(self.data.get(channel, b""))

    def wait_close(self) -> int:
        code: int = self.until(lambda: self.close_code)
        return code

    def cut(self, *, rst: bool = False) -> None:
        """End the connection without a close; `rst`: and without a FIN."""
        if rst:
            linger_0 = struct.pack("ii", 1, 0)
            self.visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0)
        else:
            with contextlib.suppress(OSError):
                self.visitor.sock.shutdown(socket.SHUT_RDWR)
        self.visitor.sock.close()

    def close(self, code: int) -> None:
        """End the leg as a server does: close frame, answer, end of the connection."""
        with contextlib.suppress(OSError):
            self.visitor.sock.sendall(frame(OP_CLOSE, struct.pack("!H", code)))
            self.wait_close()
        self.cut()


class PlayedServer:
    """Gives each new leg to the test, which plays the server; may refuse requests first."""

    def __init__(self) -> None:
        self._up: queue.SimpleQueue[PlayedLeg] = queue.SimpleQueue()
        self._over = threading.Event()
        # Answers of the next requests instead of a 101: status line, code, more headers.
        self.refusals: deque[tuple[str, str, dict[str, str]]] = deque()
        self.refused: list[str] = []
        self.hand = HandServer(self._serve)

    def __enter__(self) -> PlayedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.hand.stop()
        if self.hand.errors:
            raise self.hand.errors[0]

    @property
    def port(self) -> int:
        return self.hand.port

    def _serve(self, visitor: Visitor) -> None:
        try:
            refusal = self.refusals.popleft()
        except IndexError:  # A test may clear them at any time.
            refusal = None
        if refusal is not None:
            status, code, headers = refusal
            visitor.read_head()
            body = json.dumps({"code": code, "message": "because"}).encode()
            # Before the answer: after it, the next leg may be up.
            self.refused.append(code)
            visitor.answer(status, body, HTTP_Network_Relay="v1", **headers)
            return
        visitor.upgrade()
        self._up.put(PlayedLeg(visitor))
        self._over.wait(60.0)

    def leg(self, timeout_s: float = 10.0) -> PlayedLeg:
        """Wait for the next leg."""
        return self._up.get(timeout=timeout_s)

    def has_leg(self) -> bool:
        return not self._up.empty()
