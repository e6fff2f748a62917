"""The timer of the client and the script: how signals come to it, and how it knows of a sleep."""

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import http_network_relay.timer
from http_network_relay.timer import Timer

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signal_counts_from_when_it_does_not_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that comes while the others are still being set up."""
    real_signal = signal.signal

    def signal_and_raise(number: int, handler: Callable[..., Any]) -> None:
        real_signal(number, handler)
        os.kill(os.getpid(), number)

    heard: queue.SimpleQueue[int] = queue.SimpleQueue()
    timer = Timer(lambda now, _: now + 60.0, heard.put)
    monkeypatch.setattr(signal, "signal", signal_and_raise)
    timer.start(NUMBERS)
    try:
        assert [heard.get(timeout=10.0) for _ in NUMBERS] == list(NUMBERS)
    finally:
        timer.stop()


class WallClock:
    """Stands still but for the timer's waits: each is as long as the next of `waits_s`."""

    def __init__(self, waits_s: Sequence[float]) -> None:
        self._waits_s = list(waits_s)
        self._now = 1e9
        self._waits = False

    def time(self) -> float:
        """Called before each wait and after it."""
        if self._waits:
            self._now += self._waits_s.pop(0)
        self._waits = not self._waits
        return self._now


def slept_after(monkeypatch: pytest.MonkeyPatch, waits_s: Sequence[float]) -> list[bool]:
    """What the tick behind each wait is told, which is planned to take 2 s."""
    clock = SimpleNamespace(time=WallClock([*waits_s, 0.0]).time, monotonic=time.monotonic)
    monkeypatch.setattr(http_network_relay.timer, "time", clock)
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def tick(now: float, slept: bool) -> float:
        told.put(slept)
        return now + 3600.0

    timer = Timer(tick)
    timer.start()
    try:
        assert told.get(timeout=10.0) is False
        found = []
        for _ in waits_s:
            timer.wake()
            found.append(told.get(timeout=10.0))
        return found
    finally:
        timer.stop()


def test_sleep_is_told_once_when_the_wall_clock_went_on_and_the_timers_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An hour, or five seconds more than was planned; by the next tick nothing is new."""
    assert slept_after(monkeypatch, [3602.0, 2.0, 7.1, 0.0]) == [True, False, True, False]


def test_no_sleep_is_told_when_the_clocks_agree_or_the_wall_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor when the process was only slow to run."""
    assert slept_after(monkeypatch, [0.0, 2.0, 6.9, -3600.0]) == [False] * 4


def test_clocks_are_looked_at_every_two_seconds_when_nothing_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest of a wait is waited out after a sleep: an hour of it would be a hang."""
    real, waits_s = http_network_relay.timer.wait_ready, queue.SimpleQueue[float]()

    def wait_ready(sock: Any, *, write: bool, timeout_s: float) -> bool:
        waits_s.put(timeout_s)
        return real(sock, write=write, timeout_s=timeout_s)

    monkeypatch.setattr(http_network_relay.timer, "wait_ready", wait_ready)
    timer = Timer(lambda now, _: now + 3600.0)
    timer.start()
    try:
        assert waits_s.get(timeout=10.0) == 2.0
    finally:
        timer.stop()
