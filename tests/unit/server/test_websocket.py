"""What the transport leans on in simple-websocket and wsproto."""

import os
import socket
from typing import Any

import pytest
from simple_websocket import ConnectionClosed
from simple_websocket import Server as LibraryServer
from wsproto.frame_protocol import FrameDecoder

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_PONG, OP_TEXT
from http_network_relay.wire.errors import LegError
from server.legs.websocket import (
    SERVER_OPTIONS,
    Connection,
    HandshakeSocket,
    close_frame,
    prepare_upgrade,
)
from tests.support.raw import encode_frame
from tests.support.taking import UnsentFrames, take, take_now

ENVIRON = {
    "HTTP_HOST": "relay",
    "HTTP_UPGRADE": "websocket",
    "HTTP_CONNECTION": "Upgrade",
    "HTTP_SEC_WEBSOCKET_KEY": "AAAAAAAAAAAAAAAAAAAAAA==",
    "HTTP_SEC_WEBSOCKET_VERSION": "13",
    "HTTP_SEC_WEBSOCKET_PROTOCOL": "http-network-relay.v1",
    "HTTP_SEC_WEBSOCKET_EXTENSIONS": "permessage-deflate",
    "HTTP_AUTHORIZATION": "Bearer hush",
}


class Upgraded:
    """The library's server end on a socket pair, as app.py sets it up."""

    def __init__(self, **headers: str) -> None:
        ours, self.peer = socket.socketpair()
        self._ours = ours
        environ: dict[str, Any] = {**ENVIRON, **headers, "gunicorn.socket": ours}
        self.sock = prepare_upgrade(environ)
        self.library = LibraryServer(environ, **SERVER_OPTIONS)
        self.transport = Connection(self.sock)
        self.frame_sender = UnsentFrames()
        self.transport.start(self.library, self.frame_sender)
        self.answer = self.peer.recv(65536)

    def read(self, *sent: bytes, end: bool = True) -> int:
        """All messages that come of `sent`; returns the close code."""
        for data in sent:
            self.peer.sendall(data)
        if end:
            self.peer.shutdown(socket.SHUT_WR)
        self.messages: list[tuple[int, bytes]] = []
        while (message := self.transport.receive())[0] != OP_CLOSE:
            self.messages.append((message[0], bytes(message[1])))
        return int(message[1])

    def close(self) -> None:
        self._ours.close()
        self.peer.close()


@pytest.fixture
def up() -> Any:
    """An upgraded pair."""
    made = Upgraded()
    yield made
    made.close()


def test_upgrade_has_our_header_and_no_extension(up: Upgraded) -> None:
    """The library would agree to permessage-deflate, and cannot add a header by itself."""
    assert up.answer.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nHTTP-Network-Relay: v1\r\n" in up.answer
    assert b"permessage" not in up.answer.lower()
    assert up.answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("asked", "agrees"),
    [(None, False), ("zero", True), ("", False), ("random", False), ("zero,zero", False)],
)
def test_upgrade_agrees_to_a_zero_mask_when_it_is_asked_for(
    asked: str | None, agrees: bool
) -> None:
    """In the 101, once; and never unasked."""
    made = Upgraded(**({} if asked is None else {"HTTP_HTTP_NETWORK_RELAY_MASK": asked}))
    try:
        line = b"\r\nHTTP-Network-Relay-Mask: zero\r\n"
        assert made.answer.count(line) == agrees
        assert (b"Mask" in made.answer) == agrees
        assert made.answer.endswith(b"\r\n\r\n")
        assert made.answer.count(b"\r\n\r\n") == 1
    finally:
        made.close()


def test_message_is_taken_with_any_key(up: Upgraded) -> None:
    """Zero is one of them, agreed to or not; fragments and pings too."""
    zero = b"\x82\x84\0\0\0\0data" + b"\x81\x82\0\0\0\0{}"
    zero += b"\x02\x81\0\0\0\0a\x89\x81\0\0\0\0p\x80\x81\0\0\0\0b"
    up.read(zero + encode_frame(2, b"behind"))
    assert up.messages == [
        (OP_BINARY, b"data"),
        (OP_TEXT, b"{}"),
        (OP_BINARY, b"ab"),
        (OP_BINARY, b"behind"),
    ]
    assert take(up.frame_sender) == (OP_PONG, b"", b"p")


def test_messages_come_out_in_order_and_the_librarys_thread_never_runs(up: Upgraded) -> None:
    """In the reader's own thread, and no list of them grows."""
    frames = encode_frame(1, b"{}") + encode_frame(2, b"data") + encode_frame(2, bytes(65540))
    assert up.read(frames) == ABNORMAL_CLOSURE
    assert up.messages == [(OP_TEXT, b"{}"), (OP_BINARY, b"data"), (OP_BINARY, bytes(65540))]
    assert up.library.thread.name == "unused"
    assert up.library.input_buffer == []


def test_pongs_and_close_replies_go_through_the_outbox(up: Upgraded) -> None:
    """The library writes nothing by itself; of many pongs the newest is enough."""
    pings = b"".join(encode_frame(9, b"%d" % number) for number in range(1000))
    assert up.read(pings + encode_frame(8, b"\x03\xe8bye")) == 1000
    frame = take(up.frame_sender)
    assert frame is not None
    # A close that is not flushed: the pong before it gives way.
    assert (frame.opcode, frame.payload[:2]) == (OP_CLOSE, b"\x03\xe8")
    assert take(up.frame_sender) is None
    up.peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        up.peer.recv(1)


