"""The stream state: credit, acks, the window, the ends. Times are scripted."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from http_network_relay.end.stream import Ack, ReceiveStream, SendStream, Stream
from http_network_relay.wire.constants import (
    LEAST_WINDOW_BYTES,
    MAX_COUNT,
    MAX_DATA_BYTES,
    MESSAGE_BYTES,
    MIN_WINDOW_BYTES,
)
from http_network_relay.wire.errors import TunnelError
from http_network_relay.wire.frames import frame_header

KIB = 1024
MIB = 1024 * KIB


def sender(limit: int) -> SendStream:
    made = SendStream()
    made.limit = limit
    return made


def pieces(out: SendStream) -> list[bytes]:
    """All messages that go out now."""
    return [bytes(piece) for piece in iter(out.next_piece, None)]


def send(out: SendStream, size: int) -> None:
    """Take so many bytes from the source, and send what the credit allows."""
    out.take(b"x" * size)
    pieces(out)


# The sender.


def test_sender_has_no_credit_before_it_was_told_a_limit() -> None:
    """A new stream may not send a byte."""
    assert SendStream().credit == 0


def test_sender_sends_no_byte_beyond_its_limit_whatever_was_taken() -> None:
    """Our own mistake, or credit that fell, must not become an error at the peer."""
    out = sender(10)
    out.take(b"0123456")
    assert pieces(out) == [b"0123456"]
    out.take(b"789abc")
    assert pieces(out) == [b"789"]
    assert (out.taken, out.sent, out.credit) == (13, 10, 0)
    out.on_ack(Ack(0, 11, False))
    assert pieces(out) == [b"a"]
    # What was taken goes first: no credit for more while it waits.
    assert (out.sent, out.credit) == (11, 0)
    out.on_ack(Ack(0, 100, False))
    assert pieces(out) == [b"bc"]
    assert (out.sent, out.credit) == (13, 87)


def test_sender_cuts_messages_that_cross_loopback_in_one_segment() -> None:
    """Of 65,483 bytes, header and channel included; and a legal message."""
    out = sender(MIB)
    out.take(bytes(MESSAGE_BYTES + 1))
    assert [len(piece) for piece in pieces(out)] == [MESSAGE_BYTES, 1]
    assert len(frame_header(2, 4 + MESSAGE_BYTES, bytes(4))) + 4 + MESSAGE_BYTES <= 65_483
    assert MESSAGE_BYTES <= MAX_DATA_BYTES


@pytest.mark.parametrize(
    ("window", "size"),
    [(MIB, MESSAGE_BYTES), (256 * KIB, MESSAGE_BYTES), (160 * KIB, 10 * KIB), (16 * KIB, 4 * KIB)],
)
def test_sender_cuts_messages_small_when_the_window_is(window: int, size: int) -> None:
    """A keystroke waits for the rest of one, and a small window tells of a thin link."""
    out = sender(0)
    out.on_ack(Ack(0, window, False))
    out.take(bytes(window))
    assert max(len(piece) for piece in pieces(out)) == size


def test_messages_of_a_slow_source_are_not_cut() -> None:
    """Its window is small too, but credit is left when an ack comes; until there is none."""
    out = sender(160 * KIB)
    send(out, 32 * KIB)
    out.on_ack(Ack(32 * KIB, 192 * KIB, False))
    out.take(bytes(MESSAGE_BYTES))
    assert [len(piece) for piece in pieces(out)] == [MESSAGE_BYTES]
    send(out, 160 * KIB - MESSAGE_BYTES)
    out.on_ack(Ack(192 * KIB, 352 * KIB, False))
    out.take(bytes(64 * KIB))
    assert max(len(piece) for piece in pieces(out)) == 10 * KIB


def test_eof_ends_credit_and_says_the_count() -> None:
    """Nothing follows an eof, whatever the limit says."""
    out = sender(10)
    send(out, 4)
    assert out.next_eof() is None  # The source goes on.
    out.end()
    assert out.next_eof() == 4
    assert out.next_eof() is None
    assert out.credit == 0
    out.on_ack(Ack(2, 1000, False))
    assert out.credit == 0


def test_eof_waits_for_bytes_that_have_no_credit() -> None:
    """It comes behind the last byte; itself it needs no credit."""
    out = sender(3)
    out.take(b"abcde")
    out.end()
    assert pieces(out) == [b"abc"]
    assert out.next_eof() is None
    out.on_ack(Ack(0, 5, False))
    assert pieces(out) == [b"de"]
    assert (out.sent, out.limit, out.next_eof()) == (5, 5, 5)


@pytest.mark.parametrize(
    "ack",
    [
        Ack(6, 100, False),  # more than was sent
        Ack(1, 100, False),  # less than was acked
        Ack(3, 99, False),  # a limit that falls
        Ack(5, 100, True),  # of an eof that was not sent
    ],
)
def test_sender_refuses_an_ack_that_cannot_be_true(ack: Ack) -> None:
    """The error is the tunnel's, and the state stays as it was."""
    out = sender(100)
    send(out, 5)
    out.on_ack(Ack(2, 100, False))
    with pytest.raises(TunnelError):
        out.on_ack(ack)
    assert (out.delivered, out.limit, out.eof_acked) == (2, 100, False)


