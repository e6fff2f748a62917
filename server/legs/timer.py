"""The one timer thread of the server: pings, silence and deadlines of all legs.

The thread sets ping slots and aborts legs, never writes, and never waits for a lock.
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

# Least seconds between two rounds: all legs due within this time share a round. With many legs
# a shared round costs a third of single rounds. No deadline here needs a finer clock.
_SHORTEST_WAIT_S = 0.05
# Seconds from a failed tick to the leg's next tick.
_AFTER_ERROR_S = 1.0


class Timed(Protocol):
    """The part of a leg that the timer calls."""

    def tick(self, now: float) -> float:
        """Do the due actions; return the monotonic time of the next tick. MUST NOT wait."""


class Timer(ServiceThread):
    """Calls tick() of each leg at the time that the leg's last tick() returned.

    The cost of a round grows with the legs that are due, not with all legs.
    """

    def __init__(self) -> None:
        super().__init__("timer:legs")
        # Calls of other threads, in order. Only the timer's thread removes calls.
        self._news: deque[tuple[Callable[[Timed], None], Timed]] = deque()
        self._woken = threading.Event()
        self._is_stopped = False
        # Only the timer's thread uses these: a heap of (time, number), the number of each leg, and
        # each leg by number. The heap holds numbers, so that no entry keeps an ended leg alive.
        self._queue: list[tuple[float, int]] = []
        self._dates: dict[Timed, int] = {}
        self._legs: dict[int, Timed] = {}
        self._numbers = itertools.count()

    def add(self, leg: Timed) -> None:
        """Tick the leg from now on. Any thread may call this and the methods up to stop()."""
        self._tell(self._tick, leg)

    def look(self, leg: Timed) -> None:
        """Tick the leg now, since its deadline has changed; ignored for an unknown leg."""
        self._tell(self._look, leg)

    def drop(self, leg: Timed) -> None:
        """Stop ticking the leg, which has ended."""
        self._tell(self._drop, leg)

    def stop(self) -> None:
        self._is_stopped = True
        self._woken.set()

    def _tell(self, what: Callable[[Timed], None], leg: Timed) -> None:
        self._news.append((what, leg))
        self._woken.set()

    # All methods below run in the timer's thread.

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
