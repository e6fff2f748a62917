"""A leg against servers played by hand: the handshake, frames both ways, silence, the end."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import websocket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.connection import Connection as WsprotoConnection
from wsproto.events import BytesMessage

from http_network_relay.dial import connection as transport_module
from http_network_relay.dial.connection import Connection, connect
from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import parse_server_url
from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT
from http_network_relay.wire.errors import LegError, RelayError
from http_network_relay.wire.frames import frame_header, mask
from tests.support.client.by_hand import HandServer, Visitor, frame, hand_server, stay
from tests.support.taking import put_data, queue_lock, take
from tests.support.waiting import eventually

SECRET = "Basic c2VjcmV0LW9mLXRoZS1jbGllbnQ="
RELAYS = {"HTTP-Network-Relay": "v1", "Content-Type": "application/json"}


@pytest.fixture
def fast_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def dial(server: HandServer, *, ping_interval_s: float = 20.0, **options: Any) -> Connection:
    return connect(
        server.endpoint,
        [f"Authorization: {SECRET}", "HTTP-Network-Relay-Instance: " + "0" * 32],
        context=None,
        environ={},
        ping_interval_s=ping_interval_s,
        **options,
    )


@contextmanager
def leg(server: HandServer, *, is_started: bool = True, **options: Any) -> Iterator[Connection]:
    """A leg that is up, and down afterwards."""
    made = dial(server, **options)
    if is_started:
        made.start("test")
    try:
        yield made
    finally:
        made.abort()
        made.stop()


def refusal(serve: Callable[[Visitor], None], *, within_s: float = 1.0) -> RelayError:
    """How dialling that server fails."""
    with hand_server(serve) as server:
        begun = time.monotonic()
        with pytest.raises(RelayError) as caught:
            dial(server)
        assert time.monotonic() - begun < within_s
    assert str(caught.value).isprintable()
    assert SECRET.split()[1] not in str(caught.value)
    return caught.value


def answering(status: str, body: bytes = b"", **headers: str) -> Callable[[Visitor], None]:
    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.answer(status, body, **headers)
        visitor.wait_gone()

    return serve


# The handshake.


def test_bytes_in_the_segment_of_the_101_are_the_first_message() -> None:
    """What was read too far during the handshake is not lost."""

    def serve(visitor: Visitor) -> None:
        visitor.upgrade(frame(OP_TEXT, b'{"type":"x"}'), frame(OP_BINARY, b"y" * 5000))
        visitor.wait_gone()

    with hand_server(serve) as server, leg(server) as transport:
        assert transport.receive() == (OP_TEXT, b'{"type":"x"}')
        assert transport.receive() == (OP_BINARY, b"y" * 5000)


def test_request_carries_what_the_server_needs_and_offers_no_extension() -> None:
    """The subprotocol, our headers, no Origin, and never permessage-deflate."""

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        visitor.wait_gone()

    with hand_server(serve) as server:
        with leg(server):
            visitor = server.visitor()
        head = visitor.head.decode()
    assert head.startswith("GET /ws_for_clients HTTP/1.1\r\n")
    assert visitor.header("Sec-WebSocket-Protocol") == "http-network-relay.v1"
    assert visitor.header("Sec-WebSocket-Version") == "13"
    assert visitor.header("Authorization") == SECRET
    assert visitor.header("Host") == f"127.0.0.1:{server.port}"
    for absent in ("Sec-WebSocket-Extensions", "Origin", "Cookie"):
        with pytest.raises(KeyError):
            visitor.header(absent)


def test_handshake_is_read_byte_by_byte_if_it_comes_so() -> None:
    """However the network cuts it."""

    def serve(visitor: Visitor) -> None:
        whole = bytearray()
        real = visitor.sock

        class Cut:
            def sendall(self, data: bytes) -> None:
                whole.extend(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        visitor.sock = Cut()  # type: ignore[assignment]
        visitor.upgrade(frame(OP_TEXT, b"first"))
        visitor.sock = real
        for byte in whole:
            real.sendall(bytes([byte]))
        visitor.wait_gone()

    with hand_server(serve) as server, leg(server) as transport:
        assert transport.receive() == (OP_TEXT, b"first")


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_WebSocket_Accept": "AAAAAAAAAAAAAAAAAAAAAAAAAAA="},
        {"Sec_WebSocket_Accept": None},
        {"Upgrade": "h2c"},
        {"Upgrade": None},
        {"Connection": "close"},
        {"Sec_WebSocket_Protocol": None},
        {"Sec_WebSocket_Protocol": "http-network-relay.v9"},
        {"Set_Cookie": "a,b=1"},
    ],
    ids=str,
)
def test_upgrade_that_is_not_ours_is_refused(headers: dict[str, str | None]) -> None:
    """A wrong key, no or another subprotocol, a cookie that breaks the library."""

    def serve(visitor: Visitor) -> None:
        visitor.upgrade(**headers)
        visitor.wait_gone()

    error = refusal(serve)
    assert error.code == "not_a_relay"
    assert "127.0.0.1" in str(error)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temp", "308 Perm"])
def test_redirect_is_named_and_never_followed(status: str) -> None:
    """The secret goes to nobody else; the sentence says where it pointed."""
    with hand_server(stay) as other:
        # A scheme that the library would follow.
        where = f"ws://127.0.0.1:{other.port}/elsewhere\x1b[2J"
        error = refusal(answering(status, Location=where))
        assert not other.visitors
    assert error.code == "not_a_relay"
    assert f"ws://127.0.0.1:{other.port}/elsewhere" in str(error)
    assert "--server-url" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "is_retryable"),
    [
        ("401 Unauthorized", "unauthorized", False),
        ("403 Forbidden", "forbidden", False),
        ("426 Upgrade Required", "version_unsupported", False),
        ("429 Too Many", "too_many", True),
        ("503 Unavailable", "busy", True),
        ("503 Unavailable", "server_restart", True),
        ("404 Not Found", "not_found", False),
        ("500 Oops", "wrong_worker", False),
    ],
)
def test_relays_refusal_says_its_own_code_and_sentence(
    status: str, code: str, is_retryable: bool
) -> None:
    """With the relay's header the JSON is believed."""
    body = json.dumps({"code": code, "message": "because\n of it"}).encode()
    error = refusal(answering(status, body, Retry_After="7", **RELAYS))
    assert (error.code, error.is_retryable, error.retry_after_s) == (code, is_retryable, 7.0)
    assert str(error).endswith(": because? of it")


