"""The stream state from channel to channel: what is kept, sent again, said again, acked again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from http_network_relay.end.stream import Ack, Position, ReceiveStream, SendStream, Stream
from http_network_relay.leg.send_queue import SendQueue
from http_network_relay.wire.constants import MAX_DATA_BYTES, MIN_WINDOW_BYTES
from http_network_relay.wire.errors import TunnelError
from tests.support.taking import take
from tests.support.targets import pseudo_random_bytes

KIB = 1024
MIB = 1024 * KIB


def pieces(out: SendStream) -> list[bytes]:
    """All messages that go out now."""
    return [bytes(piece) for piece in iter(out.next_piece, None)]


def sent(out: SendStream) -> bytes:
    """The same, joined: boundaries mean nothing."""
    return b"".join(pieces(out))


def sender(*data: bytes, limit: int = MIB) -> SendStream:
    """One that has taken these pieces and sent what the limit allows."""
    out = SendStream()
    out.limit = limit
    for piece in data:
        out.take(piece)
        pieces(out)
    return out


def finish(out: SendStream) -> None:
    """End the source and send the eof."""
    out.end()
    assert out.next_eof() == out.taken


# The sender: what is sent again.


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 30, 2], [40], [39, 1], [5000, 1, 4096, 3]])
def test_bytes_are_sent_again_from_every_position(sizes: list[int]) -> None:
    """Whatever the pieces they came in, and however much of them was acked."""
    data = pseudo_random_bytes(sum(sizes))
    parts, at = [], 0
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    step = max(1, len(data) // 40)
    for received in range(0, len(data) + 1, step):
        for delivered in {0, received // 2, received}:
            out = sender(*parts)
            out.resume(Position(received, delivered, MIB))
            assert (out.sent, out.delivered) == (received, delivered)
            assert sent(out) == data[received:]
            assert out.sent == out.taken == len(data)


def test_bytes_are_sent_again_as_far_as_the_new_limit_goes() -> None:
    """Credit starts anew, lower than what was sent before; a new ack lets the rest out."""
    data = pseudo_random_bytes(200 * KIB)
    out = sender(data)
    out.resume(Position(50 * KIB, 0, 120 * KIB))
    assert out.credit == 0  # Nothing new while old bytes wait.
    got = sent(out)
    assert out.sent == 120 * KIB
    out.on_ack(Ack(60 * KIB, 150 * KIB, False))
    got += sent(out)
    assert (out.sent, out.credit) == (150 * KIB, 0)
    out.on_ack(Ack(150 * KIB, MIB, False))
    got += sent(out)
    assert got == data[50 * KIB :]
    assert out.credit == MIB - 200 * KIB


def test_limit_below_what_the_peer_has_received_sends_nothing_and_is_no_error() -> None:
    """A server may lower it so far: to `delivered` and 256 KiB."""
    out = sender(b"0123456789")
    out.resume(Position(8, 2, 5))
    assert (sent(out), out.credit) == (b"", 0)
    out.on_ack(Ack(8, 9, False))
    assert sent(out) == b"8"


def test_messages_of_a_replay_are_64_kib_at_most() -> None:
    """However they were merged."""
    out = sender(*[b"x" * 1000] * 300)
    out.resume(Position(1, 0, MIB))
    again = pieces(out)
    assert sum(map(len, again)) == 299_999
    assert max(map(len, again)) <= MAX_DATA_BYTES


def test_second_resume_begins_again_at_its_own_position() -> None:
    """What the first one did not get through is sent again by the second."""
    data = pseudo_random_bytes(100 * KIB)
    out = sender(data)
    out.resume(Position(0, 0, 30 * KIB))
    assert sent(out) == data[: 30 * KIB]
    out.resume(Position(10 * KIB, 10 * KIB, MIB))
    assert sent(out) == data[10 * KIB :]


def test_new_bytes_follow_the_replay() -> None:
    """In the order of the source."""
    out = sender(b"abc")
    out.resume(Position(1, 1, 3))
    out.take(b"def")
    assert sent(out) == b"bc"
    out.on_ack(Ack(3, 100, False))
    out.take(b"ghi")
    assert sent(out) == b"defghi"


def test_credit_that_was_read_before_a_resume_is_used_after_it_without_harm() -> None:
    """The source was read meanwhile: its bytes wait for the credit of the new channel."""
    out = sender(b"a" * 100, limit=1000)
    stale = out.credit
    assert stale == 900
    out.resume(Position(100, 100, 150))
    out.take(b"b" * stale)
    assert sent(out) == b"b" * 50
    assert (out.sent, out.credit) == (150, 0)
    out.on_ack(Ack(150, 5000, False))
    assert sent(out) == b"b" * 850


def test_small_pieces_grow_together_while_a_view_of_the_last_is_in_an_outbox() -> None:
    """A bytearray cannot grow while a view of it exists; what was sent must not change."""
    frame_sender = SendQueue()
    out = SendStream()
    out.limit = 5
    for number in range(3):
        out.take(b"%d" % number * 4)
        while (piece := out.next_piece()) is not None:
            frame_sender.put_data(1, b"", piece)
    held = [memoryview(piece) for piece in out._kept]  # As a replay that is on its way holds it.
    del held
    out.resume(Position(1, 0, 7))
    views = list(iter(out.next_piece, None))
    out.take(b"more")
    out.take(b"still more")
    assert b"".join(bytes(view) for view in views) == b"000111"
    out.on_ack(Ack(0, 100, False))
    assert sent(out) == b"12222morestill more"
    frame = take(frame_sender)
    assert frame is not None
    assert bytes(frame.payload) == b"00001"


# The sender: what is kept.


def test_kept_bytes_are_freed_when_they_are_delivered() -> None:
    """By whole pieces; small ones are merged, so that single bytes cost little."""
    out = sender(*[b"x"] * 10_000)
    assert out.kept_bytes == 10_000
    assert len(out._kept) == 3
    out.on_ack(Ack(9_000, MIB, False))
    assert 1000 <= out.kept_bytes <= 1000 + 4096
    out.on_ack(Ack(10_000, MIB, False))
    assert (out.kept_bytes, len(out._kept)) == (0, 0)


def test_kept_bytes_are_freed_by_a_resume_too() -> None:
    """`resume` and `resumed` say what was delivered, as an ack does."""
    out = sender(bytes(100 * KIB))
    out.resume(Position(100 * KIB, 100 * KIB, MIB))
    assert (out.kept_bytes, len(out._kept), len(out._unsent)) == (0, 0, 0)


def test_forgotten_bytes_are_freed_and_a_finished_stream_is_resumed_without_them() -> None:
    """A tunnel that is remembered keeps its counts alone."""
    out = sender(b"abc")
    finish(out)
    out.on_ack(Ack(3, MIB, True))
    out.forget()
    assert (out.kept_bytes, len(out._kept)) == (0, 0)
    out.check_resume(Position(3, 3, 10))
    out.resume(Position(3, 3, 10))
    assert (sent(out), out.next_eof()) == (b"", 3)


@pytest.mark.parametrize(
    "peer",
    [
        Position(60, 29, MIB),  # delivered falls
        Position(101, 60, MIB),  # more than was ever taken
        Position(50, 51, MIB),  # more delivered than received
        Position(29, 29, MIB),
    ],
)
def test_counts_that_cannot_be_true_change_nothing(peer: Position) -> None:
    """The error is the tunnel's; its bytes and credit are as they were."""
    out = sender(bytes(100), limit=200)
    out.on_ack(Ack(30, 200, False))
    before = {**vars(out), "_kept": list(out._kept), "_unsent": list(out._unsent)}
    with pytest.raises(TunnelError):
        out.check_resume(peer)
    assert {**vars(out), "_kept": list(out._kept), "_unsent": list(out._unsent)} == before


