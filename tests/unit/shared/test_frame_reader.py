"""Frames made and taken by hand: whatever comes, however it is cut, no byte is lost or moved."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameDecoder, FrameProtocol

from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.wire.constants import (
    MAX_MESSAGE_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_PING,
    OP_PONG,
    OP_TEXT,
)
from http_network_relay.wire.frames import ZERO_KEY, frame_header, mask

OP_CONTINUATION = 0x0
SIZES = [0, 1, 2, 3, 5, 124, 125, 126, 127, 1000, 16_380, 16_384, 16_390, 40_000]
SIZES += [65_535, 65_536, MAX_MESSAGE_BYTES]


def masked(data: bytes, key: bytes) -> bytes:
    """RFC 6455, 5.3, as it stands there."""
    return bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


def quickly_masked(data: bytes, key: bytes) -> bytes:
    """The same by long integers: these tests mask megabytes."""
    times = len(data) // 4 + 1
    whole = int.from_bytes(data, "big") ^ int.from_bytes((key * times)[: len(data)], "big")
    return whole.to_bytes(len(data), "big")


class Made(NamedTuple):
    """A frame as it comes, and the message that it is, if it is one."""

    raw: bytes
    message: tuple[int, bytes] | None
    # Whether it is whole: the frames behind one that is not are the library's.
    is_whole: bool


class Source:
    """Stands for a Duplex: gives a stream in the pieces that were drawn, then its end."""

    def __init__(self, stream: bytes, cuts: list[int]) -> None:
        bounds = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
        self.pieces = [stream[start:end] for start, end in pairwise(bounds)]
        self.sizes: list[int] = []
        self.sizes_into: list[int] = []

    def _next(self, size: int) -> bytes:
        if not self.pieces:
            return b""
        piece, rest = self.pieces[0][:size], self.pieces[0][size:]
        self.pieces[:1] = [rest] if rest else []
        return piece

    def recv(self, size: int, _on_pause: object = None) -> bytes:
        assert size > 0
        self.sizes.append(size)
        return self._next(size)

    def recv_into(self, view: memoryview) -> int:
        assert len(view) > 0
        piece = self._next(len(view))
        view[: len(piece)] = piece
        self.sizes_into.append(len(piece))
        return len(piece)


def header(first: int, size: int, key: bytes | None, form: int = 0) -> bytes:
    """A header with a count of `form` bytes (0: the shortest one, as is right)."""
    bit = 0 if key is None else 0x80
    if not form:
        form = 1 if size < 126 else 2 if size < 2**16 else 8
    count = {1: bytes((bit | size,)) if form == 1 else b""}.get(form)
    if count is None:
        marker = {2: 126, 8: 127}[form]
        count = bytes((bit | marker,)) + size.to_bytes(form, "big")
    return bytes((first,)) + count + (key or b"")


def make(first: int, payload: bytes, key: bytes | None, **options: Any) -> bytes:
    body = payload if key is None else quickly_masked(payload, key)
    return header(first, len(payload), key, **options) + body


@st.composite
def payloads(draw: st.DrawFn, largest: int = MAX_MESSAGE_BYTES) -> bytes:
    size = draw(st.sampled_from([s for s in SIZES if s <= largest]) | st.integers(0, 300))
    seed = draw(st.binary(min_size=1, max_size=7))
    return (seed * (size // len(seed) + 1))[:size]


KEYS = st.binary(min_size=4, max_size=4) | st.just(ZERO_KEY) | st.just(b"\0\0\0\1")


@st.composite
def made_frames(draw: st.DrawFn, is_masked: bool) -> Made:
    """Mostly messages, and everything else that a stream can have."""
    key = draw(KEYS) if is_masked else None
    kind = draw(
        st.sampled_from(
            ["message"] * 8
            + ["control"] * 3
            + ["fragment", "oversize", "long form", "rsv", "wrong mask", "opcode", "long control"]
        )
    )
    opcode = draw(st.sampled_from([OP_TEXT, OP_BINARY]))
    if kind == "message":
        payload = draw(payloads())
        return Made(make(0x80 | opcode, payload, key), (opcode, payload), True)
    if kind == "control":
        control = draw(st.sampled_from([OP_PING, OP_PONG, OP_CLOSE]))
        payload = draw(payloads(125))[:125]
        taken = (control, payload) if control != OP_CLOSE else None
        return Made(make(0x80 | control, payload, key), taken, True)
    if kind == "long control":
        payload = bytes(draw(st.integers(126, 1000)))
        return Made(make(0x80 | OP_PING, payload, key), None, True)
    if kind == "oversize":
        payload = bytes(MAX_MESSAGE_BYTES + draw(st.integers(1, 3)))
        return Made(make(0x80 | opcode, payload, key), None, True)
    if kind == "fragment":
        first = draw(st.sampled_from([opcode, OP_CONTINUATION, 0x80 | OP_CONTINUATION]))
        return Made(make(first, draw(payloads(1000)), key), None, False)
    if kind == "rsv":
        rsv = draw(st.integers(1, 7)) << 4
        return Made(make(0x80 | rsv | opcode, draw(payloads(1000)), key), None, False)
    if kind == "opcode":
        first = 0x80 | draw(st.sampled_from([3, 4, 5, 6, 7, 11, 12, 13, 14, 15]))
        return Made(make(first, draw(payloads(1000)), key), None, False)
    if kind == "long form":
        payload = draw(payloads(125) if draw(st.booleans()) else payloads(65_535))
        form = draw(st.sampled_from([2, 8])) if len(payload) < 126 else 8
        return Made(make(0x80 | opcode, payload, key, form=form), None, False)
    other = None if is_masked else draw(KEYS)
    return Made(make(0x80 | opcode, draw(payloads(1000)), other), None, False)


def rebuilt(opcode: int, payload: bytes, key: bytes | None) -> bytes:
    return make(0x80 | opcode, payload, key)


def run(reader: FrameReader, read_sizes: list[int]) -> list[tuple[str, Any]]:
    """What is taken and what the library reads, in order, until the stream ends."""
    found: list[tuple[str, Any]] = []
    turn = 0
    while True:
        message = reader.read_message()
        if message is not None:
            found.append(("message", message))
            continue
        data = reader.read(read_sizes[turn % len(read_sizes)])
        turn += 1
        if not data:
            return found
        found.append(("library", data))


def expected(frames: list[Made], end: int) -> tuple[list[tuple[str, Any]], bytes]:
    """What run() finds in the first `end` bytes, and what there is of a message cut short.

    Bytes for the library are in one piece.
    """
    cut_short = b""
    found: list[tuple[str, Any]] = []
    at, is_ours = 0, True
    for frame in frames:
        raw = frame.raw[: end - at]
        at += len(raw)
        if is_ours and frame.message is not None:
            if len(raw) < len(frame.raw):
                cut_short = raw
                break
            found.append(("message", frame.message))
        elif raw:
            is_ours = is_ours and frame.is_whole
            found.append(("library", raw))
    return joined(found), cut_short


def joined(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Neighbouring bytes for the library in one piece."""
    whole: list[tuple[str, Any]] = []
    for kind, value in found:
        if kind == "library" and whole and whole[-1][0] == "library":
            whole[-1] = (kind, whole[-1][1] + value)
        else:
            whole.append((kind, value))
    return whole


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_messages_taken_and_bytes_left_are_the_stream_in_order(
    data: st.DataObject, is_masked: bool
) -> None:
    """Any frames, cut anywhere, begun in the handshake's buffer, ending anywhere."""
    frames = data.draw(st.lists(made_frames(is_masked), max_size=6))
    stream = b"".join(frame.raw for frame in frames)
    ends_early = data.draw(st.booleans())
    end = data.draw(st.integers(0, len(stream))) if ends_early else len(stream)
    begun_bytes = data.draw(st.sampled_from([0, 1, 5, 4096])) % (end + 1)
    cuts = data.draw(st.lists(st.integers(0, 1 << 20), max_size=8))
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 7, 4096, 65_536]), min_size=1, max_size=3))
    if sizes == [1] and len(stream) > 20_000:
        sizes = [4096]  # The same, in a hundredth of the time.
    source = Source(stream[begun_bytes:end], cuts)
    reader = FrameReader(source, stream[:begun_bytes], is_masked=is_masked)  # type: ignore[arg-type]
    found, (wanted, cut_short) = joined(run(reader, sizes)), expected(frames, end)
    if cut_short and found and found[-1][0] == "library":
        # Of a message that never came whole the library may get what had come, or nothing.
        whole = b"".join(value for kind, value in wanted[-1:] if kind == "library")
        kind, last = found.pop()
        assert last.startswith(whole)
        assert (whole + cut_short).startswith(last)
        if whole:
            found.append((kind, whole))
    assert found == wanted


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.booleans(), st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_come_out_again(stream: bytes, is_masked: bool, cuts: list[int]) -> None:
    """No garbage raises, is swallowed, or makes the reader wait for what is there."""
    found = run(FrameReader(Source(stream, cuts), is_masked=is_masked), [64])  # type: ignore[arg-type]
    at = 0
    for kind, value in found:
        if kind == "library":
            assert stream[at:].startswith(value)
            at += len(value)
            continue
        opcode, payload = value
        key = None
        if is_masked:
            head = len(header(0, len(payload), ZERO_KEY))
            key = stream[at + head - 4 : at + head]
        raw = rebuilt(opcode, bytes(payload), key)
        assert stream[at:].startswith(raw)
        at += len(raw)
    # Only the beginning of a message whose rest never came is nobody's.
    assert len(stream) - at <= len(stream[at:])
    if at < len(stream):
        assert stream[at] in (0x81, 0x82, 0x89, 0x8A)


