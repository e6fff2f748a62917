"""The outbox: order, turns, ends, and bounded memory, whatever the threads do."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import http_network_relay.leg.send_queue
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame, SendQueue, append_merged
from http_network_relay.wire.constants import MAX_DATA_BYTES, OP_BINARY, OP_CLOSE, OP_TEXT
from tests.support.clock import Clock
from tests.support.taking import put_data, queue_lock, take

CLOSE = Frame(OP_CLOSE, b"", b"\x03\xe8")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The outbox's clock."""
    clock = Clock()
    clock.replace_in(monkeypatch, http_network_relay.leg.send_queue)
    return clock


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads switch at nearly every byte code, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def text(name: str) -> Frame:
    return Frame(OP_TEXT, b"", name.encode())


def put(outbox: SendQueue, channel: int, data: bytes) -> None:
    outbox.put_data(channel, channel.to_bytes(4, "big"), data)


def put_blocks(outbox: SendQueue, channel: int, count: int) -> None:
    for _ in range(count):
        put(outbox, channel, bytes(MAX_DATA_BYTES))


def names(outbox: SendQueue | FrameSender) -> list[str]:
    """All that can be taken now: the text of a control, the channel of data."""
    found = []
    while outbox.has_frames:
        frame = take(outbox)
        assert frame is not None
        is_data = frame.opcode == OP_BINARY
        found.append(str(int.from_bytes(frame.head, "big")) if is_data else frame.payload.decode())
    return found


# Order and turns.


def test_channels_take_turns_whoever_came_first() -> None:
    """One message a turn: the megabytes of one do not hold the key strokes of another."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 4)
    put(outbox, 2, b"k")
    put_blocks(outbox, 3, 2)
    assert names(outbox) == ["1", "2", "3", "1", "3", "1", "1"]


def test_keystroke_waits_for_one_message_of_each_other_channel() -> None:
    """A channel that comes anew stands behind one turn of each, not behind their queues."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 50)
    put_blocks(outbox, 2, 50)
    assert take(outbox) is not None
    put(outbox, 3, b"k")
    assert names(outbox)[:4] == ["2", "1", "3", "2"]


def test_channel_that_ran_empty_goes_to_the_back() -> None:
    """Small messages often do not get more turns than large ones."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 3)
    order = []
    for _ in range(3):
        put(outbox, 2, b"k")
        for _ in range(2):
            frame = take(outbox)
            assert frame is not None
            order.append(int.from_bytes(frame.head, "big"))
    assert order == [1, 2, 1, 2, 1, 2]


def test_fast_lane_goes_first_in_order_of_its_slots() -> None:
    """Controls that may overtake do; a newer ack takes the place of the older."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 2)
    outbox.put_leg("pong", text("old pong"))
    outbox.put_ack(1, text("old ack"))
    outbox.put_first(2, text("opened 2"))
    outbox.put_ack(2, text("ack 2"))
    outbox.put_ack(1, text("new ack"))
    outbox.put_leg("pong", text("new pong"))
    assert names(outbox) == ["new pong", "new ack", "opened 2", "ack 2", "1", "1"]


def test_eof_comes_behind_the_data_and_the_first_message_before_all() -> None:
    """Per channel: first, data, eof."""
    outbox = SendQueue()
    outbox.put_first(1, text("opened"))
    put_blocks(outbox, 1, 2)
    outbox.put_eof(1, text("eof"))
    assert names(outbox) == ["opened", "1", "1", "eof"]


# Ends.


def test_reset_deletes_what_its_channel_has_queued_and_no_other() -> None:
    """A cancelled download is gone at once."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 9)
    put(outbox, 2, b"k")
    outbox.put_eof(1, text("eof"))
    outbox.put_ack(1, text("ack 1"))
    outbox.put_ack(2, text("ack 2"))
    outbox.put_end(1, text("reset"))
    assert names(outbox) == ["ack 2", "reset", "2"]


def test_reset_comes_behind_the_first_message_of_its_channel() -> None:
    """Nothing of a channel goes before its first message."""
    outbox = SendQueue()
    outbox.put_first(1, text("opened"))
    put(outbox, 1, b"x")
    outbox.put_end(1, text("reset"))
    assert names(outbox) == ["opened", "reset"]


@pytest.mark.parametrize("in_turn", [False, True])
def test_end_takes_an_unsent_open_back(in_turn: bool) -> None:
    """Neither is sent, and none of what was queued behind it."""
    outbox = SendQueue()
    outbox.put_first(1, text("open"), cancellable=True)
    put(outbox, 1, b"x")
    outbox.put_ack(1, text("ack"))
    outbox.put_end(1, text("reset"), in_turn=in_turn)
    assert not outbox.has_frames


def test_end_is_sent_when_the_open_was_sent() -> None:
    """Taken is sent: it cannot be taken back any more."""
    outbox = SendQueue()
    outbox.put_first(1, text("open"), cancellable=True)
    assert take(outbox) == text("open")
    outbox.put_end(1, text("reset"))
    assert names(outbox) == ["reset"]


def test_end_in_turn_comes_behind_the_data(clock: Clock) -> None:
    """user_gone and target_reset belong to the conversation."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 3)
    put(outbox, 2, b"k")
    outbox.put_end(1, text("reset"), in_turn=True)
    clock.advance(0.999)
    assert names(outbox) == ["1", "2", "1", "1", "reset"]


