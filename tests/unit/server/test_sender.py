"""The sender thread of all legs."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from server.legs.sender import LegSender, Next
from tests.support.waiting import eventually


class Leg:
    """Counts its calls; says who comes in when."""

    def __init__(self, said: list[object], *, fails: bool = False) -> None:
        self._said = said
        self._fails = fails
        # What it answers when it is served; then that nothing is left.
        self.following: list[Next] = []

    def send_waiting(self) -> Next:
        self._said.append(self)
        if self._fails:
            raise ValueError("broken")
        return self.following.pop(0) if self.following else Next.CALLED

    def fileno(self) -> int:
        raise AssertionError("no socket is full")


@pytest.fixture
def sender() -> Iterator[LegSender]:
    made = LegSender()
    made.start()
    yield made
    made.stop()
    made.join(5)
    assert not any(thread.name == "sender:legs" for thread in threading.enumerate())


def test_each_leg_that_calls_is_served_in_order(
    sender: LegSender, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails stops nobody, and is told."""
    said: list[object] = []
    first, broken, last = Leg(said), Leg(said, fails=True), Leg(said)
    for leg in (first, broken, last, first):
        sender.call(leg)
    eventually(lambda: len(said) == 4)
    assert said == [first, broken, last, first]
    assert caplog.text.count("sender failed") == 1


def test_all_that_called_are_served_before_it_ends() -> None:
    """stop() behind them."""
    sender, said = LegSender(), list[object]()
    legs = [Leg(said) for _ in range(100)]
    for leg in legs:
        sender.call(leg)
    sender.stop()
    sender.start()
    sender.join(5)
    assert said == legs


def test_leg_that_was_served_is_not_kept(sender: LegSender) -> None:
    """Though nobody calls any more."""
    said: list[object] = []

    def served() -> weakref.ref[Leg]:
        leg = Leg(said)
        sender.call(leg)
        eventually(lambda: said)
        said.clear()
        return weakref.ref(leg)

    gone = served()

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    eventually(is_gone)


def test_leg_that_is_not_through_has_another_turn_behind_the_others(sender: LegSender) -> None:
    """One after the other, without a new call."""
    said: list[object] = []
    long, short = Leg(said), Leg(said)
    long.following = [Next.AT_ONCE, Next.AT_ONCE]
    sender._calls.extend([(long, None), (short, None)])
    sender._wake()
    eventually(lambda: len(said) == 4)
    assert said == [long, short, long, long]


def test_leg_that_waits_for_openssl_is_tried_again(sender: LegSender) -> None:
    """After 50 ms, and without a busy loop."""
    said: list[object] = []
    leg = Leg(said)
    leg.following = [Next.SOON, Next.SOON]
    begun = time.monotonic()
    sender.finish(leg)
    assert said == [leg] * 3
    assert 0.1 <= time.monotonic() - begun < 2


def test_leg_that_ends_when_the_sender_has_ended_waits_for_nobody() -> None:
    """Nor does one that was waiting: the process is about to end."""
    sender, said = LegSender(), list[object]()
    stuck = Leg(said)
    stuck.following = [Next.SOON] * 10**6
    sender.start()
    waiting = threading.Thread(target=sender.finish, args=(stuck,))
    waiting.start()
    eventually(lambda: said)
    stuck.following = []
    stuck.send_waiting = lambda: Next.WRITABLE  # type: ignore[method-assign]
    sender._full.add(stuck)
    sender.stop()
    sender.join(5)
    waiting.join(5)
    assert not waiting.is_alive()
    sender.finish(Leg(said))


def test_end_of_a_leg_is_waited_for(sender: LegSender) -> None:
    """finish() returns when nothing more is sent, and not before."""
    said: list[object] = []
    leg = Leg(said)
    leg.following = [Next.AT_ONCE] * 5
    sender.finish(leg)
    assert len(said) == 6
    assert not sender._ending
