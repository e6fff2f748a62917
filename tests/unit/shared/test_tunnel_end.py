"""One end of a tunnel between its threads: what wakes whom, and which end counts."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import http_network_relay.end.client_end
import http_network_relay.end.inbound
import http_network_relay.end.state
import http_network_relay.leg.send_queue
from http_network_relay.end.channel import Channel
from http_network_relay.end.client_end import ClientEnd
from http_network_relay.end.stream import Ack, Position
from http_network_relay.end.user_end import UserEnd
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.wire.constants import MAX_DATA_BYTES, MIN_WINDOW_BYTES, OP_BINARY
from http_network_relay.wire.errors import RelayError, TunnelError
from tests.support.clock import Clock
from tests.support.taking import take
from tests.support.waiting import eventually

GONE = RelayError("user_gone", "gone")
LOST = RelayError("leg_lost", "lost")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all files."""
    clock = Clock()
    clock.replace_in(
        monkeypatch,
        http_network_relay.end.client_end,
        http_network_relay.end.inbound,
        http_network_relay.end.state,
        http_network_relay.leg.send_queue,
    )
    return clock


@pytest.fixture(params=[0, 7], ids=["user leg", "client leg"])
def channel_id(request: pytest.FixtureRequest) -> int:
    """Both kinds of leg."""
    number: int = request.param
    return number


@pytest.fixture
def frame_sender() -> FrameSender:
    """Of the leg."""
    return FrameSender()


@pytest.fixture
def channel(frame_sender: FrameSender, channel_id: int) -> Channel:
    """The channel."""
    return Channel(frame_sender, channel_id)


@pytest.fixture
def end(channel: Channel) -> ClientEnd:
    """An end that is open, with credit for a window, and no grace."""
    made = ClientEnd(channel, MIN_WINDOW_BYTES)
    assert made.on_open(MIN_WINDOW_BYTES, 0)
    return made


def sent(frame_sender: FrameSender) -> list[Any]:
    """What the leg would write now: bytes, or the control's dict."""
    frames = []
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        is_data = frame.opcode == OP_BINARY
        frames.append(bytes(frame.payload) if is_data else json.loads(frame.payload))
    return frames


