"""What the transport leans on in simple-websocket and wsproto."""

import os
import socket
from typing import Any

import pytest
from simple_websocket import Server as LibraryServer
from wsproto.frame_protocol import FrameDecoder

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import OP_CLOSE, OP_PONG
from http_network_relay.wire.errors import LegError
from server.legs.websocket import (
    SERVER_OPTIONS,
    Connection,
    LegSocket,
    ReadEnd,
    _control_frames,
    close_frame,
    prepare_upgrade,
)
from tests.support.raw import encode_frame
from tests.support.taking import take

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
        self.outbox = FrameSender()
        self.answer = self.peer.recv(65536)

    def read(self, *sent: bytes, on_message: Any = None, end: bool = True) -> ReadEnd:
        for data in sent:
            self.peer.sendall(data)
        if end:
            self.peer.shutdown(socket.SHUT_WR)
        self.messages: list[Any] = []
        return self.transport.read(self.library, on_message or self.messages.append, self.outbox)

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
    assert up.messages == [b"data", "{}", b"ab", b"behind"]
    assert take(up.outbox) == (OP_PONG, b"", b"p")


def test_messages_are_dispatched_as_they_come(up: Upgraded) -> None:
    """In the reader's own thread, text as str and data as bytes, and no list of them grows."""
    frames = encode_frame(1, b"{}") + encode_frame(2, b"data") + encode_frame(2, bytes(65540))
    assert up.read(frames) is ReadEnd.LOST
    assert up.messages == ["{}", b"data", bytes(65540)]
    assert up.library.thread.name == "unused"


def test_pongs_and_close_replies_go_through_the_outbox(up: Upgraded) -> None:
    """The library writes nothing by itself; of many pongs the newest is enough."""
    pings = b"".join(encode_frame(9, b"%d" % number) for number in range(1000))
    assert up.read(pings + encode_frame(8, b"\x03\xe8bye")) is ReadEnd.CLOSED
    frame = take(up.outbox)
    assert frame is not None
    # A close that is not flushed: the pong before it gives way.
    assert (frame.opcode, frame.payload[:2]) == (OP_CLOSE, b"\x03\xe8")
    assert take(up.outbox) is None
    up.peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        up.peer.recv(1)


def test_pong_waits_in_its_slot_when_the_leg_goes_on(up: Upgraded) -> None:
    """With the payload of the ping."""
    up.read(encode_frame(9, b"one") + encode_frame(9, b"two"))
    frame = take(up.outbox)
    assert frame == (OP_PONG, b"", b"two")


@pytest.mark.parametrize(
    ("sent", "close_code"),
    [
        (encode_frame(2, bytes(65541)), 1009),
        (encode_frame(2, b"x", mask=False), 1002),
        (encode_frame(2, bytes(40_000), fin=False) + encode_frame(0, bytes(40_000)), 1009),
    ],
)
def test_reading_ends_broken_when_a_frame_is_wrong(
    up: Upgraded, sent: bytes, close_code: int
) -> None:
    """With the close code that the library chose."""
    assert up.read(sent, end=False) is ReadEnd.BROKEN
    frame = take(up.outbox)
    assert frame is not None
    assert (frame.opcode, frame.payload[:2]) == (OP_CLOSE, close_code.to_bytes(2, "big"))


def test_text_that_is_not_utf8_is_a_leg_error(up: Upgraded) -> None:
    """Found before the library sees it."""
    with pytest.raises(LegError, match="UTF-8"):
        up.read(encode_frame(1, b"\xff"))


def test_error_of_the_dispatch_comes_out_of_read(up: Upgraded) -> None:
    """The library does not swallow it."""

    def refuse(_message: object) -> None:
        raise LegError("no")

    with pytest.raises(LegError):
        up.read(encode_frame(2, b"x"), on_message=refuse)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 65540])
def test_frame_written_by_hand_is_what_wsproto_reads(up: Upgraded, size: int) -> None:
    """Header sizes at their bounds; head and payload in two parts."""
    payload = os.urandom(size)
    up.outbox.put_first(1, Frame(2, payload[:4], memoryview(payload)[4:]))
    up.outbox.close(close_frame(1012))
    up.transport.start_sending(up.outbox)
    up.outbox.run()
    up.transport.finish_sending()
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
    """Our wrapper alone decides about the descriptor."""
    assert "HTTP_AUTHORIZATION" not in up.library.environ
    up.library.sock.close()
    assert isinstance(up.library.sock, LegSocket)
    close = encode_frame(8, b"\x03\xe8")
    up.peer.sendall(close)
    assert up.sock.recv(100) == close


def test_control_frames_are_taken_apart() -> None:
    """Several in a row, as the library joins them."""
    data = b"\x8a\x02hi" + b"\x8a\x00" + b"\x88\x02\x03\xe8"
    assert _control_frames(data) == [
        (10, b"", b"hi"),
        (10, b"", b""),
        (8, b"", b"\x03\xe8"),
    ]
