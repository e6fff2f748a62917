"""Decoders of byte streams: WebSocket frames at both ends, request heads, HTTP answers.

In one thread, on a socket that is played: what comes is the input, cut at odd places. As
in decoders.py each function raises where the product breaks its word.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from gunicorn.config import Config as GunicornConfig
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import TConn
from simple_websocket import Server as LibraryServer

import http_network_relay.dial.connect
from http_network_relay.dial.connection import Connection as ClientTransport
from http_network_relay.dial.connection import _HandshakeSocket, _upgrade, websocket_client
from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.wire.constants import (
    MAX_DATA_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_PONG,
    OP_TEXT,
    SUBPROTOCOL,
)
from http_network_relay.wire.controls import decode_text
from http_network_relay.wire.errors import LegError, RelayError
from server.access.credentials import Credentials
from server.app import build_app
from server.config import Config
from server.legs.websocket import SERVER_OPTIONS, Connection, prepare_upgrade
from server.relay import Relay
from server.worker.relay_worker import RelayWorker
from tests.fuzz.decoders import Decoder, check_sentence
from tests.fuzz.source import Source, bad_frame, frame
from tests.support.taking import UnsentFrames, drained

_MAX_MESSAGE_BYTES = MAX_DATA_BYTES + 4
_FAR = 2.0**40  # A deadline that never comes, on any clock.
_ENDPOINT = Endpoint(False, "relay.example", 80, "/ws_for_clients")


# Can be read at any time.
_READY = os.open(os.devnull, os.O_RDONLY)


class PlayedSocket:
    """A socket whose peer has said all that it says; what we write is kept."""

    family = socket.AF_UNIX

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces[::-1]
        self.sent = b""

    def fileno(self) -> int:
        return _READY

    def recv(self, size: int) -> bytes:
        if not self._pieces:
            return b""
        piece = self._pieces.pop()
        if len(piece) > size:
            self._pieces.append(piece[size:])
        return piece[:size]

    def recv_into(self, view: memoryview) -> int:
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def sendall(self, data: Any) -> None:
        self.sent += bytes(data)

    def send(self, data: Any) -> int:
        self.sent += bytes(data)
        return len(data)

    def settimeout(self, _: float | None) -> None:
        pass

    def close(self) -> None:
        pass


def _pieces(source: Source, data: bytes) -> list[bytes]:
    """Cut a stream in a few places, as networks do."""
    cuts = sorted(source.number(len(data) + 1) for _ in range(source.number(4)))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a != b]


class Stream:
    """A stream of frames, and the messages that a right reader finds before a wrong one."""

    def __init__(self, source: Source, *, masked: bool) -> None:
        self.data = b""
        self.messages: list[tuple[int, bytes]] = []
        # Whether all of it is right: then a reader finds just these.
        self.is_right = True
        cut_at = source.number(256)
        while not source.is_empty and len(self.data) < 300_000:
            if source.is_rare(12):
                self.is_right = False
                self.data += bad_frame(source, masked=masked)
            elif source.is_rare(2):
                payload = source.text(source.number(200)).encode("utf-8", "replace")
                self._add(source, OP_TEXT, payload, masked=masked)
            else:
                size = source.pick((0, 1, 125, 126, 127, 65535, 65536, 65540))
                self._add(source, OP_BINARY, source.take(size % 256).ljust(size), masked=masked)
        self.pieces = _pieces(Source(bytes([cut_at % 4, cut_at, cut_at, 7, 7])), self.data)

    def _add(self, source: Source, opcode: int, payload: bytes, *, masked: bool) -> None:
        self.data += frame(source, opcode, payload, masked=masked)
        if self.is_right:
            self.messages.append((opcode, payload))

    def check(self, came: list[tuple[int, bytes]]) -> None:
        """Whether a reader has found what there is."""
        assert all(len(payload) <= _MAX_MESSAGE_BYTES for _, payload in came)
        assert came[: len(self.messages)] == self.messages, "messages were lost or changed"
        if self.is_right:
            assert len(came) == len(self.messages), "messages were made up"


def fuzz_client_frames(data: bytes) -> None:
    """What the client and the proxy command read of a leg."""
    stream = Stream(Source(data), masked=False)
    transport = ClientTransport(websocket_client(), PlayedSocket(stream.pieces), b"", 20.0)
    came: list[tuple[int, bytes]] = []
    try:
        while (message := transport.receive())[0] != OP_CLOSE:
            came.append(message)
    except LegError as exc:
        assert not stream.is_right, exc
        assert exc.close_code in (1002, 1007, 1009)
    else:
        assert isinstance(message[1], int)
        assert stream.is_right <= (message[1] == 1006)
    stream.check(came)
    assert all(opcode in (OP_TEXT, OP_BINARY) for opcode, _ in came)
    assert len(list(drained(transport.frame_sender))) <= 1, "more than one pong waits"


_UPGRADE_ENVIRON = {
    "HTTP_HOST": "relay.example",
    "HTTP_UPGRADE": "websocket",
    "HTTP_CONNECTION": "Upgrade",
    "HTTP_SEC_WEBSOCKET_KEY": "dGhlIHNhbXBsZSBub25jZQ==",
    "HTTP_SEC_WEBSOCKET_VERSION": "13",
    "HTTP_SEC_WEBSOCKET_PROTOCOL": SUBPROTOCOL,
}


def fuzz_server_frames(data: bytes) -> None:
    """What the server reads of a leg."""
    stream = Stream(Source(data), masked=True)
    sock = PlayedSocket(stream.pieces)
    environ: dict[str, Any] = {**_UPGRADE_ENVIRON, "gunicorn.socket": sock}
    handshake_socket = prepare_upgrade(environ)
    library = LibraryServer(environ, **SERVER_OPTIONS)
    assert sock.sent.startswith(b"HTTP/1.1 101 ")
    sock.sent = b""
    came: list[tuple[int, bytes]] = []

    frame_sender = UnsentFrames()
    connection = Connection(handshake_socket)
    connection.start(library, frame_sender)
    try:
        while (message := connection.receive())[0] != OP_CLOSE:
            came.append((message[0], bytes(message[1])))
            if message[0] == OP_TEXT:
                decode_text(message[1])
        end = message[1]
    except LegError as exc:
        assert exc.close_code in (1002, 1007, 1009)
        end = exc.close_code
    assert not sock.sent, "the reader wrote by itself"
    stream.check(came)
    assert not (stream.is_right and end != ABNORMAL_CLOSURE), end
    assert all(taken.opcode in (OP_PONG, OP_CLOSE) for taken in drained(frame_sender))


# HTTP.


class _Poller:
    """Takes the place of the worker's: calls back at once, as all has come already."""

    def register(self, sock: socket.socket, _events: int, callback: Any) -> None:
        callback(sock)

    def unregister(self, *_: Any) -> None:
        pass

    modify = unregister


