"""The one timer thread of the server: pings, silence and deadlines of all legs.

It sets ping slots and shuts sockets down; it never writes and never waits for a lock.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.timer")

# Between two rounds at least: what is due within it shares a round. With many legs that costs a
# third of a round for each, and nothing that is timed here is so urgent.
_SHORTEST_WAIT_S = 0.05
# A leg whose tick failed is tried again then.
_AFTER_ERROR_S = 1.0


class Timed(Protocol):
    """A leg, as the timer sees it."""

    def tick(self, now: float) -> float:
        """Do what is due; return when to come again, monotonic."""


class Timer(ServiceThread):
    """Calls tick() of each leg when it is due.

    The cost of a round is that of the legs that are due, however many there are.
    """

    def __init__(self) -> None:
        super().__init__("timer:legs")
        # What other threads say of legs, in order. The timer's thread alone takes.
        self._news: deque[tuple[Callable[[Timed], None], Timed]] = deque()
        self._woken = threading.Event()
        self._is_stopped = False
        # The thread's own: dates by time, the number of each leg's date, and the legs by these.
        # A date whose number is gone is outdated; it keeps no leg that is over.
        self._queue: list[tuple[float, int]] = []
        self._dates: dict[Timed, int] = {}
        self._legs: dict[int, Timed] = {}
        self._numbers = itertools.count()

    def add(self, leg: Timed) -> None:
        """Tick the leg from now on. Any thread, as all below."""
        self._tell(self._tick, leg)

    def look(self, leg: Timed) -> None:
        """A deadline of the leg is new. Nothing if it was not added, or was dropped."""
        self._tell(self._look, leg)

    def drop(self, leg: Timed) -> None:
        """The leg is over."""
        self._tell(self._drop, leg)

    def stop(self) -> None:
        self._is_stopped = True
        self._woken.set()

    def _tell(self, what: Callable[[Timed], None], leg: Timed) -> None:
        self._news.append((what, leg))
        self._woken.set()

    # The thread.

    def _run(self) -> None:
        while not self._is_stopped:
            self._woken.clear()
            while self._news:
                what, leg = self._news.popleft()
                what(leg)
            self._tick_due()
            if not self._queue:
                self._woken.wait()
            else:
                self._woken.wait(max(_SHORTEST_WAIT_S, self._queue[0][0] - time.monotonic()))

    def _tick_due(self) -> None:
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            _, number = heapq.heappop(self._queue)
            leg = self._legs.get(number)
            if leg is not None:
                self._tick(leg)

    def _tick(self, leg: Timed) -> None:
        now = time.monotonic()
        try:
            due_at = leg.tick(now)
        except Exception:
            _log.exception("timer failed for a leg")
            due_at = now + _AFTER_ERROR_S
        self._drop(leg)
        number = next(self._numbers)
        self._dates[leg], self._legs[number] = number, leg
        heapq.heappush(self._queue, (due_at, number))

    def _look(self, leg: Timed) -> None:
        if leg in self._dates:
            self._tick(leg)

    def _drop(self, leg: Timed) -> None:
        number = self._dates.pop(leg, None)
        if number is not None:
            del self._legs[number]