def test_pong_waits_in_its_slot_when_the_leg_goes_on(up: Upgraded) -> None:
    """With the payload of the ping."""
    up.read(encode_frame(9, b"one") + encode_frame(9, b"two"))
    frame = take(up.frame_sender)
    assert frame == (OP_PONG, b"", b"two")


@pytest.mark.parametrize("reason", [b"", b"bye"])
@pytest.mark.parametrize("code", [1000, 1001, 1012, 4000])
def test_close_of_the_peer_is_answered_with_its_code(
    up: Upgraded, code: int, reason: bytes
) -> None:
    """And without prose."""
    assert up.read(encode_frame(8, code.to_bytes(2, "big") + reason)) == code
    assert take(up.frame_sender) == close_frame(code)


def test_close_without_a_code_is_answered_without_one(up: Upgraded) -> None:
    """RFC 6455, 7.1.5: it counts as 1005, which stands in no frame."""
    assert up.read(encode_frame(8, b"")) == 1005
    assert take(up.frame_sender) == Frame(OP_CLOSE, b"", b"")


def in_pieces(opcode: int, payload: bytes, size: int) -> bytes:
    """One message in fragments of `size` bytes."""
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    return b"".join(
        encode_frame(0 if at else opcode, piece, fin=at == len(pieces) - 1)
        for at, piece in enumerate(pieces)
    )


@pytest.mark.parametrize("size", [1, 3, 40_000])
def test_message_in_fragments_is_put_together(up: Upgraded, size: int) -> None:
    """Whatever its characters, and what is behind it keeps its place."""
    text = "\N{SNOWMAN}{}\N{GREEK SMALL LETTER OMEGA}".encode() * 100
    data = os.urandom(65_540) if size > 100 else os.urandom(500)
    frames = in_pieces(1, text, size) + in_pieces(2, data, size) + encode_frame(2, b"behind")
    assert up.read(frames + encode_frame(8, b"\x03\xe8")) == 1000
    assert up.messages == [(OP_TEXT, text), (OP_BINARY, data), (OP_BINARY, b"behind")]


@pytest.mark.parametrize(
    ("sent", "close_code"),
    [
        (encode_frame(2, bytes(65541)), 1009),
        (b"\x82\xff" + b"\0\0\0\1\0\0\0\0" + bytes(90_000), 1009),
        (encode_frame(2, b"x", mask=False), 1002),
        (encode_frame(0, b"x"), 1002),
        (encode_frame(2, b"x", fin=False) + encode_frame(2, b"x"), 1002),
        (encode_frame(2, b"x", fin=False) + encode_frame(9, bytes(126)), 1002),
        (encode_frame(3, b"x"), 1002),
        (encode_frame(9, bytes(126)), 1002),
        (encode_frame(8, b"\x03"), 1002),
        (encode_frame(8, b"\x03\xee"), 1002),
        (encode_frame(8, b"\x03\xe8\xff"), 1007),
        (encode_frame(1, b"\xff", fin=False), 1007),
        (encode_frame(2, bytes(40_000), fin=False) + encode_frame(0, bytes(40_000)), 1009),
        (encode_frame(1, b"x" * 40_000, fin=False) + encode_frame(0, b"x" * 40_000), 1009),
        (in_pieces(2, bytes(65541), 1000), 1009),
    ],
)
def test_frame_that_is_wrong_is_a_leg_error(up: Upgraded, sent: bytes, close_code: int) -> None:
    """With the close code; nothing is answered here."""
    with pytest.raises(LegError) as caught:
        up.read(sent, end=False)
    assert caught.value.close_code == close_code
    assert int(caught.value.close_code).to_bytes(2, "big") == close_code.to_bytes(2, "big")
    assert take_now(up.frame_sender) is None


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 65540])
def test_frame_written_by_hand_is_what_wsproto_reads(up: Upgraded, size: int) -> None:
    """Header sizes at their bounds; head and payload in two parts."""
    payload = os.urandom(size)
    frame_sender = FrameSender()
    frame_sender.put_first(1, Frame(2, payload[:4], memoryview(payload)[4:]))
    frame_sender.close(close_frame(1012))
    up.transport.start(up.library, frame_sender)
    assert frame_sender.push_all()
    decoder = FrameDecoder(client=True)
    while data := up.peer.recv(1 << 20):
        decoder.receive_bytes(data)
    frame = decoder.process_buffer()
    assert frame is not None
    assert bytes(frame.payload) == payload  # type: ignore[arg-type]
    assert frame.frame_finished
    last = decoder.process_buffer()
    assert last is not None
    assert bytes(last.payload) == b"\x03\xf4"  # type: ignore[arg-type]


def test_library_sees_no_secret_and_closes_nothing(up: Upgraded) -> None:
    """It has no way to the descriptor, and flask-sock's close() writes nothing behind our end."""
    assert "HTTP_AUTHORIZATION" not in up.library.environ
    assert isinstance(up.library.sock, HandshakeSocket)
    assert not hasattr(up.library.sock, "close")
    up.transport.stop()
    with pytest.raises(ConnectionClosed):
        up.library.close()
    assert up.peer.recv(1) == b""
