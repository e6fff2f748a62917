"""The one timer thread of the server: pings, silence and deadlines of all legs.

It sets ping slots and shuts sockets down; it never writes and never waits for a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from server.logs import ROOT_NAME

_log = logging.getLogger(f"{ROOT_NAME}.timer")

# Between two rounds at least: what is due within it shares a round.
_SHORTEST_WAIT_S = 0.005


class Timed(Protocol):
    """A leg, as the timer sees it."""

    def tick(self, now: float) -> float:
        """Do what is due; return when to come again, monotonic."""


class Timer:
    """Calls tick() of each leg when it is due."""

    def __init__(self, legs: Callable[[], Iterable[Timed]]) -> None:
        # Returns an immutable snapshot, so that no lock is needed to walk over it.
        self._legs = legs
        self._woken = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="timer:legs")

    def start(self) -> None:
        """Start the thread; in the process that has the legs, after any fork."""
        self._thread.start()

    def wake(self) -> None:
        """A leg or a deadline is new: look again. Any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Let the thread end."""
        self._is_stopped = True
        self._woken.set()

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_stopped:
            self._woken.clear()
            now = time.monotonic()
            due_at = float("inf")
            for leg in self._legs():
                try:
                    due_at = min(due_at, leg.tick(now))
                except Exception:
                    _log.exception("timer failed for a leg")
            if due_at == float("inf"):
                self._woken.wait()
            else:
                self._woken.wait(max(_SHORTEST_WAIT_S, due_at - time.monotonic()))
