"""One end of a tunnel between its threads: what wakes whom, and which end counts."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import client.outbox
import client.tunnel_end
from client.errors import RelayError
from client.outbox import Outbox
from client.stream import Ack
from client.tunnel_end import Link, TunnelEnd
from client.wire import MAX_DATA_BYTES, MIN_WINDOW_BYTES, OP_BINARY, TunnelError

GONE = RelayError("user_gone", "gone")
LOST = RelayError("leg_lost", "lost")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of both files: set `.now`."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(client.tunnel_end, "time", fake)
    monkeypatch.setattr(client.outbox, "time", fake)
    return clock


@pytest.fixture(params=[0, 7], ids=["user leg", "client leg"])
def channel(request: pytest.FixtureRequest) -> int:
    """Both kinds of leg."""
    number: int = request.param
    return number


@pytest.fixture
def outbox() -> Outbox:
    """Of the leg."""
    return Outbox()


@pytest.fixture
def link(outbox: Outbox, channel: int) -> Link:
    """The channel."""
    return Link(outbox, channel)


@pytest.fixture
def end(link: Link) -> TunnelEnd:
    """An end that is open, with credit for a window, and no grace."""
    made = TunnelEnd(link, MIN_WINDOW_BYTES)
    assert made.on_open(MIN_WINDOW_BYTES, 0)
    return made


def sent(outbox: Outbox) -> list[Any]:
    """What the leg would write now: bytes, or the control's dict."""
    frames = []
    while not outbox.is_empty():
        frame = outbox.take()
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
        lambda end, link: end.on_data(link, b"x"),
        lambda end, link: end.on_eof(link, 0),
        lambda end, link: end.on_ack(link, Ack(0, 10, False)),
    ],
    ids=["data", "eof", "ack"],
)
def test_message_before_open_is_a_tunnel_error(
    link: Link, channel: int, message: Callable[[TunnelEnd, Link], None]
) -> None:
    """With the channel that it concerns."""
    end = TunnelEnd(link, MIN_WINDOW_BYTES)
    with pytest.raises(TunnelError) as caught:
        message(end, link)
    assert caught.value.channel == channel


def test_open_that_comes_after_the_end_is_told() -> None:
    """The dial was too late: close the socket."""
    end = TunnelEnd(Link(Outbox(), 1), MIN_WINDOW_BYTES)
    end.on_end(GONE)
    assert not end.on_open(100, 0)
    assert end.credit() == 0


# Sending.


def test_send_takes_credit_and_stands_in_the_outbox(
    end: TunnelEnd, outbox: Outbox, channel: int
) -> None:
    """One message is 64 KiB at most; the head names the channel."""
    assert end.credit() == MAX_DATA_BYTES
    end.send(b"abc")
    frame = outbox.take()
    assert frame is not None
    assert (frame.head, frame.payload) == (channel.to_bytes(4, "big") if channel else b"", b"abc")
    for _ in range(3):
        end.send(bytes(MAX_DATA_BYTES))
    assert end.credit() == MAX_DATA_BYTES - 3
    end.send(bytes(MAX_DATA_BYTES - 3))
    assert end.credit() == 0


@pytest.mark.parametrize("by", ["ack", "end", "reset"])
def test_producer_without_credit_is_woken(end: TunnelEnd, link: Link, by: str) -> None:
    """By an ack with its size, by an end with 0."""
    for _ in range(4):
        end.send(bytes(MAX_DATA_BYTES))
    thread, results = waiting(end.wait_credit)
    if by == "ack":
        end.on_ack(link, Ack(1000, MIN_WINDOW_BYTES + 1000, False))
    elif by == "end":
        end.on_end(LOST)
    else:
        end.reset(LOST)
    thread.join(1.0)
    assert not thread.is_alive()
    assert results == [1000 if by == "ack" else 0]


def test_nothing_is_sent_after_the_end(end: TunnelEnd, outbox: Outbox) -> None:
    """A producer that was a moment late is silent, not an error."""
    end.on_end(LOST)
    end.send(b"late")
    assert end.send_eof()
    end.delivered(5)
    assert sent(outbox) == []


# Handing on.


