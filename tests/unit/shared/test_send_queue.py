"""The frame_sender: order, turns, ends, and bounded memory, whatever the threads do."""

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


def put(frame_sender: SendQueue, channel: int, data: bytes) -> None:
    frame_sender.put_data(channel, channel.to_bytes(4, "big"), data)


def put_blocks(frame_sender: SendQueue, channel: int, count: int) -> None:
    for _ in range(count):
        put(frame_sender, channel, bytes(MAX_DATA_BYTES))


def names(frame_sender: SendQueue | FrameSender) -> list[str]:
    """All that can be taken now: the text of a control, the channel of data."""
    found = []
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        is_data = frame.opcode == OP_BINARY
        found.append(str(int.from_bytes(frame.head, "big")) if is_data else frame.payload.decode())
    return found


# Order and turns.


def test_channels_take_turns_whoever_came_first() -> None:
    """One message a turn: the megabytes of one do not hold the key strokes of another."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 4)
    put(frame_sender, 2, b"k")
    put_blocks(frame_sender, 3, 2)
    assert names(frame_sender) == ["1", "2", "3", "1", "3", "1", "1"]


def test_keystroke_waits_for_one_message_of_each_other_channel() -> None:
    """A channel that comes anew stands behind one turn of each, not behind their queues."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 50)
    put_blocks(frame_sender, 2, 50)
    assert take(frame_sender) is not None
    put(frame_sender, 3, b"k")
    assert names(frame_sender)[:4] == ["2", "1", "3", "2"]


def test_channel_that_ran_empty_goes_to_the_back() -> None:
    """Small messages often do not get more turns than large ones."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 3)
    order = []
    for _ in range(3):
        put(frame_sender, 2, b"k")
        for _ in range(2):
            frame = take(frame_sender)
            assert frame is not None
            order.append(int.from_bytes(frame.head, "big"))
    assert order == [1, 2, 1, 2, 1, 2]


def test_fast_lane_goes_first_in_order_of_its_slots() -> None:
    """Controls that may overtake do; a newer ack takes the place of the older."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 2)
    frame_sender.put_leg("pong", text("old pong"))
    frame_sender.put_ack(1, text("old ack"))
    frame_sender.put_first(2, text("opened 2"))
    frame_sender.put_ack(2, text("ack 2"))
    frame_sender.put_ack(1, text("new ack"))
    frame_sender.put_leg("pong", text("new pong"))
    assert names(frame_sender) == ["new pong", "new ack", "opened 2", "ack 2", "1", "1"]


def test_eof_comes_behind_the_data_and_the_first_message_before_all() -> None:
    """Per channel: first, data, eof."""
    frame_sender = SendQueue()
    frame_sender.put_first(1, text("opened"))
    put_blocks(frame_sender, 1, 2)
    frame_sender.put_eof(1, text("eof"))
    assert names(frame_sender) == ["opened", "1", "1", "eof"]


# Ends.


def test_reset_deletes_what_its_channel_has_queued_and_no_other() -> None:
    """A cancelled download is gone at once."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 9)
    put(frame_sender, 2, b"k")
    frame_sender.put_eof(1, text("eof"))
    frame_sender.put_ack(1, text("ack 1"))
    frame_sender.put_ack(2, text("ack 2"))
    frame_sender.put_end(1, text("reset"))
    assert names(frame_sender) == ["ack 2", "reset", "2"]


def test_reset_comes_behind_the_first_message_of_its_channel() -> None:
    """Nothing of a channel goes before its first message."""
    frame_sender = SendQueue()
    frame_sender.put_first(1, text("opened"))
    put(frame_sender, 1, b"x")
    frame_sender.put_end(1, text("reset"))
    assert names(frame_sender) == ["opened", "reset"]


@pytest.mark.parametrize("in_turn", [False, True])
def test_end_takes_an_unsent_open_back(in_turn: bool) -> None:
    """Neither is sent, and none of what was queued behind it."""
    frame_sender = SendQueue()
    frame_sender.put_first(1, text("open"), cancellable=True)
    put(frame_sender, 1, b"x")
    frame_sender.put_ack(1, text("ack"))
    frame_sender.put_end(1, text("reset"), in_turn=in_turn)
    assert not frame_sender.has_frames


def test_end_is_sent_when_the_open_was_sent() -> None:
    """Taken is sent: it cannot be taken back any more."""
    frame_sender = SendQueue()
    frame_sender.put_first(1, text("open"), cancellable=True)
    assert take(frame_sender) == text("open")
    frame_sender.put_end(1, text("reset"))
    assert names(frame_sender) == ["reset"]


def test_end_in_turn_comes_behind_the_data(clock: Clock) -> None:
    """user_gone and target_reset belong to the conversation."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 3)
    put(frame_sender, 2, b"k")
    frame_sender.put_end(1, text("reset"), in_turn=True)
    clock.advance(0.999)
    assert names(frame_sender) == ["1", "2", "1", "1", "reset"]


