"""One end of a tunnel from leg to leg: deaf to the old ones, detached, resumed, expired."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

import http_network_relay.end.client_end
import http_network_relay.end.inbound
import http_network_relay.end.state
import http_network_relay.leg.send_queue
from http_network_relay.end.channel import Channel
from http_network_relay.end.client_end import ClientEnd
from http_network_relay.end.stream import Ack, Position
from http_network_relay.end.tunnel_end import TunnelEnd
from http_network_relay.end.user_end import UserEnd
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.wire.constants import MESSAGE_BYTES, MIN_WINDOW_BYTES, OP_BINARY
from http_network_relay.wire.errors import RelayError, TunnelError
from tests.support.clock import Clock
from tests.support.taking import take
from tests.support.targets import pseudo_random_bytes
from tests.support.waiting import eventually

GONE = RelayError("user_gone", "gone")
LOST = RelayError("leg_lost", "lost")
GRACE_S = 100
WINDOW = MIN_WINDOW_BYTES
End = TypeVar("End", bound=TunnelEnd)
# What the peer says of itself when it has taken nothing.
NOTHING = Position(0, 0, WINDOW)


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


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads switch at nearly every byte code."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def new_channel(channel_id: int = 1) -> Channel:
    return Channel(FrameSender(), channel_id)


@pytest.fixture
def first() -> Channel:
    """The channel on which it was opened."""
    return new_channel()


def opened(made: End) -> End:
    assert made.on_open(WINDOW, GRACE_S)
    return made


@pytest.fixture
def end(first: Channel) -> ClientEnd:
    """A client's end that is open, with credit for a window and a grace."""
    return opened(ClientEnd(first, WINDOW))


@pytest.fixture
def user_end(first: Channel) -> UserEnd:
    """The same of a proxy command."""
    return opened(UserEnd(first, WINDOW))


def sent(channel: Channel) -> list[Any]:
    """What its leg would write now: bytes, or the control's dict without its channel."""
    frames = []
    while channel.frame_sender.has_frames:
        frame = take(channel.frame_sender)
        assert frame is not None
        if frame.opcode == OP_BINARY:
            frames.append(bytes(frame.payload))
        else:
            control = json.loads(frame.payload)
            control.pop("channel", None)
            frames.append(control)
    return frames


def kinds(channel: Channel) -> list[str]:
    return ["data" if isinstance(each, bytes) else each["type"] for each in sent(channel)]


def state(end: TunnelEnd) -> tuple[Any, ...]:
    """All that a message could change."""
    out, into = end.stream.out, end.stream.into
    streams = [{**vars(each)} for each in (out, into)]
    for each in streams:
        for name, value in each.items():
            if hasattr(value, "append"):
                each[name] = list(value)
    attempt = getattr(end, "_attempt", 0)
    return (*streams, list(end.inbound._queue), end.channel, end.ended, attempt, end.state)


def come_back(end: UserEnd, channel: Channel, peer: Position = NOTHING) -> Position:
    """The user's end resumes, and is answered; what it says of itself."""
    position = end.begin_resume()
    end.on_resumed(channel, peer)
    return position


def finish(end: TunnelEnd, channel: Channel) -> None:
    """Both eofs and both acks, on that channel."""
    end.outbound.send_eof()
    end.outbound.on_ack(channel, Ack(end.counts[0], 2**40, True))
    end.inbound.on_eof(channel, end.stream.into.received)
    assert end.inbound.next_chunk() == b""
    end.inbound.delivered_eof()
    assert end.is_finished


def test_no_more_than_a_window_each_way_is_kept_however_often_it_is_cut() -> None:
    """What is sent again is not kept twice. Measured, since a counter cannot know."""
    window = 4 * 2**20
    source = random.Random(1)
    tracemalloc.start()
    try:
        channel = new_channel()
        end = ClientEnd(channel, window)
        end.on_open(window, GRACE_S)
        # Both ways as much as there may be: nothing is acked, and nobody takes what came.
        while size := min(end.outbound.credit(), 2 * MESSAGE_BYTES):
            end.outbound.send(source.randbytes(size))
            sent(channel)
        # So large it is only where that was needed.
        end.stream.into._window.size = window
        end.stream.into.limit = window
        while end.stream.into.received < window:
            room = window - end.stream.into.received
            end.inbound.on_data(channel, source.randbytes(min(MESSAGE_BYTES, room)))
        for attempt in range(1, 6):
            end.detach(channel, LOST)
            assert end.detached_bytes() == (pytest.approx(time.monotonic(), abs=60), 2 * window)
            held, _ = tracemalloc.get_traced_memory()
            assert held < 2 * (window + 2**20), attempt
            channel = new_channel(attempt)
            # As the first limit of a new leg is: most of it waits for credit.
            end.accept_resume(channel, Position(attempt, 0, WINDOW), attempt)
            sent(channel)
    finally:
        tracemalloc.stop()