def test_end_in_turn_overtakes_after_a_second(clock: Clock) -> None:
    """A leg that hardly moves must not keep a tunnel for ever."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 30)
    outbox.put_eof(1, text("eof"))
    outbox.put_end(1, text("reset"), in_turn=True)
    first = take(outbox)
    assert first is not None
    assert first.opcode == OP_BINARY
    clock.advance(1.0)
    assert names(outbox) == ["reset"]


def test_second_end_in_turn_changes_nothing(clock: Clock) -> None:
    """The first reason stands, and its second is not counted anew."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 5)
    outbox.put_end(1, text("first"), in_turn=True)
    clock.advance(0.6)
    outbox.put_end(1, text("second"), in_turn=True)
    clock.advance(0.4)
    assert names(outbox) == ["first"]


def test_hard_end_overtakes_one_in_turn() -> None:
    """A lost tunnel does not wait for a polite one."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 5)
    outbox.put_end(1, text("polite"), in_turn=True)
    outbox.put_end(1, text("hard"))
    assert names(outbox) == ["hard"]


def test_nothing_follows_an_eof_or_an_end_in_turn() -> None:
    """A producer that was a moment late must not write behind the end."""
    outbox = SendQueue()
    outbox.put_eof(1, text("eof"))
    put(outbox, 1, b"late")
    outbox.put_eof(1, text("eof again"))
    put(outbox, 2, b"x")
    outbox.put_end(2, text("reset"), in_turn=True)
    put(outbox, 2, b"late")
    outbox.put_eof(2, text("late eof"))
    assert names(outbox) == ["eof", "2", "reset"]


# The leg's end.


def test_close_flushes_what_is_queued_and_takes_no_more() -> None:
    """Behind all, then nothing."""
    outbox = SendQueue()
    put(outbox, 1, b"x")
    outbox.put_ack(1, text("ack"))
    outbox.close(CLOSE)
    put(outbox, 1, b"late")
    outbox.put_ack(1, text("late"))
    outbox.put_first(2, text("late"))
    outbox.put_leg("pong", text("late"))
    outbox.put_end(1, text("late"))
    outbox.put_eof(1, text("late"))
    outbox.try_put_leg("ping", text("late"))
    taken = [take(outbox) for _ in range(4)]
    assert [frame and frame.payload for frame in taken] == [b"ack", b"x", CLOSE.payload, None]


def test_close_without_flush_is_the_next_frame() -> None:
    """A leg error: what is queued does not matter any more."""
    outbox = SendQueue()
    put_blocks(outbox, 1, 5)
    outbox.put_leg("pong", text("pong"))
    outbox.close(CLOSE, flush=False)
    assert [take(outbox), take(outbox)] == [CLOSE, None]


def test_first_close_wins() -> None:
    """Its code is the reason; a later one is an echo of the end."""
    outbox = SendQueue()
    outbox.close(CLOSE)
    outbox.close(Frame(OP_CLOSE, b"", b"\x03\xf1"), flush=False)
    assert [take(outbox), take(outbox)] == [CLOSE, None]


@pytest.mark.parametrize("end", ["stop", "close", "put"])
def test_waiting_writer_is_woken(end: str) -> None:
    """stop(), close(), and a push while nobody may send, wake a writer."""
    outbox = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(outbox)))
    writer.start()
    if end == "stop":
        outbox.stop()
    elif end == "close":
        outbox.close(CLOSE)
    else:
        put_data(outbox, 1, b"\0\0\0\1", b"x")
        outbox.push()
    writer.join(5.0)
    assert not writer.is_alive()
    expected: Any = {"stop": None, "close": CLOSE}.get(end, Frame(OP_BINARY, b"\0\0\0\1", b"x"))
    assert taken == [expected]


THOSE_THAT_CALL: dict[str, Callable[[FrameSender], Any]] = {
    "first": lambda outbox: outbox.put_first(1, text("it")),
    "try": lambda outbox: outbox.try_put_leg("ping", text("it")),
    "eof": lambda outbox: outbox.put_eof(1, text("it")),
    "end": lambda outbox: outbox.put_end(1, text("it")),
    "end in turn": lambda outbox: outbox.put_end(1, text("it"), in_turn=True),
}


@pytest.mark.parametrize("put_it", THOSE_THAT_CALL.values(), ids=THOSE_THAT_CALL)
def test_put_calls_the_writer(put_it: Callable[[FrameSender], Any]) -> None:
    """Who puts such a frame may hold a lock, and so cannot send."""
    outbox = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(outbox)))
    writer.start()
    put_it(outbox)
    writer.join(5.0)
    assert not writer.is_alive()
    assert taken == [text("it")]


def test_data_acks_and_pongs_call_nobody() -> None:
    """Their push does; a call for each would wake a thread for nothing."""
    calls: list[None] = []
    outbox = FrameSender(call=lambda: calls.append(None))
    put_data(outbox, 1, b"\0\0\0\1", b"x")
    outbox.put_ack(1, text("ack"))
    outbox.put_leg("pong", text("pong"))
    assert not calls
    assert outbox.has_frames
    outbox.push()
    assert len(calls) == 1
    assert names(outbox) == ["ack", "pong", "1"]


def test_call_before_the_wait_is_not_lost() -> None:
    """It counts once, however often it was made."""
    calls: list[None] = []
    outbox = FrameSender(call=lambda: calls.append(None))
    outbox.put_first(1, text("it"))
    outbox.put_first(2, text("it"))
    assert len(calls) == 1
    assert names(outbox) == ["it", "it"]
    outbox.stop()
    assert len(calls) == 2
    assert take(outbox) is None


def test_take_leaves_the_close_to_the_writer() -> None:
    """Whoever pushes sends no close: behind it the writer ends our direction."""
    outbox = SendQueue()
    put(outbox, 1, b"x")
    outbox.close(CLOSE)
    assert outbox.take() == Frame(OP_BINARY, b"\0\0\0\1", b"x")
    assert outbox.take() is None
    assert not outbox.has_frames
    assert outbox.take(with_close=True) == CLOSE
    assert outbox.take(with_close=True) is None
    assert outbox.is_over


def test_stop_forgets_all() -> None:
    """Even a close that waits: the leg is dead."""
    outbox = SendQueue()
    put(outbox, 1, b"x")
    outbox.close(CLOSE)
    outbox.stop()
    put(outbox, 1, b"x")
    outbox.put_ack(1, text("ack"))
    assert take(outbox) is None
    assert take(outbox) is None
    assert not outbox.has_frames


# The timer.


def test_try_put_leg_never_waits_while_the_lock_is_held() -> None:
    """The timer asks again later rather than stand behind whoever is inside."""
    outbox = FrameSender()
    answers: list[bool] = []
    with queue_lock(outbox):
        timer = threading.Thread(
            target=lambda: answers.append(outbox.try_put_leg("ping", text("ping")))
        )
        timer.start()
        timer.join(5.0)
        assert not timer.is_alive()
        assert answers == [False]
    assert outbox.try_put_leg("ping", text("ping"))
    assert names(outbox) == ["ping"]


def test_try_put_leg_wakes_the_writer() -> None:
    """A ping on an idle leg goes out at once."""
    outbox = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(outbox)))
    writer.start()
    assert outbox.try_put_leg("ping", text("ping")) or not taken
    while not taken and not outbox.try_put_leg("ping", text("ping")):
        pass  # The writer held the lock: that is the point of "try".
    writer.join(5.0)
    assert taken == [text("ping")]


# Merging and memory.


def test_small_pieces_become_one_message_of_64_kib_at_most() -> None:
    """Cuts in a stream mean nothing; the size of a message does."""
    outbox = SendQueue()
    sent = bytearray()
    for number in range(5000):
        piece = number.to_bytes(4, "big") * 10
        sent += piece
        put(outbox, 1, piece)
    sizes, received = [], bytearray()
    while outbox.has_frames:
        frame = take(outbox)
        assert frame is not None
        sizes.append(len(frame.payload))
        received += frame.payload
    assert received == sent
    assert max(sizes) <= MAX_DATA_BYTES
    assert len(sizes) == -(-len(sent) // MAX_DATA_BYTES)


def test_merging_leaves_what_was_put_as_it_was() -> None:
    """A caller's buffer is not ours to append to."""
    outbox = SendQueue()
    mine = b"abc"
    view = memoryview(bytearray(b"def"))
    put(outbox, 1, mine)
    outbox.put_data(1, b"\0\0\0\1", view)
    put(outbox, 1, b"ghi")
    frame = take(outbox)
    assert frame is not None
    assert (bytes(frame.payload), mine, bytes(view)) == (b"abcdefghi", b"abc", b"def")


