"""The one sender thread of the server: it serves the outboxes of all legs without a writer.

Most legs are idle, and what they send is small: a ping, an answer, a close. A thread each that
waits for such a moment costs memory, and some kernels time as well, for each that waits.
"""

from __future__ import annotations

import logging
import queue
from typing import Protocol

from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.sender")


class Sending(Protocol):
    """A leg, as the sender sees it."""

    def send_waiting(self) -> None:
        """Send what the socket takes at once; have a writer for the rest. Never waits."""


class LegSender(ServiceThread):
    """Calls send_waiting() of each leg whose outbox has called."""

    def __init__(self) -> None:
        super().__init__("sender:legs")
        # SimpleQueue.put is one step of the interpreter: the timer may come in here. Bounded by
        # the legs: an outbox that has called calls again only when that was heard.
        self._called: queue.SimpleQueue[Sending | None] = queue.SimpleQueue()

    def call(self, leg: Sending) -> None:
        """The leg's outbox has something. Any thread; never waits."""
        self._called.put(leg)

    def stop(self) -> None:
        """Let the thread end; after the legs, which have nobody else to start their writers."""
        self._called.put(None)

    def _run(self) -> None:
        while (leg := self._called.get()) is not None:
            try:
                leg.send_waiting()
            except Exception:
                _log.exception("sender failed for a leg")
            # Not kept while nobody calls.
            del leg