@pytest.mark.parametrize(
    "body",
    [b"", b"no", b"[]", b'"x"', b"null", b'{"code":1}', b'{"message":"x"}', b"\xff", b"[" * 3000,
     b'{"code":"of_tomorrow","message":"m"}'],
)  # fmt: skip
@pytest.mark.parametrize(
    ("status", "code"),
    [("401 x", "unauthorized"), ("403 x", "forbidden"), ("426 x", "version_unsupported"),
     ("429 x", "busy"), ("503 x", "busy"), ("500 x", "server_failed")],
)  # fmt: skip
def test_relays_refusal_without_its_json_counts_by_its_status(
    status: str, code: str, body: bytes
) -> None:
    """Whatever stands in the body, nothing breaks."""
    assert refusal(answering(status, body, **RELAYS)).code == code


@pytest.mark.parametrize("status", ["200 OK", "401 No", "403 No", "407 No", "426 No", "503 No"])
def test_answer_without_the_relays_header_comes_from_something_between(status: str) -> None:
    """A proxy's 401 is not the relay's, whatever JSON it carries."""
    body = json.dumps({"code": "unauthorized", "message": "a forgery"}).encode()
    error = refusal(answering(status, body, Server="nginx\x1b[2J"))
    assert error.code == "not_a_relay"
    assert error.is_retryable
    assert f"answered {status[:3]}, Server: nginx?[2J" in str(error)
    assert "forgery" not in str(error)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("0", 0.0), ("", None), ("soon", None), ("-1", None), ("²", None), ("1.5", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", None), ("9" * 5000, 300.0), ("99999999999", 300.0)],
)  # fmt: skip
def test_retry_after_is_a_bounded_number(text: str, seconds: float | None) -> None:
    """A typo there neither raises nor parks a client for years."""
    assert refusal(answering("503 x", b"", Retry_After=text, **RELAYS)).retry_after_s == seconds


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\r\n\r\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\xff\xfe\r\n\r\n", b"HTTP/1.1 101 OK\r\nno colon\r\n\r\n", b"HTTP/1.1 101",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 403 No\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 403 No\r\nHTTP-Network-Relay: v1\r\nContent-Length: \xc2\xb2\r\n\r\n",
        b"HTTP/1.1 99999999999999999999 No\r\n\r\n",
    ],
)  # fmt: skip
def test_garbage_for_an_answer_is_an_error_of_ours(answer: bytes) -> None:
    """An OSError or worse from here would end an unattended client."""

    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.sock.sendall(answer)
        visitor.sock.shutdown(socket.SHUT_WR)
        visitor.wait_gone()

    # "forbidden": an older library does not look at the length of a refusal's body.
    assert refusal(serve).code in ("not_a_relay", "server_unreachable", "forbidden")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=200)
    | st.binary(max_size=100).map(b"HTTP/1.1 101 Switching\r\n".__add__)
    | st.binary(max_size=100).map(b"HTTP/1.1 401 No\r\nHTTP-Network-Relay: v1\r\n".__add__)
)
def test_any_answer_is_an_error_of_ours(answer: bytes) -> None:
    """The library may raise what it likes; we raise RelayError."""

    class Said:
        def __init__(self) -> None:
            self.left = answer + b"\r\n\r\n"

        def recv(self, size: int) -> bytes:
            piece, self.left = self.left[:size], self.left[size:]
            return piece

        def send(self, data: bytes) -> int:
            return len(data)

    shim = transport_module._HandshakeSocket(Said(), Deadline(5))  # type: ignore[arg-type]
    endpoint = transport_module.Endpoint(False, "relay.example", 80, "/p")
    library = transport_module.websocket_client()
    with pytest.raises(RelayError):
        transport_module._upgrade(library, endpoint, [], shim)


