"""The sender of all legs without a writer."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from server.legs.sender import LegSender
from tests.support.waiting import eventually


class Leg:
    """Counts its calls; says who comes in when."""

    def __init__(self, said: list[object], *, fails: bool = False) -> None:
        self._said = said
        self._fails = fails

    def send_waiting(self) -> None:
        self._said.append(self)
        if self._fails:
            raise ValueError("broken")


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