def test_end_in_turn_overtakes_after_a_second(clock: Clock) -> None:
    """A leg that hardly moves must not keep a tunnel for ever."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 30)
    frame_sender.put_eof(1, text("eof"))
    frame_sender.put_end(1, text("reset"), in_turn=True)
    first = take(frame_sender)
    assert first is not None
    assert first.opcode == OP_BINARY
    clock.advance(1.0)
    assert names(frame_sender) == ["reset"]


def test_second_end_in_turn_changes_nothing(clock: Clock) -> None:
    """The first reason stands, and its second is not counted anew."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 5)
    frame_sender.put_end(1, text("first"), in_turn=True)
    clock.advance(0.6)
    frame_sender.put_end(1, text("second"), in_turn=True)
    clock.advance(0.4)
    assert names(frame_sender) == ["first"]


def test_hard_end_overtakes_one_in_turn() -> None:
    """A lost tunnel does not wait for a polite one."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 5)
    frame_sender.put_end(1, text("polite"), in_turn=True)
    frame_sender.put_end(1, text("hard"))
    assert names(frame_sender) == ["hard"]


def test_nothing_follows_an_eof_or_an_end_in_turn() -> None:
    """A producer that was a moment late must not write behind the end."""
    frame_sender = SendQueue()
    frame_sender.put_eof(1, text("eof"))
    put(frame_sender, 1, b"late")
    frame_sender.put_eof(1, text("eof again"))
    put(frame_sender, 2, b"x")
    frame_sender.put_end(2, text("reset"), in_turn=True)
    put(frame_sender, 2, b"late")
    frame_sender.put_eof(2, text("late eof"))
    assert names(frame_sender) == ["eof", "2", "reset"]


# The leg's end.


def test_close_flushes_what_is_queued_and_takes_no_more() -> None:
    """Behind all, then nothing."""
    frame_sender = SendQueue()
    put(frame_sender, 1, b"x")
    frame_sender.put_ack(1, text("ack"))
    frame_sender.close(CLOSE)
    put(frame_sender, 1, b"late")
    frame_sender.put_ack(1, text("late"))
    frame_sender.put_first(2, text("late"))
    frame_sender.put_leg("pong", text("late"))
    frame_sender.put_end(1, text("late"))
    frame_sender.put_eof(1, text("late"))
    frame_sender.try_put_leg("ping", text("late"))
    taken = [take(frame_sender) for _ in range(4)]
    assert [frame and frame.payload for frame in taken] == [b"ack", b"x", CLOSE.payload, None]


def test_close_without_flush_is_the_next_frame() -> None:
    """A leg error: what is queued does not matter any more."""
    frame_sender = SendQueue()
    put_blocks(frame_sender, 1, 5)
    frame_sender.put_leg("pong", text("pong"))
    frame_sender.close(CLOSE, flush=False)
    assert [take(frame_sender), take(frame_sender)] == [CLOSE, None]


def test_first_close_wins() -> None:
    """Its code is the reason; a later one is an echo of the end."""
    frame_sender = SendQueue()
    frame_sender.close(CLOSE)
    frame_sender.close(Frame(OP_CLOSE, b"", b"\x03\xf1"), flush=False)
    assert [take(frame_sender), take(frame_sender)] == [CLOSE, None]


@pytest.mark.parametrize("end", ["stop", "close", "put"])
def test_waiting_writer_is_woken(end: str) -> None:
    """stop(), close(), and a push while nobody may send, wake a writer."""
    frame_sender = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(frame_sender)))
    writer.start()
    if end == "stop":
        frame_sender.stop()
    elif end == "close":
        frame_sender.close(CLOSE)
    else:
        put_data(frame_sender, 1, b"\0\0\0\1", b"x")
        frame_sender.push()
    writer.join(5.0)
    assert not writer.is_alive()
    expected: Any = {"stop": None, "close": CLOSE}.get(end, Frame(OP_BINARY, b"\0\0\0\1", b"x"))
    assert taken == [expected]


THOSE_THAT_CALL: dict[str, Callable[[FrameSender], Any]] = {
    "first": lambda frame_sender: frame_sender.put_first(1, text("it")),
    "try": lambda frame_sender: frame_sender.try_put_leg("ping", text("it")),
    "eof": lambda frame_sender: frame_sender.put_eof(1, text("it")),
    "end": lambda frame_sender: frame_sender.put_end(1, text("it")),
    "end in turn": lambda frame_sender: frame_sender.put_end(1, text("it"), in_turn=True),
}


@pytest.mark.parametrize("put_it", THOSE_THAT_CALL.values(), ids=THOSE_THAT_CALL)
def test_put_calls_the_writer(put_it: Callable[[FrameSender], Any]) -> None:
    """Who puts such a frame may hold a lock, and so cannot send."""
    frame_sender = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(frame_sender)))
    writer.start()
    put_it(frame_sender)
    writer.join(5.0)
    assert not writer.is_alive()
    assert taken == [text("it")]


def test_data_acks_and_pongs_call_nobody() -> None:
    """Their push does; a call for each would wake a thread for nothing."""
    calls: list[None] = []
    frame_sender = FrameSender(call=lambda: calls.append(None))
    put_data(frame_sender, 1, b"\0\0\0\1", b"x")
    frame_sender.put_ack(1, text("ack"))
    frame_sender.put_leg("pong", text("pong"))
    assert not calls
    assert frame_sender.has_frames
    frame_sender.push()
    assert len(calls) == 1
    assert names(frame_sender) == ["ack", "pong", "1"]


def test_call_before_the_wait_is_not_lost() -> None:
    """It counts once, however often it was made."""
    calls: list[None] = []
    frame_sender = FrameSender(call=lambda: calls.append(None))
    frame_sender.put_first(1, text("it"))
    frame_sender.put_first(2, text("it"))
    assert len(calls) == 1
    assert names(frame_sender) == ["it", "it"]
    frame_sender.stop()
    assert len(calls) == 2
    assert take(frame_sender) is None


def test_take_leaves_the_close_to_the_writer() -> None:
    """Whoever pushes sends no close: behind it the writer ends our direction."""
    frame_sender = SendQueue()
    put(frame_sender, 1, b"x")
    frame_sender.close(CLOSE)
    assert frame_sender.take() == Frame(OP_BINARY, b"\0\0\0\1", b"x")
    assert frame_sender.take() is None
    assert not frame_sender.has_frames
    assert frame_sender.take(with_close=True) == CLOSE
    assert frame_sender.take(with_close=True) is None
    assert frame_sender.is_over


def test_stop_forgets_all() -> None:
    """Even a close that waits: the leg is dead."""
    frame_sender = SendQueue()
    put(frame_sender, 1, b"x")
    frame_sender.close(CLOSE)
    frame_sender.stop()
    put(frame_sender, 1, b"x")
    frame_sender.put_ack(1, text("ack"))
    assert take(frame_sender) is None
    assert take(frame_sender) is None
    assert not frame_sender.has_frames


# The timer.


def test_try_put_leg_never_waits_while_the_lock_is_held() -> None:
    """The timer asks again later rather than stand behind whoever is inside."""
    frame_sender = FrameSender()
    answers: list[bool] = []
    with queue_lock(frame_sender):
        timer = threading.Thread(
            target=lambda: answers.append(frame_sender.try_put_leg("ping", text("ping")))
        )
        timer.start()
        timer.join(5.0)
        assert not timer.is_alive()
        assert answers == [False]
    assert frame_sender.try_put_leg("ping", text("ping"))
    assert names(frame_sender) == ["ping"]


def test_try_put_leg_wakes_the_writer() -> None:
    """A ping on an idle leg goes out at once."""
    frame_sender = FrameSender()
    taken: list[Frame | None] = []
    writer = threading.Thread(target=lambda: taken.append(take(frame_sender)))
    writer.start()
    assert frame_sender.try_put_leg("ping", text("ping")) or not taken
    while not taken and not frame_sender.try_put_leg("ping", text("ping")):
        pass  # The writer held the lock: that is the point of "try".
    writer.join(5.0)
    assert taken == [text("ping")]


# Merging and memory.


def test_small_pieces_become_one_message_of_64_kib_at_most() -> None:
    """Cuts in a stream mean nothing; the size of a message does."""
    frame_sender = SendQueue()
    sent = bytearray()
    for number in range(5000):
        piece = number.to_bytes(4, "big") * 10
        sent += piece
        put(frame_sender, 1, piece)
    sizes, received = [], bytearray()
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        sizes.append(len(frame.payload))
        received += frame.payload
    assert received == sent
    assert max(sizes) <= MAX_DATA_BYTES
    assert len(sizes) == -(-len(sent) // MAX_DATA_BYTES)


def test_merging_leaves_what_was_put_as_it_was() -> None:
    """A caller's buffer is not ours to append to."""
    frame_sender = SendQueue()
    mine = b"abc"
    view = memoryview(bytearray(b"def"))
    put(frame_sender, 1, mine)
    frame_sender.put_data(1, b"\0\0\0\1", view)
    put(frame_sender, 1, b"ghi")
    frame = take(frame_sender)
    assert frame is not None
    assert (bytes(frame.payload), mine, bytes(view)) == (b"abcdefghi", b"abc", b"def")