@pytest.mark.parametrize("is_masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", SIZES)
def test_message_that_comes_byte_by_byte_is_whole(size: int, is_masked: bool) -> None:
    """Its header too; and the one behind it."""
    size = min(size, 2000)
    payload, key = bytes(range(256)) * 8, b"\1\2\3\4" if is_masked else None
    raw = make(0x82, payload[:size], key) + make(0x81, b"{}", key)
    source = Source(raw, list(range(len(raw))))
    reader = FrameReader(source, is_masked=is_masked)  # type: ignore[arg-type]
    assert reader.read_message() == (OP_BINARY, payload[:size])
    assert reader.read_message() == (OP_TEXT, b"{}")
    assert reader.read_message() is None
    assert reader.read(10) == b""


@pytest.mark.parametrize("key", [None, ZERO_KEY, b"\x80\0\xff\1"], ids=["plain", "zero", "key"])
@pytest.mark.parametrize("size", [17_000, 40_000, MAX_MESSAGE_BYTES])
def test_large_message_is_read_to_where_it_stays(size: int, key: bytes | None) -> None:
    """What was not there yet when its header came, however that is cut; and the next one."""
    payload = (bytes(range(251)) * 300)[:size]
    raw = make(0x82, payload, key)
    source = Source(raw + make(0x81, b"behind", key), [1000, 16_000, 16_001])
    reader = FrameReader(source, is_masked=key is not None)  # type: ignore[arg-type]
    assert reader.read_message() == (OP_BINARY, payload)
    assert source.sizes_into == [15_000, 1, len(raw) - 16_001]
    assert reader.read_message() == (OP_TEXT, b"behind")