# Deaf to all links but the newest.

LATE: dict[str, Callable[[TunnelEnd, Channel], Any]] = {
    "data": lambda end, channel: end.inbound.on_data(channel, b"late"),
    "too much data": lambda end, channel: end.inbound.on_data(channel, bytes(10 * WINDOW)),
    "ack": lambda end, channel: end.outbound.on_ack(channel, Ack(0, 2**40, False)),
    "impossible ack": lambda end, channel: end.outbound.on_ack(channel, Ack(2**40, 0, True)),
    "eof": lambda end, channel: end.inbound.on_eof(channel, 0),
    "wrong eof": lambda end, channel: end.inbound.on_eof(channel, 77),
    "reset": lambda end, channel: end.on_reset(channel, GONE),
    "detach": lambda end, channel: end.detach(channel, LOST),
    "failure": lambda end, channel: end.reset(RelayError("protocol_error", "x"), channel),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("when", ["detached", "resumed", "answered"])
def test_message_of_an_old_channel_changes_nothing(
    end: ClientEnd, user_end: UserEnd, first: Channel, name: str, when: str
) -> None:
    """Whatever it is, and however wrong; nothing is raised and nothing answered."""
    made: TunnelEnd = end if when == "answered" else user_end
    made.inbound.on_data(first, b"before")
    made.outbound.send(b"sent")
    newest = new_channel(2)
    if when == "answered":  # The client's end: the old channel may still be there.
        end.accept_resume(newest, NOTHING, 1)
    else:
        user_end.detach(first, LOST)
        user_end.begin_resume()
        if when == "resumed":
            user_end.on_resumed(newest, NOTHING)
    sent(first), sent(newest)
    before = state(made)
    assert not LATE[name](made, first)
    assert state(made) == before
    assert (sent(first), sent(newest)) == ([], [])
    assert made.channel is not first


def test_nothing_is_sent_while_detached_and_no_credit_is_given(
    user_end: UserEnd, first: Channel
) -> None:
    """What the producer had read already is kept; it takes no more from its source."""
    user_end.detach(first, LOST)
    assert user_end.outbound.credit() == 0
    user_end.outbound.send(b"was read already")
    assert user_end.outbound.send_eof()
    assert sent(first) == []
    newest = new_channel(2)
    come_back(user_end, newest)
    assert sent(newest) == [b"was read already", {"type": "eof", "count": 16}]


def test_what_waits_on_a_lost_leg_is_deleted(user_end: UserEnd, first: Channel) -> None:
    """It is kept at this end, and sent again from there."""
    user_end.outbound.send(b"x" * 1000)
    user_end.detach(first, LOST)
    assert sent(first) == []
    newest = new_channel(2)
    come_back(user_end, newest, Position(400, 400, WINDOW))
    assert sent(newest) == [b"x" * 600]


# Detached.


def test_lost_leg_ends_a_tunnel_without_grace_and_one_that_is_not_open() -> None:
    """There is nothing to come back to."""
    for is_open, grace_s in ((True, 0), (False, GRACE_S)):
        channel = new_channel()
        end = ClientEnd(channel, WINDOW)
        if is_open:
            end.on_open(WINDOW, grace_s)
        assert not end.detach(channel, LOST)
        assert end.ended is LOST


def test_lost_leg_detaches_a_tunnel_with_grace_once(end: ClientEnd, first: Channel) -> None:
    """And tells so; a finished one it does not touch."""
    assert end.detach(first, LOST)
    assert not end.detach(first, LOST)
    assert (end.is_over, end.is_detached) == (False, True)
    channel = new_channel()
    other = ClientEnd(channel, WINDOW)
    other.on_open(WINDOW, GRACE_S)
    finish(other, channel)
    assert not other.detach(channel, LOST)
    assert other.is_finished


def test_loss_is_told_so_that_the_producer_looks(first: Channel) -> None:
    """Pump-up must stop reading stdin; and go on when the tunnel is resumed."""
    told: list[int] = []
    end: UserEnd
    end = UserEnd(first, WINDOW, lambda: told.append(end.outbound.credit()))
    end.on_open(1000, GRACE_S)
    end.detach(first, LOST)
    come_back(end, new_channel(), NOTHING._replace(limit=500))
    assert told == [0, 500]


def test_bytes_are_handed_on_while_detached_and_told_by_the_resume(
    user_end: UserEnd, first: Channel
) -> None:
    """The consumer knows of no leg."""
    user_end.inbound.on_data(first, b"x" * 1000)
    user_end.detach(first, LOST)
    chunk = user_end.inbound.next_chunk()
    user_end.inbound.delivered(len(chunk))
    assert user_end.begin_resume() == Position(1000, 1000, 1000 + WINDOW)


def test_bytes_that_are_handed_on_while_the_resume_is_under_way_are_told_behind_it(
    user_end: UserEnd, first: Channel
) -> None:
    """An ack of what `resume` did not say yet, as soon as one is due."""
    for _ in range(2):
        user_end.inbound.on_data(first, b"x" * 65_536)
    user_end.detach(first, LOST)
    assert user_end.begin_resume().delivered == 0
    for _ in range(2):
        user_end.inbound.delivered(len(user_end.inbound.next_chunk()))
    assert sent(first) == []
    newest = new_channel(2)
    user_end.on_resumed(newest, NOTHING)
    (ack,) = sent(newest)
    assert (ack["type"], ack["delivered"]) == ("ack", 131_072)


def test_eof_that_is_handed_on_while_detached_is_acked_when_it_is_said_again(
    user_end: UserEnd, first: Channel
) -> None:
    """Not before: the new channel has seen no eof yet."""
    user_end.inbound.on_eof(first, 0)
    user_end.detach(first, LOST)
    assert user_end.inbound.next_chunk() == b""
    user_end.inbound.delivered_eof()
    newest = new_channel(2)
    come_back(user_end, newest)
    assert sent(newest) == []
    user_end.inbound.on_eof(newest, 0)
    (ack,) = sent(newest)
    assert ack["eof"] is True


def test_eof_that_is_handed_on_late_is_acked_once_on_the_channel_where_it_came(
    user_end: UserEnd, first: Channel
) -> None:
    """It was said again while the consumer still worked on it."""
    user_end.inbound.on_eof(first, 0)
    assert user_end.inbound.next_chunk() == b""
    user_end.detach(first, LOST)
    newest = new_channel(2)
    come_back(user_end, newest)
    user_end.inbound.on_eof(newest, 0)
    assert sent(newest) == []
    user_end.inbound.delivered_eof()
    (ack,) = sent(newest)
    assert ack["eof"] is True


# Expired.


def test_consumer_and_producer_are_told_when_the_grace_is_over() -> None:
    """Whoever waits ends it, with the code of the loss."""
    waits: list[tuple[Callable[[TunnelEnd], Any], Any]] = [
        (lambda end: end.inbound.next_chunk(), None),
        (lambda end: end.outbound.wait_credit(), 0),
        (lambda end: end.wait_over(), None),
    ]
    for wait, result in waits:
        channel = new_channel()
        end = ClientEnd(channel, WINDOW)
        end.on_open(0, 0.05)
        results: list[Any] = []
        thread = threading.Thread(target=lambda e=end, w=wait, r=results: r.append(w(e)))
        thread.start()
        end.detach(channel, LOST)
        thread.join(5.0)
        assert not thread.is_alive()
        assert results == [result]
        assert end.ended is LOST


@pytest.mark.parametrize("look", ["must_stop", "resume_left_s"])
def test_grace_is_over_at_its_second(
    end: ClientEnd, first: Channel, clock: Clock, look: str
) -> None:
    """Whoever looks then ends it; nothing is handed on any more."""
    end.inbound.on_data(first, b"queued")
    end.detach(first, LOST)
    clock.advance(GRACE_S - 0.001)
    getattr(end, look)()
    assert end.ended is None
    clock.advance(0.001)
    getattr(end, look)()
    assert end.ended is LOST
    assert end.inbound.next_chunk() is None
    assert end.stream.out.kept_bytes == 0


def test_grace_begins_anew_with_each_loss(end: ClientEnd, first: Channel, clock: Clock) -> None:
    """A tunnel that was back may wait as long again."""
    end.detach(first, LOST)
    clock.advance(GRACE_S - 1)
    newest = new_channel(2)
    end.accept_resume(newest, NOTHING, 1)
    clock.advance(10 * GRACE_S)
    assert not end.must_stop()
    end.detach(newest, LOST)
    clock.advance(GRACE_S - 1)
    assert not end.must_stop()
    clock.advance(1)
    assert end.must_stop()


def test_only_one_who_waits_is_given_up(end: ClientEnd, first: Channel) -> None:
    """One that was resumed a moment before is not: its peer would never hear of it."""
    assert not end.give_up(LOST)
    end.detach(first, LOST)
    end.accept_resume(new_channel(2), NOTHING, 1)
    assert not end.give_up(LOST)
    assert end.ended is None
    newest = new_channel(3)
    end.accept_resume(newest, NOTHING, 2)
    end.detach(newest, LOST)
    assert end.give_up(LOST)
    assert end.ended is LOST


# Resumed, at the client's end.


def test_accepted_resume_is_answered_before_all_else_on_the_new_channel(
    end: ClientEnd, first: Channel
) -> None:
    """resumed, replay, eof; the channel before hears that it is over."""
    end.inbound.on_data(first, b"came")
    end.outbound.send(b"0123456789")
    end.outbound.send_eof()
    sent(first)
    newest = new_channel(2)
    end.accept_resume(newest, Position(4, 3, WINDOW), 1)
    assert sent(newest) == [
        {"type": "resumed", "received": 4, "delivered": 0, "limit": WINDOW},
        b"456789",
        {"type": "eof", "count": 10},
    ]
    assert [frame["code"] for frame in sent(first)] == ["superseded"]
    assert end.ended is None


def test_superseded_channel_loses_what_it_had_to_send(end: ClientEnd, first: Channel) -> None:
    """It would only be dropped at the other end."""
    end.outbound.send(b"x" * 1000)
    end.accept_resume(new_channel(2), NOTHING, 1)
    assert kinds(first) == ["reset"]


def test_detached_tunnel_has_no_channel_to_reset(end: ClientEnd, first: Channel) -> None:
    """Its leg is gone, or the server said that the channel is."""
    end.detach(first, LOST)
    end.accept_resume(new_channel(2), NOTHING, 1)
    assert sent(first) == []


@pytest.mark.parametrize("attempt", [0, 4, 5])
def test_attempt_that_is_not_newer_is_refused_and_changes_nothing(
    end: ClientEnd, first: Channel, attempt: int
) -> None:
    """However late it comes, and whatever else it says."""
    newest = new_channel(2)
    end.accept_resume(newest, NOTHING, 5)
    sent(first), sent(newest)
    before = state(end)
    late = new_channel(3)
    for peer in (NOTHING, Position(99, 99, 0)):
        with pytest.raises(RelayError) as caught:
            end.accept_resume(late, peer, attempt)
        assert caught.value.code == "superseded"
    assert state(end) == before
    assert (sent(newest), sent(late)) == ([], [])
    assert end.is_at(newest)


def test_impossible_counts_are_refused_and_their_attempt_does_not_count(
    end: ClientEnd, first: Channel
) -> None:
    """The same attempt with true counts is accepted."""
    end.outbound.send(b"abc")
    sent(first)
    before = state(end)
    late = new_channel(2)
    with pytest.raises(TunnelError):
        end.accept_resume(late, Position(4, 0, WINDOW), 1)
    assert state(end) == before
    assert (sent(first), sent(late)) == ([], [])
    end.accept_resume(late, Position(3, 0, WINDOW), 1)
    assert end.is_at(late)


def test_ended_tunnel_answers_with_its_code(end: ClientEnd, first: Channel) -> None:
    """The first reason, with its sentence."""
    end.reset(RelayError("target_lost", "the target is gone"))
    late = new_channel(2)
    with pytest.raises(RelayError, match="the target is gone") as caught:
        end.accept_resume(late, NOTHING, 1)
    assert caught.value.code == "target_lost"
    assert sent(late) == []


def test_finished_tunnel_is_resumed_and_finishes_again(end: ClientEnd, first: Channel) -> None:
    """The peer's last ack was lost: both eofs are said and acked again."""
    end.inbound.on_data(first, b"up")
    end.inbound.delivered(len(end.inbound.next_chunk()))
    end.outbound.send(b"down")
    finish(end, first)
    end.forget()
    for number in (2, 3):
        newest = new_channel(number)
        end.accept_resume(newest, Position(4, 4, WINDOW), number)
        assert not end.is_finished
        end.inbound.on_eof(newest, 2)
        answer = sent(newest)
        # An ack is in the fast lane.
        assert [frame["type"] for frame in answer] == ["resumed", "ack", "eof"]
        assert (answer[1]["delivered"], answer[1]["eof"], answer[2]["count"]) == (2, True, 4)
        end.outbound.on_ack(newest, Ack(4, WINDOW, True))
        assert end.is_finished


def test_finished_tunnel_that_is_resumed_may_lose_its_leg_again(
    end: ClientEnd, first: Channel
) -> None:
    """Until the grace is over, as often as it happens."""
    finish(end, first)
    second, third = new_channel(2), new_channel(3)
    end.accept_resume(second, NOTHING, 1)
    assert end.detach(second, LOST)
    end.accept_resume(third, NOTHING, 2)
    end.inbound.on_eof(third, 0)
    end.outbound.on_ack(third, Ack(0, WINDOW, True))
    assert end.is_finished


@pytest.mark.parametrize(
    ("how", "can"),
    [
        ("alive", True),
        ("finished", True),
        ("finished, resumed", True),
        ("reset here", True),
        ("reset there", False),
        ("expired", False),
        ("never open", False),
        ("no grace", False),
    ],
)
def test_only_an_end_with_an_answer_can_be_asked(how: str, can: bool, clock: Clock) -> None:
    """One that the user ended is forgotten, and nobody asks for one without grace."""
    channel = new_channel()
    end = ClientEnd(channel, WINDOW)
    if how != "never open":
        end.on_open(WINDOW, 0 if how == "no grace" else GRACE_S)
    if how.startswith("finished"):
        finish(end, channel)
    if how == "finished, resumed":
        end.accept_resume(new_channel(2), NOTHING, 1)
    if how == "reset here":
        end.reset(RelayError("target_reset", "x"))
    if how == "reset there":
        end.on_reset(channel, GONE)
    if how == "expired":
        end.detach(channel, LOST)
        clock.advance(GRACE_S)
        assert end.must_stop()
    assert end.can_be_asked == can


def test_target_that_resets_while_detached_is_told_behind_what_it_had_said(
    end: ClientEnd, first: Channel
) -> None:
    """The bytes that were kept go out after the resume, then the reset; a limit holds them up."""
    end.outbound.send(b"said before")
    end.detach(first, LOST)
    end.reset(RelayError("target_reset", "the target reset the connection"))
    assert not end.is_over
    second = new_channel(2)
    end.accept_resume(second, Position(0, 0, 4), 1)
    assert kinds(second) == ["resumed", "data"]
    end.outbound.on_ack(second, Ack(4, 100, False))
    assert kinds(second) == ["data", "reset"]
    assert end.ended is not None
    assert end.ended.code == "target_reset"
    with pytest.raises(RelayError) as caught:
        end.accept_resume(new_channel(3), NOTHING, 2)
    assert caught.value.code == "target_reset"


# Resumed, at the user's end.


def test_resume_that_comes_after_the_end_is_not_attached(user_end: UserEnd, first: Channel) -> None:
    """The user went away while it was asked for."""
    user_end.detach(first, LOST)
    user_end.begin_resume()
    user_end.reset(GONE)
    newest = new_channel(2)
    user_end.on_resumed(newest, Position(77, 0, 0))
    assert sent(newest) == []
    assert user_end.channel is not newest


def test_impossible_answer_is_an_error_and_the_tunnel_stays_detached(
    user_end: UserEnd, first: Channel
) -> None:
    """The caller ends it, or tries again."""
    user_end.detach(first, LOST)
    user_end.begin_resume()
    with pytest.raises(TunnelError):
        user_end.on_resumed(new_channel(2), Position(1, 0, WINDOW))
    assert user_end.is_detached


def test_end_that_was_told_of_no_change_can_begin_to_resume_again(
    user_end: UserEnd, first: Channel
) -> None:
    """A resume that gets no answer; the position is read anew."""
    user_end.inbound.on_data(first, b"abc")
    user_end.detach(first, LOST)
    assert user_end.begin_resume() == Position(3, 0, WINDOW)
    user_end.inbound.delivered(len(user_end.inbound.next_chunk()))
    assert user_end.begin_resume() == Position(3, 3, WINDOW + 3)


# Threads.


def together(*jobs: Callable[[], object]) -> None:
    """Run all at once; the first error is raised."""
    barrier = threading.Barrier(len(jobs))
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        barrier.wait()
        try:
            job()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def accepts(end: ClientEnd, channel: Channel, attempt: int, answers: dict[int, str]) -> None:
    try:
        end.accept_resume(channel, NOTHING, attempt)
        answers[attempt] = "resumed"
    except RelayError as exc:
        answers[attempt] = exc.code


@pytest.mark.usefixtures("fast_switching")
def test_of_resumes_at_once_the_newest_attempt_has_the_tunnel() -> None:
    """In any order; each link before it hears `superseded`, or was refused so."""
    orders = set()
    for _ in range(150):
        first = new_channel()
        end = ClientEnd(first, WINDOW)
        end.on_open(WINDOW, GRACE_S)
        channels = {attempt: new_channel(attempt + 1) for attempt in (1, 2, 3)}
        answers: dict[int, str] = {}
        together(
            *[
                lambda a=a, e=end, li=channels, an=answers: accepts(e, li[a], a, an)
                for a in (3, 1, 2)
            ],
            lambda e=end, f=first: e.detach(f, LOST),
        )
        assert answers[3] == "resumed"
        assert end.is_at(channels[3])
        for attempt, channel in channels.items():
            frames = sent(channel)
            if answers[attempt] == "superseded":
                assert frames == []
            elif attempt == 3:
                assert [frame["type"] for frame in frames] == ["resumed"]
            else:
                assert [frame["type"] for frame in frames] == ["resumed", "reset"]
                assert frames[1]["code"] == "superseded"
        orders.add(tuple(answers.items()))
    assert len(orders) > 1, "the threads never changed their order"


@pytest.mark.usefixtures("fast_switching")
def test_resume_and_expiry_at_once_leave_a_tunnel_that_lives_or_one_that_ended() -> None:
    """Never one that was answered `resumed` and has ended."""
    seen = set()
    for number in range(300):
        is_given_up = number % 3 == 0
        first = new_channel()
        end = ClientEnd(first, WINDOW)
        end.on_open(WINDOW, 0.0002 * (number % 5) + 1e-6)
        newest = new_channel(2)
        answers: dict[int, str] = {}
        end.detach(first, LOST)
        together(
            end.must_stop,
            lambda e=end, n=newest, an=answers: accepts(e, n, 1, an),
            lambda e=end, g=is_given_up: e.give_up(LOST) if g else None,
        )
        if answers[1] == "resumed":
            assert end.ended is None
            assert end.is_at(newest)
            assert kinds(newest) == ["resumed"]
        else:
            assert answers[1] == "leg_lost"
            assert end.ended is LOST
            assert kinds(newest) == []
        seen.add(answers[1])
    assert seen == {"resumed", "leg_lost"}


@pytest.mark.usefixtures("fast_switching")
def test_late_messages_during_a_resume_are_taken_whole_or_not_at_all() -> None:
    """`received` is read when the old channel is deaf: what it says is what was taken."""
    for _ in range(150):
        first = new_channel()
        end = ClientEnd(first, WINDOW)
        end.on_open(WINDOW, GRACE_S)
        newest = new_channel(2)

        def late(end: ClientEnd = end, first: Channel = first) -> None:
            for _ in range(20):
                end.inbound.on_data(first, b"0123456789")

        together(
            late,
            lambda e=end, n=newest: e.accept_resume(n, NOTHING, 1),
            lambda e=end, f=first: e.detach(f, LOST),
        )
        (resumed,) = sent(newest)
        assert resumed["received"] == end.stream.into.received
        assert sum(map(len, end.inbound._queue)) == resumed["received"]
        assert end.is_at(newest)


class Line:
    """Two ends, and what they say to each other from channel to channel, until each is cut."""

    def __init__(self) -> None:
        self.channels = (new_channel(), new_channel())
        self.user = UserEnd(self.channels[0], WINDOW)
        self.client = ClientEnd(self.channels[1], WINDOW)
        self.ends: tuple[TunnelEnd, TunnelEnd] = (self.user, self.client)
        for end in self.ends:
            end.on_open(WINDOW, GRACE_S)
        self.lost = threading.Event()
        # The user takes the answer of the newest leg only: one thread asks and reads it.
        self.asking = threading.Lock()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, job: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            try:
                job(*args)
            except BaseException as exc:
                self.errors.append(exc)
                for end in self.ends:
                    end.on_end(LOST)

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def carry(self, *most: int) -> None:
        """Start both ways of the present channel; each is lost after so many messages."""
        self.lost.clear()
        for which in (0, 1):
            self.start(self._carry, which, self.channels, most[which])

    def _carry(self, which: int, channels: tuple[Channel, Channel], most: int) -> None:
        other, channel = self.ends[1 - which], channels[1 - which]
        for _ in range(most):
            frame = take(channels[which].frame_sender)
            if frame is None:
                return
            if frame.opcode == OP_BINARY:
                other.inbound.on_data(channel, frame.payload)
                continue
            control = json.loads(frame.payload)
            kind = control.pop("type")
            control.pop("channel")
            if kind == "eof":
                other.inbound.on_eof(channel, control["count"])
            elif kind == "ack":
                other.outbound.on_ack(channel, Ack(**control))
            elif kind == "resumed":
                with self.asking:
                    if channels is self.channels:
                        self.user.on_resumed(channel, Position(**control))
        self.lost.set()

    def cut(self) -> None:
        """Lose the present channel with what is on it; both ends hear of it."""
        for channel in self.channels:
            channel.frame_sender.stop()
        for end, channel in zip(self.ends, self.channels, strict=True):
            end.detach(channel, LOST)

    def resume(self, attempt: int, *most: int) -> None:
        """The user comes back on a new channel, which is lost after so many messages."""
        with self.asking:
            self.channels = (new_channel(), new_channel())
        self.client.accept_resume(self.channels[1], self.user.begin_resume(), attempt)
        self.carry(*most)

    def stop(self) -> None:
        for end, channel in zip(self.ends, self.channels, strict=True):
            end.on_end(LOST)
            channel.frame_sender.stop()
        for thread in self.threads:
            thread.join()


def produce(end: TunnelEnd, data: bytes) -> None:
    at = 0
    while at < len(data):
        size = min(end.outbound.wait_credit(), 20_001)
        assert size, "the tunnel ended"
        end.outbound.send(data[at : at + size])
        at += size
    assert end.outbound.send_eof()


def consume(end: TunnelEnd, got: bytearray) -> None:
    while chunk := end.inbound.next_chunk():
        got += chunk
        end.inbound.delivered(len(chunk))
    assert chunk == b"", "the tunnel ended"
    end.inbound.delivered_eof()


@pytest.mark.usefixtures("fast_switching")
@pytest.mark.parametrize("seed", range(4))
def test_two_ends_in_threads_carry_all_bytes_both_ways_over_many_cuts(seed: int) -> None:
    """Producers and consumers know of no cut; the bytes are the very same, and the user is told."""
    rng = random.Random(seed)
    data = [pseudo_random_bytes(size, f"{seed}{size}") for size in (3_000_000, 2_000_000)]
    got = [bytearray(), bytearray()]
    line = Line()
    for which, end in enumerate(line.ends):
        line.start(produce, end, data[which])
        line.start(consume, end, got[1 - which])
    line.carry(5, 5)
    cuts = 0
    try:
        while not line.errors and not line.user.is_over:
            eventually(lambda: line.lost.is_set() or line.user.is_over or line.errors, 10.0)
            if line.user.is_over:
                break  # The proxy command has exited.
            line.cut()
            cuts += 1
            assert cuts < 500
            # Both ways of a channel are lost in the middle of what is said; `resumed` may be too.
            line.resume(cuts, rng.randrange(14), rng.randrange(14))
        line.user.wait_over(10.0)
    finally:
        line.stop()
    assert line.errors == []
    assert line.user.is_finished
    assert got == data
    assert cuts >= 5