@pytest.mark.parametrize(("received", "delivered"), [(30, 30), (100, 30), (100, 100), (64, 50)])
def test_counts_at_the_edge_are_accepted(received: int, delivered: int) -> None:
    """From what was acked to all that was taken."""
    out = sender(bytes(100))
    out.on_ack(Ack(30, MIB, False))
    out.check_resume(Position(received, delivered, MIB))


# The sender: the eof.


def test_eof_is_said_again_behind_the_replay_even_if_it_was_acked() -> None:
    """The server's counters of the new channel need it."""
    out = sender(b"abc")
    finish(out)
    out.on_ack(Ack(3, MIB, True))
    assert out.eof_acked
    out.resume(Position(3, 3, MIB))
    assert not out.eof_acked
    assert out.next_eof() == 3
    out.on_ack(Ack(3, MIB, True))
    assert out.eof_acked


def test_eof_comes_behind_a_replay_that_waits_for_credit() -> None:
    """Not before its last byte."""
    out = sender(b"abcdef")
    finish(out)
    out.resume(Position(2, 2, 4))
    assert (sent(out), out.next_eof()) == (b"cd", None)
    out.on_ack(Ack(4, 6, False))
    assert (sent(out), out.next_eof()) == (b"ef", 6)


def test_ack_of_an_eof_that_was_not_said_on_this_channel_is_an_error() -> None:
    """It cannot be true, whatever was said on an earlier one."""
    out = sender(b"abc")
    finish(out)
    out.resume(Position(3, 3, MIB))
    with pytest.raises(TunnelError):
        out.on_ack(Ack(3, MIB, True))
    assert not out.eof_acked


