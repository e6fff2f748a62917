"""The timer of all legs: it ticks those that are due, and keeps none that is over."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise

import pytest

from server.legs.timer import Timer
from tests.support.waiting import eventually

FAR_S = 3600.0


class Leg:
    """Says when it wants to be ticked again, and counts."""

    def __init__(self, *waits_s: float, fails: int = 0) -> None:
        self._waits_s = list(waits_s)
        self._fails = fails
        self.ticks: list[float] = []

    def tick(self, now: float) -> float:
        self.ticks.append(now)
        if len(self.ticks) <= self._fails:
            raise ValueError("broken")
        return now + (self._waits_s.pop(0) if self._waits_s else FAR_S)


@pytest.fixture
def timer() -> Iterator[Timer]:
    made = Timer()
    made.start()
    yield made
    made.stop()
    made.join(5)
    assert not any(thread.name == "timer:legs" for thread in threading.enumerate())


def test_only_legs_that_are_due_are_ticked(timer: Timer) -> None:
    """Of a thousand, the one."""
    idle = [Leg() for _ in range(1000)]
    busy = Leg(*[0.01] * 10)
    for leg in (*idle, busy):
        timer.add(leg)
    eventually(lambda: len(busy.ticks) == 11)
    assert all(len(leg.ticks) == 1 for leg in idle)
    assert all(later - sooner >= 0.01 for sooner, later in pairwise(busy.ticks))


def test_look_brings_a_date_forward_and_the_old_one_is_void(timer: Timer) -> None:
    """It is not ticked once more when the first date comes."""
    leg, last = Leg(0.2, FAR_S), Leg(0.3)
    timer.add(leg)
    timer.look(leg)
    timer.add(last)
    eventually(lambda: len(last.ticks) == 2)
    assert len(leg.ticks) == 2


def dropped(timer: Timer) -> weakref.ref[Leg]:
    """A leg that was added, ticked once, and dropped."""
    leg = Leg()
    timer.add(leg)
    eventually(lambda: len(leg.ticks) == 1)
    timer.drop(leg)
    timer.look(leg)
    timer.drop(leg)
    return weakref.ref(leg)


def test_dropped_leg_is_not_kept(timer: Timer) -> None:
    """Though its date is an hour away; a late look does not bring it back."""
    gone, last = dropped(timer), Leg(0.05)
    timer.add(last)
    # The thread has another one in hand, so that none of its names holds the dropped one.
    eventually(lambda: len(last.ticks) == 2)
    gc.collect()
    assert gone() is None


def test_leg_that_fails_is_tried_again_and_stops_nobody(
    timer: Timer, caplog: pytest.LogCaptureFixture
) -> None:
    """A second later, with a line in the log."""
    broken, other = Leg(fails=1), Leg(*[0.01] * 3)
    begun = time.monotonic()
    timer.add(broken)
    timer.add(other)
    eventually(lambda: len(other.ticks) == 4)
    eventually(lambda: len(broken.ticks) == 2)
    assert broken.ticks[1] - begun >= 1.0
    assert "timer failed" in caplog.text