def test_chunks_come_in_order_then_the_eof_then_nothing(
    end: TunnelEnd, link: Link, outbox: Outbox
) -> None:
    """Small ones may have grown together; eof is b""."""
    end.on_data(link, b"one")
    end.on_data(link, memoryview(b"two"))
    end.on_eof(link, 6)
    assert bytes(end.next_chunk()) == b"onetwo"
    end.delivered(6)
    assert end.next_chunk() == b""
    end.delivered_eof()
    assert [frame["eof"] for frame in sent(outbox)] == [True]
    assert not end.is_over
    end.on_end(LOST)
    assert end.next_chunk() is None


@pytest.mark.parametrize("by", ["data", "eof", "end"])
def test_consumer_without_news_is_woken(end: TunnelEnd, link: Link, by: str) -> None:
    """By each of the three."""
    thread, results = waiting(end.next_chunk)
    if by == "data":
        end.on_data(link, b"x")
    elif by == "eof":
        end.on_eof(link, 0)
    else:
        end.on_end(LOST)
    thread.join(1.0)
    assert not thread.is_alive()
    assert results == [{"data": b"x", "eof": b"", "end": None}[by]]


def test_bytes_before_an_end_are_handed_on_for_a_second(
    end: TunnelEnd, link: Link, clock: SimpleNamespace
) -> None:
    """They came first; then the time is over."""
    block = bytes(MAX_DATA_BYTES)
    for _ in range(3):
        end.on_data(link, block)
    end.on_end(GONE)
    assert end.next_chunk() == block
    clock.now += 0.999
    assert not end.must_stop()
    assert end.next_chunk() == block
    clock.now += 0.001
    assert end.must_stop()
    assert end.next_chunk() is None


def test_eof_before_an_end_is_handed_on(end: TunnelEnd, link: Link) -> None:
    """A whole file came, and then the line was lost: the file is whole."""
    end.on_data(link, b"all")
    end.on_eof(link, 3)
    end.on_end(LOST)
    assert end.next_chunk() == b"all"
    assert end.next_chunk() == b""


def test_bytes_after_an_end_are_dropped(end: TunnelEnd, link: Link) -> None:
    """Whatever they are."""
    end.on_end(LOST)
    end.on_data(link, bytes(10 * MIN_WINDOW_BYTES))
    end.on_eof(link, 99)
    end.on_ack(link, Ack(99, 0, True))
    assert end.next_chunk() is None
    assert end.counts == (0, 0)


# Ends.


def test_first_end_counts(end: TunnelEnd, outbox: Outbox) -> None:
    """Its reason is the one of the log and the exit code; it is told once."""
    end.reset(RelayError("target_lost", "first"))
    end.reset(RelayError("protocol_error", "second"))
    end.on_end(LOST)
    assert end.ended is not None
    assert end.ended.code == "target_lost"
    assert [frame["message"] for frame in sent(outbox)] == ["first"]


def test_end_that_came_is_not_answered(end: TunnelEnd, outbox: Outbox) -> None:
    """A reset is final."""
    end.on_end(GONE)
    end.reset(LOST)
    assert sent(outbox) == []


@pytest.mark.parametrize(
    ("code", "kept"), [("user_gone", True), ("target_reset", True), ("target_lost", False)]
)
def test_reset_comes_behind_the_data_or_instead_of_it(
    end: TunnelEnd, outbox: Outbox, code: str, kept: bool
) -> None:
    """Two resets are part of the conversation."""
    end.send(b"before")
    end.reset(RelayError(code, "why"))
    frames = sent(outbox)
    assert frames[-1]["code"] == code
    assert frames[:-1] == ([b"before"] if kept else [])


def finish(end: TunnelEnd, link: Link) -> None:
    end.send_eof()
    end.on_ack(link, Ack(0, MIN_WINDOW_BYTES, True))
    end.on_eof(link, 0)
    assert end.next_chunk() == b""
    end.delivered_eof()


def test_finished_tunnel_has_no_end_any_more(end: TunnelEnd, link: Link, outbox: Outbox) -> None:
    """A leg that is lost a moment later does not make a clean end unclean."""
    finish(end, link)
    assert end.is_finished
    assert end.is_over
    end.on_end(LOST)
    end.reset(LOST)
    assert end.ended is None
    assert [frame["type"] for frame in sent(outbox) if isinstance(frame, dict)] == ["ack", "eof"]