# The receiver.


def test_position_says_what_came_what_was_handed_on_and_the_limit_as_it_stands() -> None:
    """The limit never below what has come already."""
    into = ReceiveStream()
    into.on_data(100 * KIB, 0.0)
    into.on_delivered(10 * KIB, 0.0, drained=False)
    assert into.resume() == Position(100 * KIB, 10 * KIB, 10 * KIB + MIN_WINDOW_BYTES)
    into.received = 2 * MIB
    assert into.resume() == Position(2 * MIB, 10 * KIB, 2 * MIB)


def test_limit_may_fall_from_channel_to_channel_and_is_kept_on_the_new_one() -> None:
    """The window begins anew; beyond the new limit is an overrun."""
    into = ReceiveStream(4 * MIB)
    into._window.size = into.limit = 4 * MIB
    into.on_data(100, 0.0)
    assert into.resume().limit == MIN_WINDOW_BYTES
    with pytest.raises(TunnelError, match="overrun"):
        into.on_data(MIN_WINDOW_BYTES, 0.0)
    into.on_data(MIN_WINDOW_BYTES - 100, 0.0)


def test_acks_are_counted_from_what_the_resume_said() -> None:
    """A quarter after it, not before."""
    into = ReceiveStream()
    into.on_data(200 * KIB, 0.0)
    assert into.on_delivered(60 * KIB, 0.0, drained=False) is None
    into.resume()
    assert into.on_delivered(64 * KIB - 1, 0.0, drained=False) is None
    ack = into.on_delivered(1, 0.0, drained=False)
    assert ack == Ack(124 * KIB, 124 * KIB + MIN_WINDOW_BYTES, False)


def test_trip_is_not_measured_across_a_resume() -> None:
    """A minute without a leg is no queue, and what was known of the way is old."""
    into = ReceiveStream(4 * MIB)
    into._window.size = into.limit = 4 * MIB
    into.on_data(MIB, 0.0)
    assert into.on_delivered(MIB, 0.0, drained=True) is not None
    into.resume()
    assert into.window == MIN_WINDOW_BYTES
    into.on_data(into.limit - into.received, 60.0)
    assert into.window == MIN_WINDOW_BYTES


def test_eof_of_an_earlier_channel_is_not_acked_on_a_new_one_before_it_comes_there() -> None:
    """The server has not seen it there: such an ack could not be true."""
    into = ReceiveStream()
    into.on_data(100 * KIB, 0.0)
    into.on_eof(100 * KIB)
    into.resume()
    ack = into.on_delivered(100 * KIB, 0.0, drained=True)
    assert ack is not None
    assert not ack.eof
    assert into.on_eof_delivered(0.0) is None
    into.on_eof(100 * KIB)
    again = into.on_eof_delivered(0.0)
    assert again is not None
    assert again.eof