@pytest.mark.parametrize("kind", ["one line", "many lines", "huge body", "all at once"])
def test_answer_without_end_is_bounded_by_its_size(kind: str) -> None:
    """Megabytes of head or body: at most 64 KiB of them are looked at."""

    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        if kind == "huge body":
            visitor.sock.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 999999999\r\n\r\n")
        else:
            visitor.sock.sendall(b"HTTP/1.1 200 OK\r\n")
        piece = {"many lines": b"X: y\r\n" * 1000, "all at once": b"x" * 1_000_000}
        while True:
            visitor.sock.sendall(piece.get(kind, b"x" * 4000))

    error = refusal(serve, within_s=8.0)  # Far from the 20 s of the deadline.
    assert error.code == "not_a_relay"


@pytest.mark.parametrize("kind", ["silent", "trickles a head", "trickles a body"])
def test_answer_that_does_not_come_is_bounded_by_the_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One deadline for the whole way: a byte now and then does not buy more time."""
    monkeypatch.setattr(transport_module, "DIAL_SERVER_S", 0.3)
    never = threading.Event()

    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        if kind == "silent":
            visitor.wait_gone()
            return
        if kind == "trickles a body":
            head = b"HTTP/1.1 401 No\r\nHTTP-Network-Relay: v1\r\nContent-Length: 9999\r\n\r\n"
            visitor.sock.sendall(head)
        while not never.wait(0.02):
            visitor.sock.sendall(b"x")

    begun = time.monotonic()
    refusal(serve)
    assert 0.28 <= time.monotonic() - begun < 0.9


def test_handshake_is_cancelled_in_0_3_seconds() -> None:
    """A client that is stopped does not wait for a server that says nothing."""
    with hand_server(stay) as server:
        begun = time.monotonic()
        with pytest.raises(RelayError):
            dial(server, is_cancelled=lambda: time.monotonic() > begun + 0.05)
        assert time.monotonic() - begun < 0.7


# Frames that come.


def serving(*pieces: bytes) -> Callable[[Visitor], None]:
    """Upgrade, send these bytes, then wait."""

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        for piece in pieces:
            visitor.sock.sendall(piece)
        visitor.wait_gone()

    return serve


def test_fragments_become_one_message() -> None:
    """Also with empty ones, and with a ping between them."""
    pieces = [
        frame(OP_BINARY, b"a", fin=False), frame(0, b"", fin=False), frame(OP_PING, b"p"),
        frame(0, b"b" * 70, fin=False), frame(0, b""), frame(OP_TEXT, b"t"),
    ]  # fmt: skip
    with hand_server(serving(*pieces)) as server, leg(server) as transport:
        assert transport.receive() == (OP_BINARY, b"a" + b"b" * 70)
        assert transport.receive() == (OP_TEXT, b"t")


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([frame(0, b"x")], 1002),
        ([frame(OP_BINARY, b"x", fin=False), frame(OP_BINARY, b"y")], 1002),
        ([frame(OP_TEXT, b"x", fin=False), frame(OP_TEXT, b"y", fin=False)], 1002),
        ([frame(OP_BINARY, b"x", rsv=4)], 1002),
        ([frame(3, b"x")], 1002),
        ([frame(11, b"x")], 1002),
        ([frame(OP_PING, b"x", fin=False)], 1002),
        ([frame(OP_PING, b"x" * 126)], 1002),
        ([frame(OP_CLOSE, b"x")], 1002),
        ([frame(OP_CLOSE, b"\x00\x01")], 1002),
        ([frame(OP_BINARY, bytes(40_000), fin=False), frame(0, bytes(40_000))], 1009),
    ],
    ids=repr,
)  # fmt: skip
def test_broken_frame_is_an_error_of_the_leg(pieces: list[bytes], code: int) -> None:
    """What RFC 6455 forbids."""
    with hand_server(serving(*pieces)) as server, leg(server) as transport:
        with pytest.raises(LegError) as caught:
            transport.receive()
        assert caught.value.close_code == code


@pytest.mark.parametrize("size", [65_541, 2**31, 2**62])
def test_oversize_frame_is_refused_by_its_header(size: int) -> None:
    """Not one byte of it is waited for or kept."""
    head = struct.pack("!BBQ", 0x82, 127, size)
    with hand_server(serving(head)) as server, leg(server) as transport:
        with pytest.raises(LegError) as caught:
            transport.receive()
        assert caught.value.close_code == 1009


def test_largest_message_is_taken() -> None:
    """64 KiB and its channel."""
    payload = bytes(range(256)) * 256 + b"1234"
    with hand_server(serving(frame(OP_BINARY, payload))) as server, leg(server) as transport:
        assert transport.receive() == (OP_BINARY, payload)


def test_fragments_without_end_cost_neither_memory_nor_time() -> None:
    """A hundred thousand empty ones, and 60,000 of one byte."""
    empty = frame(0, b"", fin=False) * 100_000
    single = frame(0, b"x", fin=False) * 60_000
    pieces = (frame(OP_BINARY, b"", fin=False), empty, single, frame(0, b"end"))

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        visitor.sock.sendall(b"".join(pieces))
        visitor.wait_gone()

    with hand_server(serve) as server, leg(server) as transport:
        opcode, payload = transport.receive()
        assert (opcode, len(payload)) == (OP_BINARY, 60_003)
        assert len(transport._messages._parts) == 0


def test_lost_connection_is_a_close_without_a_code() -> None:
    """1006, at a frame's border and in the middle of a frame."""
    for rest in (b"", frame(OP_BINARY, b"x" * 100)[:50]):

        def serve(visitor: Visitor, rest: bytes = rest) -> None:
            visitor.upgrade(rest)

        with hand_server(serve) as server, leg(server) as transport:
            assert transport.receive() == (OP_CLOSE, 1006)