def test_tunnel_is_not_finished_before_its_last_ack_is_queued(outbox: Outbox, link: Link) -> None:
    """Who sees it finished closes the leg: that ack must stand before the close."""
    seen: list[bool] = []
    end = TunnelEnd(link, MIN_WINDOW_BYTES)
    real = outbox.put_ack

    def put_ack(*args: Any) -> None:
        seen.append(end.is_finished)
        real(*args)

    outbox.put_ack = put_ack  # type: ignore[method-assign]
    end.on_open(MIN_WINDOW_BYTES, 0)
    finish(end, link)
    assert seen == [False]
    assert end.is_finished


def test_waiting_for_the_end_is_woken_by_it(end: TunnelEnd, link: Link) -> None:
    """By a clean one and by any other; and by its timeout."""
    end.wait_over(0.001)
    thread, _ = waiting(end.wait_over)
    finish(end, link)
    thread.join(1.0)
    assert not thread.is_alive()


def test_change_is_told_without_the_lock(outbox: Outbox) -> None:
    """Who is told may call back at once."""
    told: list[bool] = []

    def lock_is_free() -> bool:
        taken = end._changed.acquire(timeout=1.0)
        if taken:
            end._changed.release()
        return taken

    def on_change() -> None:
        thread, results = waiting(lock_is_free)
        thread.join()
        assert results == [True]
        told.append(end.is_over)

    link = Link(outbox)
    end = TunnelEnd(link, MIN_WINDOW_BYTES, on_change)
    end.on_open(10, 0)
    end.on_ack(link, Ack(0, 20, False))
    end.reset(LOST)
    assert told == [False, True]


# The consumer's failure.


def test_consumer_that_fails_waits_for_the_producers_end(end: TunnelEnd, outbox: Outbox) -> None:
    """What the target still says is sent; then no eof but a reset is due."""
    end.fail_consumer(RelayError("target_reset", "x"))
    end.send(b"last words")
    assert end.ended is None
    assert not end.send_eof()
    assert sent(outbox) == [b"last words"]


def test_consumer_that_fails_after_our_eof_resets_at_once(end: TunnelEnd, outbox: Outbox) -> None:
    """Nothing more can come from there."""
    assert end.send_eof()
    end.fail_consumer(RelayError("target_reset", "x"))
    assert end.ended is not None
    assert [frame["type"] for frame in sent(outbox)] == ["eof", "reset"]


# Threads.


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads switch at nearly every byte code."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switching")
def test_two_ends_in_six_threads_carry_all_bytes_both_ways_and_finish() -> None:
    """Producer, consumer and reader at each end, under the smallest window."""
    sizes = (700_000, 300_000)
    outboxes = (Outbox(), Outbox())
    links = [Link(outbox, 5) for outbox in outboxes]
    ends = [TunnelEnd(link, MIN_WINDOW_BYTES) for link in links]
    taken = [0, 0]
    for end in ends:
        end.on_open(MIN_WINDOW_BYTES, 0)

    def produce(which: int) -> None:
        end, left = ends[which], sizes[which]
        while left:
            size = min(left, end.wait_credit(), 9_001)
            end.send(b"d" * size)
            left -= size
        assert end.send_eof()

    def consume(which: int) -> None:
        end = ends[which]
        while chunk := end.next_chunk():
            taken[which] += len(chunk)
            end.delivered(len(chunk))
        assert chunk == b""
        end.delivered_eof()

    def carry(which: int) -> None:
        """What this end's leg writes reaches the other end's reader."""
        other, link = ends[1 - which], links[1 - which]
        while (frame := outboxes[which].take()) is not None:
            if frame.opcode == OP_BINARY:
                other.on_data(link, frame.payload)
                continue
            control = json.loads(frame.payload)
            if control["type"] == "eof":
                other.on_eof(link, control["count"])
            else:
                other.on_ack(link, Ack(control["delivered"], control["limit"], control["eof"]))

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
    for outbox in outboxes:
        outbox.stop()
    for thread in threads:
        thread.join()
    assert errors == []
    assert taken == [sizes[1], sizes[0]]
    assert all(end.is_finished for end in ends)