@pytest.mark.parametrize("key", [None, b"\1\2\3\4"], ids=["unmasked", "masked"])
def test_end_of_the_stream_is_the_end_wherever_it_comes(key: bytes | None) -> None:
    """Within a header, a key or a payload: no message, and then b"", as often as one asks."""
    raw = make(0x82, b"p" * 20_000, key)
    for end in [*range(20), 16_383, 16_384, 16_385, len(raw) - 1]:
        reader = FrameReader(Source(raw[:end], []), is_masked=key is not None)  # type: ignore[arg-type]
        assert reader.read_message() is None
        taken = b""
        while piece := reader.read(100):
            taken += piece
        assert raw[:end].startswith(taken)
        assert reader.read_message() is None
        assert reader.read(100) == b""


def test_fragments_and_what_is_behind_them_are_the_librarys() -> None:
    """A message taken from behind would overtake the one that is being put together."""
    raw = [make(OP_BINARY, b"a", None), make(0x80, b"b", None), make(0x82, b"after", None)]
    reader = FrameReader(Source(b"".join(raw), []), is_masked=False)  # type: ignore[arg-type]
    assert reader.read_message() is None
    assert reader.read(1000) == b"".join(raw)
    assert reader.read_message() is None


def test_library_gets_a_control_frame_and_no_byte_behind_it() -> None:
    """It would keep that, and read_message() would not find it."""
    close, data = make(0x88, b"\x03\xe8bye", None), make(0x82, b"data", None)
    reader = FrameReader(Source(close + data + close, []), is_masked=False)  # type: ignore[arg-type]
    assert reader.read_message() is None
    assert reader.read(3) + reader.read(1000) == close
    assert reader.read_message() == (OP_BINARY, b"data")
    assert reader.read_message() is None
    assert reader.read(1000) == close


@pytest.mark.parametrize("opcode", [OP_PING, OP_PONG])
def test_ping_and_pong_are_taken_up_to_their_legal_size(opcode: int) -> None:
    """RFC 6455, 5.5: 125 bytes. A longer one is the library's, which refuses it."""
    legal, long = make(0x80 | opcode, bytes(125), None), make(0x80 | opcode, bytes(126), None)
    reader = FrameReader(Source(legal + long, []), is_masked=False)  # type: ignore[arg-type]
    assert reader.read_message() == (opcode, bytes(125))
    assert reader.read_message() is None
    assert reader.read(1000) == long