# Frames that go.


@pytest.mark.parametrize("size", [0, 1, 3, 125, 126, 127, 65_535, 65_536, 65_540, 70_000])
def test_frame_is_read_by_another_implementation(size: int) -> None:
    """Header and mask, by wsproto."""
    payload = (bytes(range(256)) * 300)[:size]
    key = b"\x01\x80\xff\x7e"
    peer = WsprotoConnection(ConnectionType.SERVER)
    data = bytearray(payload)
    mask(data, key)
    peer.receive_data(frame_header(OP_BINARY, len(data), key) + bytes(data))
    received = b"".join(
        bytes(event.data) for event in peer.events() if isinstance(event, BytesMessage)
    )
    assert received == payload


def keys_of(
    monkeypatch: pytest.MonkeyPatch, *, url: str, agrees: str | None
) -> tuple[list[bytes], str | None]:
    """The keys of eight frames to a server of that URL, and what the request asked for.

    The URL is a name only: the connection leads to a server of the test, in clear.
    """
    keys: list[bytes] = []
    asked: list[str | None] = []
    done = threading.Event()

    def serve(visitor: Visitor) -> None:
        visitor.upgrade(HTTP_Network_Relay_Mask=agrees)
        try:
            asked.append(visitor.header("HTTP-Network-Relay-Mask"))
        except KeyError:
            asked.append(None)
        for number in range(8):
            head = visitor._exactly(2)
            # A zero key is a key: the frame says so, and is well-formed for anybody.
            assert head == bytes((0x82 if number % 2 else 0x81, 0x80 | 9))
            keys.append(visitor._exactly(4))
            data = visitor._exactly(9)
            key = keys[-1]
            assert bytes(byte ^ key[at % 4] for at, byte in enumerate(data)) == b"\0\0\0\1hello"
        done.set()
        visitor.wait_gone()

    with hand_server(serve) as server:
        endpoint = parse_server_url(url, "/p")
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.settimeout(0.0)
        monkeypatch.setattr(transport_module, "dial_server", lambda *_: sock)
        transport = connect(endpoint, [], context=None, environ={}, ping_interval_s=20.0)
        transport.start("test")
        try:
            for number in range(8):
                opcode = OP_BINARY if number % 2 else OP_TEXT
                transport.frame_sender.put_first(number + 1, Frame(opcode, b"\0\0\0\1", b"hello"))
                if number % 3:
                    transport.frame_sender.push()
            assert done.wait(5.0)
        finally:
            transport.abort()
            transport.stop()
    return keys, asked[0]


