"""The thread that looks after tunnels: `pacer:tunnels` shapes their rates, and ends the overdue.

The tables belong to this thread alone, and need no lock: other threads leave notes in a queue.
The thread may wait for a tunnel's lock, which is held for moments; the timer never waits for a
lock, so this work is not the timer's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from server.config import Config
from server.limits.lifetime import Lifetimes
from server.limits.paced import Paced
from server.limits.rate_shaper import RateShaper
from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.pacer")

# The next look after one that failed.
_AFTER_ERROR_S = 1.0
_NEVER = float("inf")


class Pacer(ServiceThread):
    """The thread and its notes. Any thread may note what a tunnel does."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("pacer:tunnels")
        self._clock = clock
        self.shaper = RateShaper(config.bytes_per_s, clock)
        self.lifetimes = Lifetimes(config.idle_timeout_s, config.max_age_s)
        # What the thread is to do, given the time. A deque's append is one step.
        self._notes: deque[Callable[[float], None]] = deque()
        self._woken = threading.Event()
        self._is_stopped = False

    @property
    def is_on(self) -> bool:
        """Whether there is anything to look after."""
        return self.shaper.is_on or self.lifetimes.is_on

    def start(self) -> None:
        """Start the thread; in the worker process, after any fork. stop() and join() end it."""
        if self.is_on:
            super().start()

    def stop(self) -> None:
        """Let the thread end."""
        self._is_stopped = True
        self._woken.set()

    # Notes, from any thread.

    def started(self, user: str, tunnel: Paced) -> None:
        """The client is asked for the tunnel."""

        def act(now: float) -> None:
            self.shaper.started(user, tunnel)
            self.lifetimes.started(user, tunnel, now)

        self._note(act)

    def accepted(self, tunnel: Paced) -> None:
        """The client has accepted the tunnel."""

        def act(now: float) -> None:
            self.shaper.accepted(tunnel)
            self.lifetimes.accepted(tunnel, now)

        self._note(act)

    def credit_headroom(self, tunnel: Paced, is_up: bool) -> None:
        """An ack has come: the limit of this direction could rise."""
        self._note(lambda _: self.shaper.credit_headroom(tunnel, is_up))

    def ended(self, tunnel: Paced) -> None:
        """The tunnel is over."""

        def act(_: float) -> None:
            self.shaper.ended(tunnel)
            self.lifetimes.ended(tunnel)

        self._note(act)

    def _note(self, act: Callable[[float], None]) -> None:
        if self.is_on:
            self._notes.append(act)
            self._woken.set()

    # The thread.

    def _run(self) -> None:
        while not self._is_stopped:
            self._woken.clear()
            try:
                due_at = self.look()
            except Exception:
                _log.exception("pacer failed")
                due_at = self._clock() + _AFTER_ERROR_S
            wait_s = max(0.0, due_at - self._clock())
            self._woken.wait(None if due_at == _NEVER else wait_s)

    def look(self) -> float:
        """Do what is due; return when to come again. The thread's work, and the tests'."""
        now = self._clock()
        while self._notes:
            self._notes.popleft()(now)
        return min(self.shaper.look(now), self.lifetimes.look(now))