def test_message_with_a_zero_key_is_not_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the key is for: its payload is what came."""
    monkeypatch.setattr(
        "http_network_relay.leg.frame_reader.mask", lambda *_: pytest.fail("unmasked")
    )
    raw = make(0x82, b"payload", ZERO_KEY)
    reader = FrameReader(Source(raw, []), is_masked=True)  # type: ignore[arg-type]
    assert reader.read_message() == (OP_BINARY, b"payload")


def test_error_of_the_socket_comes_out() -> None:
    """As from the library's own read."""

    class Broken:
        def recv(self, *_: object) -> bytes:
            raise ConnectionResetError(104, "reset")

    reader = FrameReader(Broken(), is_masked=False)  # type: ignore[arg-type]
    with pytest.raises(ConnectionResetError):
        reader.read_message()


# Making.


@given(st.binary(max_size=70), KEYS)
def test_mask_is_the_one_of_the_rfc_and_its_own_inverse(data: bytes, key: bytes) -> None:
    """RFC 6455, 5.3."""
    mine = bytearray(data)
    mask(mine, key)
    assert mine == masked(data, key)
    mask(mine, key)
    assert mine == data


@pytest.mark.parametrize("key", [None, ZERO_KEY, b"\1\x80\xff\x7e"], ids=["plain", "zero", "key"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, MAX_MESSAGE_BYTES])
def test_header_is_read_by_another_implementation(size: int, key: bytes | None) -> None:
    """Counts at their bounds, by wsproto, masked and not."""
    payload = (bytes(range(256)) * 257)[:size]
    body = bytearray(payload)
    if key is not None:
        mask(body, key)
    decoder = FrameDecoder(client=key is None)
    decoder.receive_bytes(frame_header(OP_BINARY, size, key) + bytes(body))
    received = b""
    while (frame := decoder.process_buffer()) is not None:
        received += bytes(frame.payload)  # type: ignore[arg-type]
    assert received == payload


def test_header_is_the_shortest_form() -> None:
    """As the RFC asks; and the same as by hand."""
    for size in (0, 125, 126, 65_535, 65_536):
        for key in (None, ZERO_KEY, b"abcd"):
            assert frame_header(OP_TEXT, size, key) == header(0x81, size, key)
    assert frame_header(OP_BINARY, 65_536) == struct.pack("!BBQ", 0x82, 127, 65_536)


def test_masked_frame_of_another_implementation_is_taken() -> None:
    """wsproto, as a client, makes it."""
    raw = FrameProtocol(client=True, extensions=[]).send_data(b"hello", fin=True)
    reader = FrameReader(Source(bytes(raw), []), is_masked=True)  # type: ignore[arg-type]
    assert reader.read_message() == (OP_BINARY, b"hello")


def test_nothing_that_was_taken_is_kept_while_the_reader_waits() -> None:
    """An idle leg costs no buffer, whatever came before."""
    kept: list[int] = []

    class Watching(Source):
        def recv(self, size: int, on_pause: object = None) -> bytes:
            kept.append(len(reader._ahead))
            return super().recv(size, on_pause)

    stream = make(0x82, bytes(60_000), None) + make(0x82, b"x", None)[:1]
    reader = FrameReader(Watching(stream, []), is_masked=False)  # type: ignore[arg-type]
    assert reader.read_message() == (OP_BINARY, bytes(60_000))
    assert reader.read_message() is None
    assert kept == [0, 1]


def test_messages_as_long_as_the_one_before_come_with_one_read_each() -> None:
    """From the second on, and without a byte of the next: else its head would be moved twice."""
    frame = frame_header(OP_BINARY, 61_444) + bytes(61_444)
    source = Source(frame * 4, [])
    reader = FrameReader(source, is_masked=False)  # type: ignore[arg-type]
    for _ in range(4):
        assert reader.read_message() == (OP_BINARY, bytearray(61_444))
    # The first read took the head of the second frame with it, whose rest came to where it stays.
    assert source.sizes == [64 * 1024, len(frame), len(frame)]
    assert source.sizes_into == [2 * len(frame) - 64 * 1024]


def test_small_messages_come_many_with_one_read_again() -> None:
    """After a large one too."""
    large = frame_header(OP_BINARY, 61_444) + bytes(61_444)
    small = frame_header(OP_TEXT, 2) + b"{}"
    source = Source(large + small * 100, [len(large) + len(small)])
    reader = FrameReader(source, is_masked=False)  # type: ignore[arg-type]
    for _ in range(101):
        assert reader.read_message() is not None
    assert source.sizes == [64 * 1024, 64 * 1024]