NEAR_URLS = ["https://relay.example", "wss://10.0.0.1", "http://127.0.0.1:8000", "ws://[::1]:8000"]
NEAR_URLS += ["http://localhost", "https://localhost"]


@pytest.mark.parametrize("url", NEAR_URLS)
def test_mask_is_zero_when_nobody_can_read_it_and_the_server_agrees(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS, or inside this machine; docs/protocol.md, "Masking"."""
    keys, asked = keys_of(monkeypatch, url=url, agrees="zero")
    assert asked == "zero"
    assert keys == [bytes(4)] * 8


def check_fresh(keys: list[bytes]) -> None:
    assert len(set(keys)) == 8
    assert bytes(4) not in keys


@pytest.mark.parametrize("agrees", [None, "", "random", "zero, zero", "ZERO"])
@pytest.mark.parametrize("url", NEAR_URLS[:3])
def test_mask_of_every_frame_is_new_when_the_server_does_not_agree(
    url: str, agrees: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As RFC 6455, 10.3, wants it: an older server, or words that we do not know."""
    keys, asked = keys_of(monkeypatch, url=url, agrees=agrees)
    assert asked == "zero"
    check_fresh(keys)


@pytest.mark.parametrize("agrees", [None, "zero"])
@pytest.mark.parametrize("url", ["http://relay.example", "ws://10.0.0.1:8000"])
def test_mask_of_every_frame_is_new_in_clear_to_another_machine(
    url: str, agrees: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked for there, and an answer to what was not asked agrees to nothing."""
    keys, asked = keys_of(monkeypatch, url=url, agrees=agrees)
    assert asked is None
    check_fresh(keys)


def test_close_of_the_server_is_echoed_and_masked() -> None:
    """The same code, ahead of all that waits; then the leg is over."""
    echoes: list[tuple[int, bytes]] = []

    def serve(visitor: Visitor) -> None:
        visitor.upgrade(frame(OP_CLOSE, struct.pack("!H", 1012) + b"restart"))
        echoes.append(visitor.read_frame())
        visitor.wait_gone()

    with hand_server(serve) as server:
        with leg(server) as transport:
            assert transport.receive() == (OP_CLOSE, 1012)
            transport.stop()
        assert server.visitors
    assert echoes == [(OP_CLOSE, struct.pack("!H", 1012))]


def test_close_of_a_restarting_server_is_read_with_an_older_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Version 1.2.3 knows no 1012; without it every restart would be a broken protocol."""
    older = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011)
    monkeypatch.setattr(websocket._abnf, "VALID_CLOSE_STATUS", older)
    restart = frame(OP_CLOSE, struct.pack("!H", 1012))
    with hand_server(serving(restart)) as server, leg(server) as transport:
        assert transport.receive() == (OP_CLOSE, 1012)


def test_close_without_a_code_is_1005() -> None:
    """RFC 6455, 7.1.5."""
    with hand_server(serving(frame(OP_CLOSE))) as server, leg(server) as transport:
        assert transport.receive() == (OP_CLOSE, 1005)


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.usefixtures("fast_switching")
def test_close_reaches_the_server_although_stop_follows_at_once(flush: bool) -> None:
    """The reason of an end is worth the moment that it needs."""
    for _ in range(10):
        seen: list[tuple[int, bytes]] = []

        def serve(visitor: Visitor, seen: list[tuple[int, bytes]] = seen) -> None:
            visitor.upgrade()
            seen.append(visitor.read_frame())
            visitor.wait_gone()

        with hand_server(serve) as server, leg(server) as transport:
            transport.close(1002, "sorry", flush=flush)
            transport.stop()
        assert seen == [(OP_CLOSE, struct.pack("!H", 1002) + b"sorry")]


def test_long_reason_of_a_close_is_cut_to_fit() -> None:
    """A control frame has at most 125 bytes, and its text is whole."""
    seen: list[tuple[int, bytes]] = []

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        seen.append(visitor.read_frame())
        visitor.wait_gone()

    with hand_server(serve) as server, leg(server) as transport:
        transport.close(1002, "é" * 200)
        transport.stop()
    ((opcode, payload),) = seen
    assert opcode == OP_CLOSE
    assert len(payload) <= 125
    payload[2:].decode("utf-8")


def test_stop_of_a_leg_whose_peer_does_not_read_ends_in_time(deaf: HandServer) -> None:
    """A goodbye that cannot be said is given up after a second."""
    with leg(deaf) as transport:
        fill(transport)
        transport.close(1000)
        begun = time.monotonic()
        transport.stop()
        assert 0.9 < time.monotonic() - begun < 1.5


def test_pings_are_answered_while_a_large_send_is_stuck_and_no_frame_breaks() -> None:
    """The reader reads on, the pong waits for its turn, and the stream stays whole."""
    pings, blocks = 30, 200
    go_on = threading.Event()
    pongs: list[bytes] = []
    data = bytearray()

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        assert go_on.wait(5.0)
        for number in range(pings):
            visitor.sock.sendall(frame(OP_PING, b"%d" % number))
        # Reads only now: all of it was sent into a full pipe. The last pong may come behind it.
        last = b"%d" % (pings - 1)
        while len(data) < blocks * 65536 or pongs[-1:] != [last]:
            opcode, payload = visitor.read_frame()
            if opcode == OP_BINARY:
                assert payload[:4] == b"\0\0\0\7"
                data.extend(payload[4:])
            else:
                assert opcode == OP_PONG
                pongs.append(payload)
        visitor.sock.sendall(frame(OP_TEXT, b"all"))
        visitor.wait_gone()

    block = bytes(range(256)) * 256
    with hand_server(serve) as server, leg(server) as transport:
        for _ in range(blocks):
            put_data(transport.frame_sender, 7, b"\0\0\0\7", block)
        transport.frame_sender.push()
        eventually(lambda: not _can_write(transport))
        go_on.set()
        assert transport.receive() == (OP_TEXT, b"all")
    assert data == block * blocks
    # Several may share one answer; the newest is among them.
    assert pongs[-1] == b"%d" % (pings - 1)


def test_reader_puts_its_pong_and_writes_nothing() -> None:
    """Rule 4: a leg whose sender was not started has sent no byte after two pings."""
    pieces = (frame(OP_PING, b"old"), frame(OP_PING, b"new"), frame(OP_TEXT, b"t"))
    seen: list[tuple[int, bytes]] = []

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        visitor.sock.sendall(b"".join(pieces))
        seen.append(visitor.read_frame())
        visitor.wait_gone()

    with hand_server(serve) as server, leg(server, is_started=False) as transport:
        assert transport.receive() == (OP_TEXT, b"t")
        assert take(transport.frame_sender) == Frame(OP_PONG, b"", b"new")
        transport.close(1000)
        transport.start("test")
        eventually(lambda: seen)
    assert seen[0][0] == OP_CLOSE


@pytest.fixture
def deaf() -> Iterator[HandServer]:
    """A server that upgrades and then does not read."""
    ends = threading.Event()

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        ends.wait(10.0)

    with hand_server(serve) as server:
        yield server
        ends.set()


def fill(transport: Connection) -> None:
    """Send until the writer is stuck in the kernel."""
    for channel in range(1, 200):
        put_data(transport.frame_sender, channel, b"\0\0\0\1", bytes(65536))
    transport.frame_sender.push()
    eventually(lambda: not _can_write(transport))


def _can_write(transport: Connection) -> bool:
    return wait_ready(transport._duplex._sock, write=True, timeout_s=0.0)


# The timer.


def test_silence_gives_the_leg_up_after_two_and_a_half_intervals() -> None:
    """By its own clock, with a reason that says how long."""
    with hand_server(serving()) as server, leg(server, ping_interval_s=2.0) as transport:
        heard_at = transport._duplex.heard_at
        assert transport.tick(heard_at + 4.99, slept=False) <= heard_at + 5.01
        assert transport.gave_up is None
        transport.tick(heard_at + 5.0, slept=False)
        assert transport.gave_up is not None
        assert transport.gave_up.code == "leg_lost"
        assert "5 s" in str(transport.gave_up)
        assert transport.receive() == (OP_CLOSE, 1006)


def test_ping_is_due_each_interval_and_no_sooner() -> None:
    """One a tick, in its slot."""
    with (
        hand_server(serving()) as server,
        leg(server, is_started=False, ping_interval_s=20.0) as transport,
    ):
        begun = transport._keepalive._ping_at - 20.0
        assert transport.tick(begun + 19.9, slept=False) == pytest.approx(begun + 20.0)
        assert not transport.frame_sender.has_frames
        assert transport.tick(begun + 20.0, slept=False) == pytest.approx(begun + 40.0)
        assert take(transport.frame_sender) == Frame(OP_PING, b"", b"")
        assert not transport.frame_sender.has_frames


def test_machine_that_slept_pings_at_once_and_waits_three_seconds() -> None:
    """The silence while it slept does not count; the silence after does."""
    with (
        hand_server(serving()) as server,
        leg(server, is_started=False, ping_interval_s=20.0) as transport,
    ):
        woke = transport._duplex.heard_at + 1000.0
        again = transport.tick(woke, slept=True)
        assert take(transport.frame_sender) == Frame(OP_PING, b"", b"")
        assert transport.gave_up is None
        assert again == pytest.approx(woke + 3.0)
        transport.tick(woke + 2.9, slept=False)
        assert transport.gave_up is None
        transport.tick(woke + 3.0, slept=False)
        assert transport.gave_up is not None


def test_machine_that_slept_goes_on_when_something_is_heard() -> None:
    """An answer to that ping brings the usual patience back."""
    with (
        hand_server(serving()) as server,
        leg(server, is_started=False, ping_interval_s=20.0) as transport,
    ):
        woke = transport._duplex.heard_at + 1000.0
        transport.tick(woke, slept=True)
        transport._duplex.heard_at = woke + 0.5
        transport.tick(woke + 40.0, slept=False)
        assert transport.gave_up is None
        transport.tick(woke + 50.5, slept=False)
        assert transport.gave_up is not None


def test_tick_never_waits_for_the_outbox() -> None:
    """Somebody holds its lock: the ping is put a moment later instead."""
    with (
        hand_server(serving()) as server,
        leg(server, is_started=False, ping_interval_s=1.0) as transport,
    ):
        now = transport._keepalive._ping_at
        with queue_lock(transport.frame_sender):
            ticked: list[float] = []
            timer = threading.Thread(target=lambda: ticked.append(transport.tick(now, slept=False)))
            timer.start()
            timer.join(5.0)
            assert not timer.is_alive()
        assert now < ticked[0] <= now + 0.05
        transport.tick(ticked[0], slept=False)
        assert take(transport.frame_sender) == Frame(OP_PING, b"", b"")


def test_tick_never_waits_for_a_stuck_writer(deaf: HandServer) -> None:
    """It gives a leg up from outside the send lock, and the stuck writer wakes."""
    with leg(deaf, ping_interval_s=1.0) as transport:
        fill(transport)
        begun = time.monotonic()
        transport.tick(begun + 100, slept=False)
        assert time.monotonic() - begun < 0.05
        assert transport.receive() == (OP_CLOSE, 1006)
        transport.stop()
        assert time.monotonic() - begun < 1.0


def test_leg_that_was_closed_is_aborted_a_second_later() -> None:
    """By the timer, if the server does not answer the close."""
    with hand_server(serving()) as server, leg(server) as transport:
        transport.close(1000)
        now = time.monotonic()
        again = transport.tick(now, slept=False)
        assert now < again <= now + 1.0
        transport.tick(again, slept=False)
        assert transport.receive() == (OP_CLOSE, 1006)
        assert transport.gave_up is None


# The library.


def test_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both ways to get it."""
    monkeypatch.setitem(sys.modules, "websocket", None)
    with pytest.raises(RelayError, match=r"pip install websocket-client.*python3-websocket"):
        transport_module.websocket_client()


def test_other_library_of_that_name_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `websocket` installs a module of the same name."""
    monkeypatch.setitem(sys.modules, "websocket", type(sys)("websocket"))
    with pytest.raises(RelayError, match="pip uninstall websocket"):
        transport_module.websocket_client()