def test_message_that_was_taken_does_not_grow() -> None:
    """The writer holds it; what comes later is the next message."""
    outbox = SendQueue()
    put(outbox, 1, b"a")
    put(outbox, 1, b"b")
    frame = take(outbox)
    put(outbox, 1, b"c")
    assert frame is not None
    assert bytes(frame.payload) == b"ab"
    assert names(outbox) == ["1"]


def test_a_million_single_bytes_stay_small() -> None:
    """A peer that sends byte by byte costs its window, not a hundred times that."""
    queue: deque[Any] = deque()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            append_merged(queue, b"x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 600_000
    for _ in range(900_000):
        append_merged(queue, b"x")
    assert len(queue) == -(-1_000_000 // MAX_DATA_BYTES)
    assert sum(map(len, queue)) == 1_000_000
    assert b"".join(queue) == b"x" * 1_000_000


def test_controls_without_end_need_one_slot_each() -> None:
    """A flood of pings, acks and resets of one channel is one frame of each."""
    outbox = SendQueue()
    for number in range(10_000):
        outbox.put_leg("pong", text(f"pong {number}"))
        outbox.put_ack(1, text(f"ack {number}"))
        outbox.put_leg("going_away", text("going"))
    assert names(outbox) == ["pong 9999", "ack 9999", "going"]


# Threads.


@pytest.mark.usefixtures("fast_switching")
def test_two_threads_put_and_a_third_takes_without_loss_or_disorder() -> None:
    """Each channel's bytes come out whole and in order, and the close comes last."""
    outbox = FrameSender()
    rounds = 400

    def hammer(channels: tuple[int, ...]) -> None:
        for number in range(rounds):
            for channel in channels:
                put_data(outbox, channel, channel.to_bytes(4, "big"), number.to_bytes(4, "big"))
                outbox.put_ack(channel, text(f"ack {channel} {number}"))
                if number % 7 == 0:
                    outbox.try_put_leg("ping", text("ping"))
                    outbox.put_leg("pong", text("pong"))

    taken: list[Frame] = []

    def drain() -> None:
        while (frame := take(outbox)) is not None:
            taken.append(frame)

    writer = threading.Thread(target=drain)
    writer.start()
    threads = [threading.Thread(target=hammer, args=(pair,)) for pair in [(1, 2), (3, 4)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for channel in (1, 2, 3, 4):
        outbox.put_eof(channel, text(f"eof {channel}"))
    outbox.close(CLOSE)
    writer.join(5.0)
    assert not writer.is_alive()

    streams: dict[int, bytearray] = defaultdict(bytearray)
    acks: dict[str, list[int]] = defaultdict(list)
    for frame in taken[:-1]:
        if frame.opcode == OP_BINARY:
            streams[int.from_bytes(frame.head, "big")] += frame.payload
        elif frame.payload.startswith(b"ack"):
            _, channel, number = frame.payload.decode().split()
            acks[channel].append(int(number))
    whole = b"".join(number.to_bytes(4, "big") for number in range(rounds))
    assert streams == {channel: whole for channel in (1, 2, 3, 4)}
    for numbers in acks.values():
        assert numbers == sorted(numbers)
        assert numbers[-1] == rounds - 1
    assert taken[-1] == CLOSE


@pytest.mark.usefixtures("fast_switching")
def test_reset_during_a_flood_leaves_nothing_of_its_channel_behind_it() -> None:
    """A reset that meets a producer: no data of before the reset comes after it."""
    for _ in range(30):
        outbox = SendQueue()
        put(outbox, 1, b"before")
        barrier = threading.Barrier(2)

        def produce(outbox: SendQueue = outbox, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            for _ in range(20):
                put(outbox, 2, b"other")

        thread = threading.Thread(target=produce)
        thread.start()
        barrier.wait()
        outbox.put_end(1, text("reset"))
        thread.join()
        assert sorted(set(names(outbox))) == ["2", "reset"]


def test_unsent_first_message_is_taken_back_alone() -> None:
    """An `open` that was answered before it was sent does not stay."""
    outbox = SendQueue()
    for channel in (1, 2):
        outbox.put_first(channel, Frame(1, b"", b"%d" % channel), cancellable=True)
    outbox.cancel_first(1)
    outbox.cancel_first(7)
    frame = take(outbox)
    assert frame is not None
    assert frame.payload == b"2"
    outbox.cancel_first(2)
    assert not outbox.has_frames
