"""The order in which a leg's frame_sender gives its frames out."""

import threading

from http_network_relay.leg.send_queue import Frame, SendQueue
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from tests.support.taking import take

CLOSE = Frame(OP_CLOSE, b"", b"\x03\xe8")


def text(word: str) -> Frame:
    return Frame(OP_TEXT, b"", word.encode())


def rest(frame_sender: SendQueue) -> list[str]:
    """Take until it is empty; data as `head:size`."""
    out = []
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        is_data = frame.opcode == OP_BINARY
        out.append(
            f"{frame.head.decode()}:{len(frame.payload)}"
            if is_data
            else bytes(frame.payload).decode()
        )
    return out


def test_channels_take_turns_and_controls_overtake() -> None:
    """One message a channel; acks, pongs and resets go before all data."""
    box = SendQueue()
    for _ in range(3):
        box.put_data(1, b"a", bytes(65536))
    box.put_data(2, b"b", b"key")
    box.put_ack(1, text("old ack"))
    box.put_ack(1, text("ack"))
    box.put_leg("pong", text("pong"))
    box.put_end(3, text("reset"))
    assert rest(box) == ["ack", "pong", "reset", "a:65536", "b:3", "a:65536", "a:65536"]


def test_small_pieces_are_merged_when_they_wait() -> None:
    """A window of single bytes does not cost an entry for each."""
    box = SendQueue()
    for _ in range(70_000):
        box.put_data(1, b"a", b"x")
    assert rest(box) == ["a:65536", "a:4464"]


def test_eof_follows_the_data_of_its_channel() -> None:
    """And nothing of the channel follows the eof."""
    box = SendQueue()
    box.put_data(1, b"a", bytes(60_000))
    box.put_data(1, b"a", bytes(60_000))
    box.put_eof(1, text("eof"))
    box.put_data(1, b"a", b"late")
    box.put_data(2, b"b", b"x")
    assert rest(box) == ["a:60000", "b:1", "a:60000", "eof"]


def test_close_comes_last_when_it_flushes_and_at_once_when_not() -> None:
    """What is put after it is dropped either way, and the writer ends."""
    for flush, before in ((True, [b"x"]), (False, [])):
        box = SendQueue()
        box.put_data(1, b"a", b"x")
        box.close(CLOSE, flush=flush)
        box.put_data(1, b"a", b"late")
        box.put_leg("pong", text("late"))
        payloads = []
        while (frame := take(box)) is not None:
            payloads.append(bytes(frame.payload))
        assert payloads == [*before, CLOSE.payload]


def test_try_put_never_waits_when_the_lock_is_taken() -> None:
    """The timer's way in: it says no instead of waiting (rule 7)."""
    box = SendQueue()
    assert box.try_put_leg("ping", text("ping"))
    assert rest(box) == ["ping"]
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with box._lock:
            taken.set()
            release.wait(5)

    holder = threading.Thread(target=hold, name="holder")
    holder.start()
    taken.wait(5)
    assert not box.try_put_leg("ping", text("ping"))
    release.set()
    holder.join()
    assert box.try_put_leg("ping", text("ping"))