def test_sender_refuses_the_ack_of_an_eof_when_bytes_are_missing() -> None:
    """The eof comes behind all bytes, so its ack does too."""
    out = sender(100)
    send(out, 5)
    out.end()
    assert out.next_eof() == 5
    with pytest.raises(TunnelError):
        out.on_ack(Ack(4, 100, True))
    out.on_ack(Ack(5, 100, True))
    assert out.eof_acked


def test_acked_eof_stays_acked_when_a_later_ack_does_not_say_so() -> None:
    """A flag that is up does not come down."""
    out = sender(100)
    out.end()
    assert out.next_eof() == 0
    out.on_ack(Ack(0, 100, True))
    out.on_ack(Ack(0, 100, False))
    assert out.eof_acked


# The receiver: acks.


def test_ack_is_due_after_a_quarter_of_the_window() -> None:
    """Not a byte sooner while more is queued."""
    into = ReceiveStream(MIB)
    into.on_data(200 * KIB, 0.0)
    assert into.on_delivered(64 * KIB - 1, 0.0, drained=False) is None
    assert into.on_delivered(1, 0.0, drained=False) == Ack(64 * KIB, 320 * KIB, False)
    # Counted anew from that ack.
    assert into.on_delivered(64 * KIB - 1, 0.0, drained=False) is None
    assert into.on_delivered(1, 0.0, drained=False) == Ack(128 * KIB, 384 * KIB, False)


def test_ack_is_due_at_64_kib_when_the_queue_is_empty() -> None:
    """The server may have lowered the limit, so a large window alone must not hold it back."""
    into = ReceiveStream(4 * MIB)
    into._window.size = into.limit = 4 * MIB
    into.on_data(64 * KIB, 0.0)
    assert into.on_delivered(64 * KIB - 1, 0.0, drained=True) is None
    assert into.on_delivered(1, 0.0, drained=True) == Ack(64 * KIB, 64 * KIB + 4 * MIB, False)


def test_large_window_waits_for_its_quarter_when_more_is_queued() -> None:
    """The 64 KiB rule is for an empty queue alone."""
    into = ReceiveStream(4 * MIB)
    into._window.size = 4 * MIB
    into.limit = 4 * MIB
    into.on_data(2 * MIB, 0.0)
    assert into.on_delivered(MIB - 1, 0.0, drained=False) is None
    assert into.on_delivered(1, 0.0, drained=False) == Ack(MIB, 5 * MIB, False)


def test_ack_of_the_eof_is_due_at_once() -> None:
    """However few bytes there were."""
    into = ReceiveStream()
    into.on_data(1, 0.0)
    assert into.on_delivered(1, 0.0, drained=True) is None
    into.on_eof(1)
    assert into.on_eof_delivered(0.0) == Ack(1, 1 + MIN_WINDOW_BYTES, True)