def test_first_ack_of_a_new_channel_tells_no_eof_of_an_earlier_one() -> None:
    """All was handed on while nobody was there, the eof too: only the bytes are told."""
    into = ReceiveStream()
    into.on_data(100 * KIB, 0.0)
    into.on_eof(100 * KIB)
    into.resume()
    into.delivered += 100 * KIB
    assert into.on_eof_delivered(0.0) is None
    ack = into.on_delivered(0, 0.0, drained=True)
    assert ack is not None
    assert (ack.delivered, ack.eof) == (100 * KIB, False)


def test_eof_that_was_acked_is_acked_again_when_it_comes_again() -> None:
    """Finished means: both acks on one channel."""
    into = ReceiveStream()
    into.on_eof(0)
    assert into.on_eof_delivered(0.0) is not None
    into.eof_acked = True
    into.resume()
    assert not into.eof_acked
    into.on_eof(0)
    ack = into.on_eof_delivered(0.0)
    assert ack is not None
    assert ack.eof


def test_eof_comes_once_a_channel_with_the_same_count_and_no_data_behind_it() -> None:
    """A resume is no way around the rules."""
    into = ReceiveStream()
    into.on_data(3, 0.0)
    into.on_eof(3)
    into.resume()
    with pytest.raises(TunnelError, match="data after eof"):
        into.on_data(1, 0.0)
    with pytest.raises(TunnelError):
        into.on_eof(4)
    into.on_eof(3)
    with pytest.raises(TunnelError, match="second eof"):
        into.on_eof(3)


# Two ends, and channels that are cut.


@dataclass
class Channel:
    """What is on the way to each end; nothing arrives once it is cut.

    And what a server counts there: each pair is of what concerns (user, client).
    """

    lowers_to: int
    limits: list[int] = field(default_factory=lambda: [0, 0])  # as told to that sender
    forwarded: list[int] = field(default_factory=lambda: [0, 0])  # to that receiver
    acked: list[int] = field(default_factory=lambda: [0, 0])  # to that sender
    has_eof: list[bool] = field(default_factory=lambda: [False, False])  # to that receiver
    to: tuple[deque[Any], deque[Any]] = field(default_factory=lambda: (deque(), deque()))
    is_cut: bool = False

    def lowered(self, to: int, delivered: int, limit: int) -> int:
        """A server lowers a limit, never below what it said on this channel."""
        self.limits[to] = max(self.limits[to], min(limit, delivered + self.lowers_to))
        return self.limits[to]

    def begin(self, to: int, position: Position) -> Position:
        """`resume` or `resumed` passes: the counters of what its sender receives begin there."""
        self.forwarded[1 - to] = position.received
        self.acked[to] = position.delivered
        limit = self.lowered(to, position.delivered, position.limit)
        return position._replace(limit=limit)

    def next_to(self, to: int) -> tuple[str, Any] | None:
        """The next message to that end, checked as a server would."""
        if self.is_cut or not self.to[to]:
            return None
        kind, value = self.to[to].popleft()
        if kind == "data":
            assert not self.has_eof[to]
            self.forwarded[to] += len(value)
            assert self.forwarded[to] <= self.limits[1 - to], "the server would see an overrun"
        elif kind == "eof":
            assert not self.has_eof[to]
            assert value == self.forwarded[to]
            self.has_eof[to] = True
        elif kind == "ack":
            assert self.acked[to] <= value.delivered <= self.forwarded[1 - to]
            self.acked[to] = value.delivered
            if value.eof:
                assert self.has_eof[1 - to]
                assert value.delivered == self.forwarded[1 - to]
            return kind, value._replace(limit=self.lowered(to, value.delivered, value.limit))
        return kind, value


USER, CLIENT = 0, 1