class _Worker(RelayWorker):
    """A worker that serves in the thread which reads the head."""

    def __init__(self) -> None:
        config = GunicornConfig()
        config.set("threads", 4)
        # Not "-": its output is nobody's.
        config.set("errorlog", "/dev/null")
        super().__init__(0, 0, [], None, 30, config, Logger(config))
        self.poller = _Poller()
        self._heads = self.make_heads(Config())
        self.wsgi = build_app(_relay())
        self.served = 0

    def enqueue_req(self, conn: Any) -> None:
        self.served += 1
        self.handle(conn)

    def feed(self, data: bytes) -> bytes:
        """Give it a connection that says this and ends; return the answer."""
        ours, peer = socket.socketpair()
        with ours, peer:
            ours.setblocking(False)
            self.nr_conns += 1
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            conn = TConn(self.cfg, ours, ("127.0.0.1", 1), ("127.0.0.1", 2))
            self._heads.add(conn, None)
            if self._heads.drop_oldest():
                raise AssertionError("an ended connection is still waited for")
            ours.close()
            answer = b""
            # Closing on unread bytes resets the pair, after the answer.
            with contextlib.suppress(ConnectionResetError):
                while piece := peer.recv(65536):
                    answer += piece
        return answer


def _relay() -> Relay:
    """Return a relay that runs no thread and lets nobody in."""
    relay = Relay(Config(failed_logins=0, failed_logins_by_address=0), Credentials.plain({}, []))
    relay._is_started = True
    return relay


_worker: list[_Worker] = []
_STATUS = (b"200 ", b"400 ", b"401 ", b"404 ", b"405 ", b"426 ", b"431 ")


def fuzz_heads(data: bytes) -> None:
    """Request heads: the worker's own collection of them, gunicorn's parser, the application."""
    if not _worker:
        _worker.append(_Worker())
    worker = _worker[0]
    served = worker.served
    answer = worker.feed(data[:60_000])
    assert not worker._heads.drop_oldest()
    if worker.served > served and answer:
        assert answer.startswith(b"HTTP/1."), answer[:80]
        assert answer[9:13] in _STATUS, answer[:200]
        assert b"network-relay: v1\r\n" in answer.lower(), answer[:200]
    elif answer:
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:80]