def test_overrun_is_refused_at_the_byte() -> None:
    """The limit itself may be filled, not passed; what is refused is not counted."""
    into = ReceiveStream()
    into.on_data(into.limit, 0.0)
    with pytest.raises(TunnelError, match="overrun"):
        into.on_data(1, 0.0)
    assert into.received == into.limit


def test_bytes_and_a_second_eof_are_refused_after_eof() -> None:
    """Nothing follows an eof."""
    into = ReceiveStream()
    into.on_data(3, 0.0)
    into.on_eof(3)
    with pytest.raises(TunnelError, match="data after eof"):
        into.on_data(1, 0.0)
    with pytest.raises(TunnelError, match="second eof"):
        into.on_eof(3)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_eof_is_refused_when_its_count_is_not_that_of_the_bytes(count: int) -> None:
    """A lost or doubled byte is noticed at the end at the latest."""
    into = ReceiveStream()
    into.on_data(3, 0.0)
    with pytest.raises(TunnelError):
        into.on_eof(count)
    assert into.eof_at is None


def test_limit_ends_at_the_largest_exact_count() -> None:
    """Beyond 2**53 a JSON number is not exact."""
    into = ReceiveStream()
    into.received = into.delivered = MAX_COUNT - 10
    into.on_eof(into.received)
    ack = into.on_eof_delivered(0.0)
    assert ack is not None
    assert ack.limit == MAX_COUNT


# The receiver: the window. How it finds its size: test_window.py.


@dataclass
class Link:
    """A sender that fills its credit at once, over a link of `round_trip_s`."""

    into: ReceiveStream
    now: float = 0.0
    limits: list[int] = field(default_factory=list)

    def fill(self, round_trip_s: float, *, share: float = 1.0) -> int:
        """One round: an ack goes out, and `share` of the window comes after the round trip."""
        into = self.into
        size = int((into.limit - into.received) * share)
        into.on_data(size, self.now)
        ack = None
        while into.delivered < into.received:
            piece = min(64 * KIB, into.received - into.delivered)
            drained = into.delivered + piece == into.received
            ack = into.on_delivered(piece, self.now, drained=drained) or ack
        if ack is not None:
            self.limits.append(ack.limit)
        self.now += round_trip_s
        return into.window


def test_limit_never_falls_while_the_window_shrinks() -> None:
    """Credit that was given stays given."""
    link = Link(ReceiveStream(4 * MIB))
    for round_trip_s in [0.01] * 8 + [1.0] * 30:
        link.fill(round_trip_s)
    assert link.limits == sorted(link.limits)


@given(
    cap=st.integers(MIN_WINDOW_BYTES, 8 * MIB),
    rounds=st.lists(
        st.tuples(st.floats(0, 10), st.floats(0.01, 1)),
        min_size=1,
        max_size=40,
    ),
)
def test_window_and_limit_keep_their_bounds_whatever_the_times(
    cap: int, rounds: list[tuple[float, float]]
) -> None:
    """Floor, cap, and a limit that only rises, for any round trips and any use."""
    link = Link(ReceiveStream(cap))
    for round_trip_s, share in rounds:
        window = link.fill(round_trip_s, share=share)
        assert LEAST_WINDOW_BYTES <= window <= cap
        assert link.into.limit <= link.into.delivered + cap
        assert link.into.received <= link.into.limit
    assert link.limits == sorted(link.limits)


# Two ends.