class End:
    """A Stream with its source, its consumer, and the channel that it believes in."""

    def __init__(self, which: int, data: bytes, max_window: int) -> None:
        self.which = which
        self.stream = Stream(max_window)
        self.data = data
        self.read = 0  # from the source
        self.noted_credit = 0
        self.queue: deque[bytes] = deque()
        self.got = bytearray()
        self.channel: Channel | None = None

    def say(self, kind: str, value: Any) -> None:
        if self.channel is not None:
            self.channel.to[1 - self.which].append((kind, value))

    def note_credit(self) -> bool:
        """The producer sees how much it may read; it reads later."""
        before = self.noted_credit
        credit = 0 if self.channel is None else min(self.stream.out.credit, MAX_DATA_BYTES)
        self.noted_credit = max(before, credit)
        return self.noted_credit > before

    def produce(self, most: int) -> bool:
        out = self.stream.out
        size = min(most, self.noted_credit, len(self.data) - self.read)
        self.noted_credit = 0
        if size:
            out.take(self.data[self.read : self.read + size])
            self.read += size
        is_new_end = self.read == len(self.data) and not out.is_ended
        if is_new_end:
            out.end()
        self.flush()
        return bool(size) or is_new_end

    def flush(self) -> None:
        if self.channel is None:
            return
        out = self.stream.out
        while (piece := out.next_piece()) is not None:
            self.say("data", bytes(piece))
        if (count := out.next_eof()) is not None:
            self.say("eof", count)

    def consume(self, now: float) -> bool:
        into = self.stream.into
        if self.queue:
            chunk = self.queue.popleft()
            self.got += chunk
            if self.channel is None:
                into.delivered += len(chunk)
                return True
            ack = into.on_delivered(len(chunk), now, drained=not self.queue)
        elif into.eof_at is not None and not into.eof_delivered:
            ack = into.on_eof_delivered(now)
            self.note_eof_ack(ack)
        else:
            return False
        if ack is not None:
            self.say("ack", ack)
        return True

    def note_eof_ack(self, ack: Ack | None) -> None:
        if ack is not None and self.channel is not None:
            self.stream.into.eof_acked = True

    def attach(self, channel: Channel, peer: Position, now: float) -> None:
        self.channel = channel
        self.stream.out.check_resume(peer)
        self.stream.out.resume(peer)
        self.flush()
        ack = self.stream.into.on_delivered(0, now, drained=not self.queue)
        if ack is not None:
            self.say("ack", ack)

    def take(self, now: float) -> bool:
        """One message of its channel."""
        found = None if self.channel is None else self.channel.next_to(self.which)
        if found is None:
            return False
        kind, value = found
        stream = self.stream
        if kind == "data":
            stream.into.on_data(len(value), now)
            self.queue.append(value)
        elif kind == "eof":
            stream.into.on_eof(value)
            if stream.into.eof_delivered:
                ack = stream.into.on_eof_delivered(now)
                self.note_eof_ack(ack)
                self.say("ack", ack)
        else:
            stream.out.on_ack(value)
            self.flush()
        return True