def test_message_that_was_taken_does_not_grow() -> None:
    """The writer holds it; what comes later is the next message."""
    frame_sender = SendQueue()
    put(frame_sender, 1, b"a")
    put(frame_sender, 1, b"b")
    frame = take(frame_sender)
    put(frame_sender, 1, b"c")
    assert frame is not None
    assert bytes(frame.payload) == b"ab"
    assert names(frame_sender) == ["1"]


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
    frame_sender = SendQueue()
    for number in range(10_000):
        frame_sender.put_leg("pong", text(f"pong {number}"))
        frame_sender.put_ack(1, text(f"ack {number}"))
        frame_sender.put_leg("going_away", text("going"))
    assert names(frame_sender) == ["pong 9999", "ack 9999", "going"]


# Threads.


@pytest.mark.usefixtures("fast_switching")
def test_two_threads_put_and_a_third_takes_without_loss_or_disorder() -> None:
    """Each channel's bytes come out whole and in order, and the close comes last."""
    frame_sender = FrameSender()
    rounds = 400

    def hammer(channels: tuple[int, ...]) -> None:
        for number in range(rounds):
            for channel in channels:
                put_data(
                    frame_sender, channel, channel.to_bytes(4, "big"), number.to_bytes(4, "big")
                )
                frame_sender.put_ack(channel, text(f"ack {channel} {number}"))
                if number % 7 == 0:
                    frame_sender.try_put_leg("ping", text("ping"))
                    frame_sender.put_leg("pong", text("pong"))

    taken: list[Frame] = []

    def drain() -> None:
        while (frame := take(frame_sender)) is not None:
            taken.append(frame)

    writer = threading.Thread(target=drain)
    writer.start()
    threads = [threading.Thread(target=hammer, args=(pair,)) for pair in [(1, 2), (3, 4)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for channel in (1, 2, 3, 4):
        frame_sender.put_eof(channel, text(f"eof {channel}"))
    frame_sender.close(CLOSE)
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
        frame_sender = SendQueue()
        put(frame_sender, 1, b"before")
        barrier = threading.Barrier(2)

        def produce(
            frame_sender: SendQueue = frame_sender, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            for _ in range(20):
                put(frame_sender, 2, b"other")

        thread = threading.Thread(target=produce)
        thread.start()
        barrier.wait()
        frame_sender.put_end(1, text("reset"))
        thread.join()
        assert sorted(set(names(frame_sender))) == ["2", "reset"]


def test_unsent_first_message_is_taken_back_alone() -> None:
    """An `open` that was answered before it was sent does not stay."""
    frame_sender = SendQueue()
    for channel in (1, 2):
        frame_sender.put_first(channel, Frame(1, b"", b"%d" % channel), cancellable=True)
    frame_sender.cancel_first(1)
    frame_sender.cancel_first(7)
    frame = take(frame_sender)
    assert frame is not None
    assert frame.payload == b"2"
    frame_sender.cancel_first(2)
    assert not frame_sender.has_frames