class End:
    """One Stream, its consumer's queue, and what travels to the other end."""

    def __init__(self, to_send: int, max_window: int) -> None:
        self.stream = Stream(max_window)
        self.to_send = to_send
        self.queued = 0
        self.wire: deque[tuple[str, Any]] = deque()  # towards the peer, in order

    def send(self, most: int) -> bool:
        out = self.stream.out
        size = min(most, out.credit, self.to_send)
        if size:
            out.take(bytes(size))
            self.to_send -= size
            self.wire.extend(("data", len(piece)) for piece in pieces(out))
        elif not self.to_send and not out.eof_sent:
            out.end()
            self.wire.append(("eof", out.next_eof()))
        else:
            return False
        return True

    def deliver(self, most: int, now: float) -> bool:
        into = self.stream.into
        size = min(most, self.queued)
        if size:
            self.queued -= size
            ack = into.on_delivered(size, now, drained=not self.queued)
        elif into.eof_at is not None and not into.eof_delivered:
            ack = into.on_eof_delivered(now)
            into.eof_acked = True
        else:
            return False
        if ack is not None:
            self.wire.append(("ack", ack))
        return True

    def take_from(self, peer: End, now: float, *, lowers_to: int | None) -> bool:
        if not peer.wire:
            return False
        kind, value = peer.wire.popleft()
        if kind == "data":
            self.stream.into.on_data(value, now)
            self.queued += value
        elif kind == "eof":
            self.stream.into.on_eof(value)
        else:
            if lowers_to is not None:
                # What the server may do to a limit on its way.
                lowered = min(value.limit, value.delivered + lowers_to)
                value = value._replace(limit=max(lowered, self.stream.out.limit))
            self.stream.out.on_ack(value)
        return True


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "deliver", "take"]),
        st.booleans(),
        st.integers(1, 200 * KIB),
        st.floats(0, 2),
    ),
    max_size=200,
)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 6 * MIB), st.integers(0, 6 * MIB)),
    max_window=st.sampled_from([MIN_WINDOW_BYTES, MIB, 4 * MIB]),
    lowers_to=st.sampled_from([None, MIN_WINDOW_BYTES, MIB]),
    steps=STEPS,
    last_chunk=st.sampled_from([1 * KIB + 1, 16 * KIB, 64 * KIB]),
)
def test_two_streams_deliver_all_and_finish_in_any_order_of_events(
    sizes: tuple[int, int],
    max_window: int,
    lowers_to: int | None,
    steps: list[tuple[str, bool, int, float]],
    last_chunk: int,
) -> None:
    """No interleaving overruns, and none stops for ever, with a server that lowers limits too."""
    ends = [End(size, max_window) for size in sizes]
    for end in ends:
        first = MIN_WINDOW_BYTES if lowers_to is None else min(MIN_WINDOW_BYTES, lowers_to)
        end.stream.out.limit = first
    now = 0.0

    def step(kind: str, which: int, most: int) -> bool:
        end, peer = ends[which], ends[1 - which]
        if kind == "send":
            return end.send(most)
        if kind == "deliver":
            return end.deliver(most, now)
        return end.take_from(peer, now, lowers_to=lowers_to)

    for kind, second, most, later in steps:
        step(kind, int(second), min(most, 64 * KIB) if kind == "send" else most)
        now += later
    # Then everything that can go on goes on, until nothing can.
    moved = True
    while moved:
        now += 0.001
        moved = any(
            [
                step(kind, which, last_chunk)
                for kind in ("send", "deliver", "take")
                for which in (0, 1)
            ]
        )
    for end, size, other in zip(ends, sizes, reversed(sizes), strict=True):
        assert (end.to_send, end.queued, len(end.wire)) == (0, 0, 0)
        assert (end.stream.out.sent, end.stream.into.delivered) == (size, other)
        assert end.stream.is_finished


def test_stream_is_finished_only_when_both_ways_are_through() -> None:
    """Each of the four conditions is needed."""
    stream = Stream()
    stream.out.limit = 10
    stream.out.end()
    assert stream.out.next_eof() == 0
    stream.into.on_eof(0)
    assert not stream.is_finished
    stream.out.on_ack(Ack(0, 10, True))
    assert not stream.is_finished
    stream.into.on_eof_delivered(0.0)
    assert not stream.is_finished  # Its ack is not on its way yet.
    stream.into.eof_acked = True
    assert stream.is_finished