class _AnsweringSocket(PlayedSocket):
    """A server that has said its answer before it was asked, but for what it must compute."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__(pieces)
        self.is_computed = False

    def recv(self, size: int) -> bytes:
        if not self.is_computed:
            self.is_computed = True
            key = self.sent.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
            guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key + guid).digest())
            self._pieces = [piece.replace(b"{ACCEPT}", accept) for piece in self._pieces]
        return super().recv(size)


def fuzz_answers(data: bytes) -> None:
    """What a server, or something in between, answers to the WebSocket handshake."""
    sock = _AnsweringSocket([data[at : at + 1000] for at in range(0, len(data), 1000)])
    shim = _HandshakeSocket(sock, Deadline(_FAR))  # type: ignore[arg-type]
    try:
        _upgrade(websocket_client(), _ENDPOINT, ["Authorization: Basic hush"], shim)
    except RelayError as exc:
        check_sentence(exc)
        assert exc.retry_after_s is None or 0 <= exc.retry_after_s <= 300
        assert "hush" not in str(exc)
    else:
        assert data.split()[1:2] == [b"101"], "upgraded without a 101"


def fuzz_proxies(data: bytes) -> None:
    """What an HTTP proxy answers to CONNECT."""
    ours, peer = socket.socketpair()
    with ours, peer:
        data = data[:50_000]  # What the pair takes without a reader.
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        proxy = http_network_relay.dial.http_proxy.Proxy("proxy.example", 3128, "Basic hush")
        try:
            far = Deadline(_FAR)
            http_network_relay.dial.http_proxy.connect_through(ours, proxy, _ENDPOINT, far)
        except RelayError as exc:
            check_sentence(exc)
            assert exc.code == "proxy_failed"
            assert "hush" not in str(exc)
            return
        head, end, after = data.partition(b"\r\n\r\n")
        assert end
        assert head.startswith(b"HTTP/1.")
        rest = b"".join(iter(lambda: ours.recv(65536), b""))
        assert rest == after, "bytes behind the proxy's answer were lost"


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Let the product's logs go nowhere: what may not be logged is for whole legs to see."""
    loggers = [logging.getLogger(name) for name in ("http_network_relay", "gunicorn", "websocket")]
    before = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


SEEDS: dict[str, list[bytes]] = {
    "client_frames": [bytes(range(256)) * 2, b"\0\0\0\1" * 20, bytes(range(255, 0, -1)) * 3],
    "server_frames": [bytes(range(256)) * 2, b"\0\0\0\1" * 20, bytes(range(255, 0, -1)) * 3],
    "heads": [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /nothing HTTP/1.0\r\nContent-Length: 5\r\n\r\nabcde",
        b"GET /ws_for_clients HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: http-network-relay.v1\r\nAuthorization: Basic bGFiLTE6eA==\r\n"
        b"X-Forwarded-For: 1.2.3.4, ::1\r\nHTTP-Network-Relay-Instance: 0\r\n\r\n",
        b"GET /ws_for_ssh_proxy_command HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: http-network-relay.v2\r\n"
        b"Authorization: Bearer x\r\n\r\n",
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 17_000,
    ],
    "answers": [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: {ACCEPT}\r\nSec-WebSocket-Protocol: http-network-relay.v1\r\n"
        b"HTTP-Network-Relay: v1\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nHTTP-Network-Relay: v1\r\nRetry-After: 5\r\nContent-Length: 33\r\n"
        b'\r\n{"code":"busy","message":"later"}',
        b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/\r\nServer: nginx\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nServer: nginx\r\nSet-Cookie: a=b\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 101 Go\r\nSet-Cookie: a[=b; Domain=x\r\n\r\n",
        b"HTTP/1.1 101 Go\r\nno colon\r\n\r\n",
    ],
    "proxies": [
        b"HTTP/1.1 200 Connection established\r\n\r\nbehind",
        b"HTTP/1.0 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
        b"HTTP/1.1 \r\n\r\n",
    ],
}
DECODERS: dict[str, Decoder] = {
    "client_frames": fuzz_client_frames,
    "server_frames": fuzz_server_frames,
    "heads": fuzz_heads,
    "answers": fuzz_answers,
    "proxies": fuzz_proxies,
}