def waiting(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that does that work; its result comes into the list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


# Before it is open.


@pytest.mark.parametrize(
    "message",
    [
        lambda end, channel: end.inbound.on_data(channel, b"x"),
        lambda end, channel: end.inbound.on_eof(channel, 0),
        lambda end, channel: end.outbound.on_ack(channel, Ack(0, 10, False)),
    ],
    ids=["data", "eof", "ack"],
)
def test_message_before_open_is_a_tunnel_error(
    channel: Channel, channel_id: int, message: Callable[[ClientEnd, Channel], None]
) -> None:
    """With the channel that it concerns."""
    end = ClientEnd(channel, MIN_WINDOW_BYTES)
    with pytest.raises(TunnelError) as caught:
        message(end, channel)
    assert caught.value.channel == channel_id


def test_open_that_comes_after_the_end_is_told() -> None:
    """The dial was too late: close the socket."""
    end = ClientEnd(Channel(FrameSender(), 1), MIN_WINDOW_BYTES)
    end.on_end(GONE)
    assert not end.on_open(100, 0)
    assert end.outbound.credit() == 0


# Sending.


def test_send_takes_credit_and_stands_in_the_outbox(
    end: ClientEnd, frame_sender: FrameSender, channel_id: int
) -> None:
    """All of the window; the head names the channel."""
    assert end.outbound.credit() == 4 * MAX_DATA_BYTES
    end.outbound.send(b"abc")
    frame = take(frame_sender)
    assert frame is not None
    assert (frame.head, frame.payload) == (
        channel_id.to_bytes(4, "big") if channel_id else b"",
        b"abc",
    )
    for _ in range(3):
        end.outbound.send(bytes(MAX_DATA_BYTES))
    assert end.outbound.credit() == MAX_DATA_BYTES - 3
    end.outbound.send(bytes(MAX_DATA_BYTES - 3))
    assert end.outbound.credit() == 0


@pytest.mark.parametrize("by", ["ack", "end", "reset"])
def test_producer_without_credit_is_woken(end: ClientEnd, channel: Channel, by: str) -> None:
    """By an ack with its size, by an end with 0."""
    for _ in range(4):
        end.outbound.send(bytes(MAX_DATA_BYTES))
    thread, results = waiting(end.outbound.wait_credit)
    if by == "ack":
        end.outbound.on_ack(channel, Ack(1000, MIN_WINDOW_BYTES + 1000, False))
    elif by == "end":
        end.on_end(LOST)
    else:
        end.reset(LOST)
    thread.join(5.0)
    assert not thread.is_alive()
    assert results == [1000 if by == "ack" else 0]


def test_nothing_is_sent_after_the_end(end: ClientEnd, frame_sender: FrameSender) -> None:
    """A producer that was a moment late is silent, not an error."""
    end.on_end(LOST)
    end.outbound.send(b"late")
    assert end.outbound.send_eof()
    end.inbound.delivered(5)
    assert sent(frame_sender) == []


# Handing on.


def test_chunks_come_in_order_then_the_eof_then_nothing(
    end: ClientEnd, channel: Channel, frame_sender: FrameSender
) -> None:
    """Small ones may have grown together; eof is b""."""
    end.inbound.on_data(channel, b"one")
    end.inbound.on_data(channel, memoryview(b"two"))
    end.inbound.on_eof(channel, 6)
    assert bytes(end.inbound.next_chunk()) == b"onetwo"
    end.inbound.delivered(6)
    assert end.inbound.next_chunk() == b""
    end.inbound.delivered_eof()
    assert [frame["eof"] for frame in sent(frame_sender)] == [True]
    assert not end.is_over
    end.on_end(LOST)
    assert end.inbound.next_chunk() is None


@pytest.mark.parametrize("by", ["data", "eof", "end"])
def test_consumer_without_news_is_woken(end: ClientEnd, channel: Channel, by: str) -> None:
    """By each of the three."""
    thread, results = waiting(end.inbound.next_chunk)
    if by == "data":
        end.inbound.on_data(channel, b"x")
    elif by == "eof":
        end.inbound.on_eof(channel, 0)
    else:
        end.on_end(LOST)
    thread.join(5.0)
    assert not thread.is_alive()
    assert results == [{"data": b"x", "eof": b"", "end": None}[by]]


def test_bytes_before_an_end_are_handed_on_for_a_second(
    end: ClientEnd, channel: Channel, clock: Clock
) -> None:
    """They came first; then the time is over."""
    block = bytes(MAX_DATA_BYTES)
    for _ in range(3):
        end.inbound.on_data(channel, block)
    end.on_end(GONE)
    assert end.inbound.next_chunk() == block
    clock.advance(0.999)
    assert not end.must_stop()
    assert end.inbound.next_chunk() == block
    clock.advance(0.001)
    assert end.must_stop()
    assert end.inbound.next_chunk() is None


def test_eof_before_an_end_is_handed_on(end: ClientEnd, channel: Channel) -> None:
    """A whole file came, and then the line was lost: the file is whole."""
    end.inbound.on_data(channel, b"all")
    end.inbound.on_eof(channel, 3)
    end.on_end(LOST)
    assert end.inbound.next_chunk() == b"all"
    assert end.inbound.next_chunk() == b""


def test_bytes_after_an_end_are_dropped(end: ClientEnd, channel: Channel) -> None:
    """Whatever they are."""
    end.on_end(LOST)
    end.inbound.on_data(channel, bytes(10 * MIN_WINDOW_BYTES))
    end.inbound.on_eof(channel, 99)
    end.outbound.on_ack(channel, Ack(99, 0, True))
    assert end.inbound.next_chunk() is None
    assert end.counts == (0, 0)


# Handing on by the leg's reader.


class Target:
    """A consumer that takes what it is allowed to, without waiting."""

    def __init__(self, end: ClientEnd, *takes: int) -> None:
        self.end = end
        self.data = bytearray()
        self.takes = list(takes)
        self.calls = 0
        end.inbound.deliver_directly(self.take)

    def take(self, data: Any) -> int:
        self.calls += 1
        count = min(self.takes.pop(0), len(data)) if self.takes else len(data)
        self.data += data[:count]
        return count

    def consume(self) -> bool:
        """As the consumer's thread: one chunk, whole; False at the end."""
        chunk = self.end.inbound.next_chunk()
        if not chunk:
            return False
        self.data += chunk
        self.end.inbound.delivered(len(chunk))
        return True


def test_reader_hands_on_what_is_taken_at_once(
    end: ClientEnd, channel: Channel, frame_sender: FrameSender
) -> None:
    """No thread is woken, and what is due is acked and pushed."""
    target = Target(end)
    pushes: list[bool] = []
    frame_sender.push = lambda: pushes.append(frame_sender.has_frames)  # type: ignore[method-assign]
    end.inbound.on_data(channel, b"abc")
    assert (target.data, target.calls, end.counts[1]) == (b"abc", 1, 3)
    assert not end.inbound._queue
    for _ in range(3):
        end.inbound.on_data(channel, bytes(MAX_DATA_BYTES))
    acks = sent(frame_sender)
    assert acks
    assert pushes[-1]
    assert acks[-1]["delivered"] == end.counts[1] == 3 * MAX_DATA_BYTES + 3


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_was_not_taken_is_the_consumers_before_all_later_bytes(
    end: ClientEnd, channel: Channel, count: int
) -> None:
    """A part, or nothing; the reader hands nothing on behind it."""
    target = Target(end, count)
    end.inbound.on_data(channel, b"012345")
    end.inbound.on_data(channel, b"6789")
    assert target.calls == 1
    assert end.counts[1] == count
    while end.inbound._queue:
        assert target.consume()
    assert target.data == b"0123456789"
    assert end.counts[1] == 10
    end.inbound.on_data(channel, b"again")
    assert target.data == b"0123456789again"
    assert target.calls == 2


def test_what_fails_is_the_consumers(end: ClientEnd, channel: Channel) -> None:
    """Its thread meets the same error, and tells; nothing counts as delivered."""

    def fail(_: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    end.inbound.deliver_directly(fail)
    end.inbound.on_data(channel, b"abc")
    assert end.counts[1] == 0
    assert end.inbound.next_chunk() == b"abc"


def test_reader_waits_its_turn_while_the_consumer_is_in_a_chunk(
    end: ClientEnd, channel: Channel
) -> None:
    """From next_chunk() to delivered() the bytes behind are queued."""
    target = Target(end, 0)
    end.inbound.on_data(channel, b"first")
    chunk = end.inbound.next_chunk()
    assert not end.inbound._queue
    end.inbound.on_data(channel, b"second")
    assert target.calls == 1
    target.data += chunk
    end.inbound.delivered(len(chunk))
    # Still behind what is queued.
    end.inbound.on_data(channel, b"third")
    assert target.calls == 1
    assert target.consume()
    end.inbound.on_data(channel, b"fourth")
    assert target.calls == 2
    assert target.data == b"firstsecondthirdfourth"


def test_consumer_waits_while_the_reader_hands_on(end: ClientEnd, channel: Channel) -> None:
    """What comes by another leg meanwhile, and an end, are behind it."""
    inside, go_on = threading.Event(), threading.Event()

    def take(data: Any) -> int:
        inside.set()
        assert go_on.wait(5.0)
        return 2

    end.inbound.deliver_directly(take)
    reader, _ = waiting(lambda: end.inbound.on_data(channel, b"abcd"))
    assert inside.wait(5.0)
    end.inbound.on_data(channel, b"ef")
    consumer, chunks = waiting(end.inbound.next_chunk)
    consumer.join(0.05)
    assert chunks == []
    go_on.set()
    consumer.join(5.0)
    reader.join(5.0)
    assert chunks == [b"cd"]
    end.inbound.delivered(2)
    assert end.inbound.next_chunk() == b"ef"


@pytest.mark.parametrize("count", [0, 2, 4])
def test_end_while_the_reader_hands_on_wakes_the_consumer(
    end: ClientEnd, channel: Channel, frame_sender: FrameSender, count: int
) -> None:
    """What was not taken is handed on first, then it is over; nothing is said any more."""
    target = Target(end)

    def take(data: Any) -> int:
        end.on_end(LOST)
        target.data += data[:count]
        return count

    end.inbound.deliver_directly(take)
    consumer, results = waiting(lambda: [target.consume(), count < 4 and target.consume()])
    end.inbound.on_data(channel, b"abcd")
    consumer.join(5.0)
    assert results == [[count < 4, False]]
    assert target.data == b"abcd"
    assert end.counts[1] == 4
    assert sent(frame_sender) == []


def test_eof_while_the_reader_hands_on_is_not_forgotten(end: ClientEnd, channel: Channel) -> None:
    """It comes by another leg, of a tunnel that was resumed: the consumer must be woken."""

    def take(data: Any) -> int:
        end.inbound.on_eof(channel, 4)
        # It has looked, in vain, and waits again.
        eventually(lambda: end.changed._waiters)  # type: ignore[attr-defined]
        return len(data)

    end.inbound.deliver_directly(take)
    consumer, chunks = waiting(end.inbound.next_chunk)
    eventually(lambda: end.changed._waiters)  # type: ignore[attr-defined]
    end.inbound.on_data(channel, b"abcd")
    consumer.join(5.0)
    woken = list(chunks)
    end.on_end(LOST)  # So that a thread that waits for ever ends with its test.
    consumer.join(5.0)
    assert woken == [b""]


def test_ack_goes_out_by_the_leg_that_came_while_the_reader_handed_on(
    frame_sender: FrameSender, channel_id: int
) -> None:
    """The old one is deaf; the new one must be pushed."""
    old, new = Channel(FrameSender(), channel_id), Channel(frame_sender, channel_id)
    end = UserEnd(old, MIN_WINDOW_BYTES)
    end.on_open(MIN_WINDOW_BYTES, 60)
    pushes: list[bool] = []
    frame_sender.push = lambda: pushes.append(frame_sender.has_frames)  # type: ignore[method-assign]

    def take(data: Any) -> int:
        assert end.detach(old, LOST)
        end.begin_resume()
        end.on_resumed(new, Position(0, 0, MIN_WINDOW_BYTES))
        pushes.clear()
        return len(data)

    end.inbound.deliver_directly(take)
    end.inbound.on_data(old, bytes(MAX_DATA_BYTES))
    assert frame_sender.has_frames, "no ack is due"
    assert pushes == [True], "the ack was put and not pushed"


def test_no_reader_is_inside_any_more_when_deliver_directly_none_returns(
    end: ClientEnd, channel: Channel
) -> None:
    """The consumer's file is closed then."""
    inside, go_on = threading.Event(), threading.Event()

    def take(data: Any) -> int:
        inside.set()
        assert go_on.wait(5.0)
        return len(data)

    end.inbound.deliver_directly(take)
    reader, _ = waiting(lambda: end.inbound.on_data(channel, b"abc"))
    assert inside.wait(5.0)
    closer, _ = waiting(lambda: end.inbound.deliver_directly(None))
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    closer.join(5.0)
    reader.join(5.0)
    assert not closer.is_alive()
    end.inbound.on_data(channel, b"def")
    assert end.inbound.next_chunk() == b"def"
    assert end.counts[1] == 3


@pytest.mark.usefixtures("fast_switching")
def test_no_delivery_begins_or_goes_on_after_deliver_directly_none_returned() -> None:
    """Whenever the reader decided to deliver: the consumer closes its file next."""
    by_reader = 0
    for _ in range(200):
        channel = Channel(FrameSender(), 1)
        end = ClientEnd(channel, MIN_WINDOW_BYTES)
        end.on_open(MIN_WINDOW_BYTES, 0)
        is_closed, late = threading.Event(), threading.Event()

        def take(data: Any, is_closed: Any = is_closed, late: Any = late) -> int:
            if is_closed.is_set():
                late.set()
            for _ in range(20):
                pass
            if is_closed.is_set():
                late.set()
            return len(data)

        end.inbound.deliver_directly(take)

        def read(end: ClientEnd = end, channel: Channel = channel) -> None:
            for _ in range(10):
                end.inbound.on_data(channel, b"abc")

        reader, _ = waiting(read)
        end.inbound.deliver_directly(None)
        is_closed.set()
        reader.join(5.0)
        assert not late.is_set()
        by_reader += end.counts[1]
        assert end.counts[1] + sum(map(len, end.inbound._queue)) == 30
    assert 0 < by_reader < 200 * 30


# Ends.


def test_first_end_counts(end: ClientEnd, frame_sender: FrameSender) -> None:
    """Its reason is the one of the log and the exit code; it is told once."""
    end.reset(RelayError("target_lost", "first"))
    end.reset(RelayError("protocol_error", "second"))
    end.on_end(LOST)
    assert end.ended is not None
    assert end.ended.code == "target_lost"
    assert [frame["message"] for frame in sent(frame_sender)] == ["first"]


def test_end_that_came_is_not_answered(end: ClientEnd, frame_sender: FrameSender) -> None:
    """A reset is final."""
    end.on_end(GONE)
    end.reset(LOST)
    assert sent(frame_sender) == []


@pytest.mark.parametrize(
    ("code", "kept"), [("user_gone", True), ("target_reset", True), ("target_lost", False)]
)
def test_reset_comes_behind_the_data_or_instead_of_it(
    end: ClientEnd, frame_sender: FrameSender, code: str, kept: bool
) -> None:
    """Two resets are part of the conversation."""
    end.outbound.send(b"before")
    end.reset(RelayError(code, "why"))
    frames = sent(frame_sender)
    assert frames[-1]["code"] == code
    assert frames[:-1] == ([b"before"] if kept else [])


def finish(end: ClientEnd, channel: Channel) -> None:
    end.outbound.send_eof()
    end.outbound.on_ack(channel, Ack(0, MIN_WINDOW_BYTES, True))
    end.inbound.on_eof(channel, 0)
    assert end.inbound.next_chunk() == b""
    end.inbound.delivered_eof()


def test_finished_tunnel_has_no_end_any_more(
    end: ClientEnd, channel: Channel, frame_sender: FrameSender
) -> None:
    """A leg that is lost a moment later does not make a clean end unclean."""
    finish(end, channel)
    assert end.is_finished
    assert end.is_over
    end.on_end(LOST)
    end.reset(LOST)
    assert end.ended is None
    assert [frame["type"] for frame in sent(frame_sender) if isinstance(frame, dict)] == [
        "ack",
        "eof",
    ]


def test_tunnel_is_not_finished_before_its_last_ack_is_queued(
    frame_sender: FrameSender, channel: Channel
) -> None:
    """Who sees it finished closes the leg: that ack must stand before the close."""
    seen: list[bool] = []
    end = ClientEnd(channel, MIN_WINDOW_BYTES)
    real = frame_sender.put_ack

    def put_ack(*args: Any) -> None:
        seen.append(end.is_finished)
        real(*args)

    frame_sender.put_ack = put_ack  # type: ignore[method-assign, assignment]
    end.on_open(MIN_WINDOW_BYTES, 0)
    finish(end, channel)
    assert seen == [False]
    assert end.is_finished


def test_waiting_for_the_end_is_woken_by_it(end: ClientEnd, channel: Channel) -> None:
    """By a clean one and by any other; and by its timeout."""
    end.wait_over(0.001)
    thread, _ = waiting(end.wait_over)
    finish(end, channel)
    thread.join(5.0)
    assert not thread.is_alive()


def test_change_is_told_without_the_lock(frame_sender: FrameSender) -> None:
    """Who is told may call back at once."""
    told: list[bool] = []
    end: ClientEnd

    def lock_is_free() -> bool:
        taken = end.changed.acquire(timeout=5.0)
        if taken:
            end.changed.release()
        return taken

    def on_change() -> None:
        thread, results = waiting(lock_is_free)
        thread.join()
        assert results == [True]
        told.append(end.is_over)

    channel = Channel(frame_sender)
    end = ClientEnd(channel, MIN_WINDOW_BYTES, on_change)
    end.on_open(0, 0)
    end.outbound.on_ack(channel, Ack(0, 20, False))
    end.reset(LOST)
    assert told == [False, True]


def test_ack_wakes_nobody_who_has_credit(frame_sender: FrameSender) -> None:
    """Most acks come to one who sends on."""
    told: list[int] = []
    end: ClientEnd
    channel = Channel(frame_sender)
    end = ClientEnd(channel, MIN_WINDOW_BYTES, lambda: told.append(end.outbound.credit()))
    end.on_open(10, 0)
    end.outbound.on_ack(channel, Ack(0, 20, False))
    assert told == []
    end.outbound.send(bytes(20))
    end.outbound.on_ack(channel, Ack(20, 50, False))
    assert told == [30]


# The consumer's failure.


def test_consumer_that_fails_waits_for_the_producers_end(
    end: ClientEnd, frame_sender: FrameSender
) -> None:
    """What the target still says is sent; then no eof but a reset is due."""
    end.fail_consumer(RelayError("target_reset", "x"))
    end.outbound.send(b"last words")
    assert end.ended is None
    assert not end.outbound.send_eof()
    assert sent(frame_sender) == [b"last words"]


def test_consumer_that_fails_after_our_eof_resets_at_once(
    end: ClientEnd, frame_sender: FrameSender
) -> None:
    """Nothing more can come from there."""
    assert end.outbound.send_eof()
    end.fail_consumer(RelayError("target_reset", "x"))
    assert end.ended is not None
    assert [frame["type"] for frame in sent(frame_sender)] == ["eof", "reset"]


# Threads.


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads switch at nearly every byte code."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switching")
def test_bytes_keep_their_order_whoever_hands_them_on(
    end: ClientEnd, channel: Channel, frame_sender: FrameSender
) -> None:
    """Reader and consumer at once; the reader is given a part, all, nothing, or an error."""
    chances = random.Random(7)
    taken = bytearray()
    whole = random.Random(8).randbytes(150_000)
    by_reader = 0

    def take(data: Any) -> int:
        nonlocal by_reader
        kind = chances.randrange(4)
        if kind == 0:
            raise BlockingIOError(11, "later")
        count = {1: 0, 2: len(data) // 2}.get(kind, len(data))
        taken.extend(data[:count])
        by_reader += count
        return count

    def consume() -> None:
        while chunk := end.inbound.next_chunk():
            for start in range(0, len(chunk), 97):
                taken.extend(chunk[start : start + 97])
            end.inbound.delivered(len(chunk))
        assert chunk == b""
        end.inbound.deliver_directly(None)
        end.inbound.delivered_eof()

    end.inbound.deliver_directly(take)
    consumer, finished = waiting(consume)
    at, acks, sizes = 0, 0, random.Random(9)
    while at < len(whole):
        size = sizes.choice([1, 10, 500, 2000])
        end.inbound.on_data(channel, whole[at : at + size])
        at += size
    end.inbound.on_eof(channel, len(whole))
    consumer.join(10.0)
    assert finished == [None]
    assert taken == whole
    assert 0 < by_reader < len(whole)
    assert end.counts[1] == len(whole)
    for frame in sent(frame_sender):
        acks = max(acks, frame["delivered"])
    assert acks == len(whole)


@pytest.mark.usefixtures("fast_switching")
def test_two_ends_in_six_threads_carry_all_bytes_both_ways_and_finish() -> None:
    """Producer, consumer and reader at each end, under the smallest window."""
    sizes = (700_000, 300_000)
    outboxes = (FrameSender(), FrameSender())
    channels = [Channel(frame_sender, 5) for frame_sender in outboxes]
    ends = [ClientEnd(channel, MIN_WINDOW_BYTES) for channel in channels]
    taken = [0, 0]
    for end in ends:
        end.on_open(MIN_WINDOW_BYTES, 0)

    def produce(which: int) -> None:
        end, left = ends[which], sizes[which]
        while left:
            size = min(left, end.outbound.wait_credit(), 9_001)
            end.outbound.send(b"d" * size)
            left -= size
        assert end.outbound.send_eof()

    def consume(which: int) -> None:
        end = ends[which]
        while chunk := end.inbound.next_chunk():
            taken[which] += len(chunk)
            end.inbound.delivered(len(chunk))
        assert chunk == b""
        end.inbound.delivered_eof()

    def carry(which: int) -> None:
        """What this end's leg writes reaches the other end's reader."""
        other, channel = ends[1 - which], channels[1 - which]
        while (frame := take(outboxes[which])) is not None:
            if frame.opcode == OP_BINARY:
                other.inbound.on_data(channel, frame.payload)
                continue
            control = json.loads(frame.payload)
            if control["type"] == "eof":
                other.inbound.on_eof(channel, control["count"])
            else:
                other.outbound.on_ack(
                    channel, Ack(control["delivered"], control["limit"], control["eof"])
                )

    errors: list[BaseException] = []

    def guarded(job: Callable[[int], None], which: int) -> None:
        try:
            job(which)
        except BaseException as exc:
            errors.append(exc)
            for end in ends:
                end.on_end(LOST)

    threads = [
        threading.Thread(target=guarded, args=(job, which))
        for job in (produce, consume, carry)
        for which in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for end in ends:
        end.wait_over(10.0)
    for frame_sender in outboxes:
        frame_sender.stop()
    for thread in threads:
        thread.join()
    assert errors == []
    assert taken == [sizes[1], sizes[0]]
    assert all(end.is_finished for end in ends)