class World:
    """Both ends, and a server that lowers limits and loses channels."""

    def __init__(self, data: tuple[bytes, bytes], max_window: int, lowers_to: int) -> None:
        self.ends = [End(which, data[which], max_window) for which in (USER, CLIENT)]
        self.lowers_to = lowers_to
        self.max_kept = max_window + 3 * MAX_DATA_BYTES
        self.now = 0.0
        self.resumes = 0
        # A channel on which the user has asked; the client has answered, or not yet.
        self.asked: Channel | None = None
        first = Channel(lowers_to)
        for end in self.ends:
            end.channel = first
            limit = self.ends[1 - end.which].stream.into.limit
            end.stream.out.limit = first.lowered(end.which, 0, limit)

    @property
    def user(self) -> End:
        return self.ends[USER]

    def step(self, kind: str, which: int, most: int) -> bool:
        end = self.ends[which]
        if kind == "credit":
            return end.note_credit()
        if kind == "produce":
            return end.produce(most)
        if kind == "consume":
            return end.consume(self.now)
        if kind == "take":
            return end.take(self.now)
        if kind == "cut":
            return self.cut()
        if kind == "answer":
            return self.answer()
        return self.ask(leaves=kind == "leave")

    def cut(self) -> bool:
        """The channel is lost, or the one on which a resume is under way; both ends learn late."""
        if self.user.stream.is_finished:
            return False  # The proxy command has exited.
        for channel in (self.asked, self.user.channel):
            if channel is not None:
                channel.is_cut = True
        return True

    def ask(self, *, leaves: bool) -> bool:
        """The user comes back: its old channel is deaf before it reads its position.

        `leaves`: for another network, while the old channel still carries.
        """
        user = self.user
        is_lost = user.channel is None or user.channel.is_cut
        is_asking = self.asked is not None and not self.asked.is_cut
        if user.stream.is_finished or is_asking or not (is_lost or leaves):
            return False
        user.channel = None
        self.resumes += 1
        # Another server, with another cap.
        self.asked = Channel(MIN_WINDOW_BYTES if self.resumes % 2 else self.lowers_to)
        self.asked.to[CLIENT].append(user.stream.into.resume())
        return True

    def answer(self) -> bool:
        """The client takes the resume; then the user takes the answer, in a step of its own."""
        asked, client = self.asked, self.ends[CLIENT]
        if asked is None or asked.is_cut:
            return False
        if client.channel is not asked:
            position = asked.begin(CLIENT, asked.to[CLIENT].popleft())
            client.channel = asked
            asked.to[USER].append(("resumed", client.stream.into.resume()))
            client.attach(asked, position, self.now)
            return True
        kind, position = asked.to[USER].popleft()
        assert kind == "resumed"
        self.asked = None
        self.user.attach(asked, asked.begin(USER, position), self.now)
        return True

    def check(self) -> None:
        for end, peer in ((self.user, self.ends[CLIENT]), (self.ends[CLIENT], self.user)):
            assert end.stream.out.kept_bytes <= self.max_kept
            assert end.got == peer.data[: len(end.got)]


GO_ON = ("take", "consume", "credit", "produce", "ask", "answer")
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*GO_ON, "all", "all", "cut", "cut", "leave"]),
        st.sampled_from([USER, CLIENT]),
        st.integers(1, 100 * KIB),
        st.integers(1, 8),  # times
    ),
    min_size=10,
    max_size=120,
)
SIZES = st.one_of(st.integers(0, MIB), st.integers(0, 100 * KIB), st.just(0))
SOURCE = pseudo_random_bytes(MIB)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(SIZES, SIZES),
    max_window=st.sampled_from([MIN_WINDOW_BYTES, MIB]),
    lowers_to=st.sampled_from([MIN_WINDOW_BYTES, 4 * MIB]),
    steps=STEPS,
)
def test_two_streams_carry_all_bytes_once_and_finish_whatever_channels_are_lost(
    sizes: tuple[int, int],
    max_window: int,
    lowers_to: int,
    steps: list[tuple[str, int, int, int]],
) -> None:
    """Cuts at any point, in a resume too; no byte twice or missing, no error, no standstill."""
    data = (SOURCE[: sizes[0]], SOURCE[MIB - sizes[1] :])
    world = World(data, max_window, lowers_to)
    for kind, which, most, times in steps:
        for _ in range(times):
            for each in GO_ON if kind == "all" else (kind,):
                world.step(each, which, most)
        world.now += 0.01
        world.check()
    # Then no more cuts: everything that can go on goes on, until nothing can.
    moved = True
    while moved:
        world.now += 0.001
        moved = any([world.step(kind, which, MIB) for kind in GO_ON for which in (USER, CLIENT)])
    world.check()
    for end, peer in ((world.user, world.ends[CLIENT]), (world.ends[CLIENT], world.user)):
        assert len(end.got) == len(peer.data)
    assert world.user.stream.is_finished
    # A proxy command may finish before it notices that its last ack is lost: nobody comes back.
    if world.user.channel is not None and not world.user.channel.is_cut:
        assert world.ends[CLIENT].stream.is_finished
        assert [end.stream.out.kept_bytes for end in world.ends] == [0, 0]
