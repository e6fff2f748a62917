"""The one sender thread of the server: sends for all legs what no push() could send.

A push() sends at once what the socket takes. The rest, the close, and frames that were put under
a lock are left to this thread. It waits for all full sockets in one selector, so a peer that does
not read costs no thread.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import selectors
import socket
import threading
from collections import deque
from typing import Protocol

from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.sender")

# OpenSSL may want to read before it writes on. The leg's reader may take that event away, so
# such a wait is short and then tries again.
_CROSS_WAIT_S = 0.05


class Next(enum.Enum):
    """When a leg is to be served again."""

    CALLED = "when it calls: nothing is left, or the leg is lost"
    AT_ONCE = "after the other legs had their turn"
    WRITABLE = "when the socket takes more"
    SOON = "after a moment: OpenSSL waits for the peer"


class Sending(Protocol):
    """A leg, as the sender sees it."""

    def send_waiting(self) -> Next:
        """Send what the socket takes at once. Never waits for the network."""

    def fileno(self) -> int:
        """Return the number of the leg's socket, which is open until finish() has returned."""


class LegSender(ServiceThread):
    """Calls send_waiting() of each leg that has called, as often as it takes."""

    def __init__(self) -> None:
        super().__init__("sender:legs")
        # Bounded by the legs: one that has called calls again only when that was served.
        self._calls: deque[tuple[Sending, threading.Event | None]] = deque()
        self._is_stopped = False
        # Whether the thread has ended: nobody serves a call any more.
        self._is_over = False
        # Whether the thread is about to wait in the selector: a call has to wake it then.
        self._is_idle = False
        # The thread's own: legs that end, that wait for their socket, or for a moment.
        self._ending: dict[Sending, threading.Event] = {}
        self._full: set[Sending] = set()
        self._later: list[Sending] = []

    def start(self) -> None:
        """Start the thread. Call start() in the worker process: no two share the descriptors."""
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_w.setblocking(False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        super().start()

    def call(self, leg: Sending) -> None:
        """Have the leg served. Any thread; never waits, takes no lock."""
        self._calls.append((leg, None))
        self._wake()

    def finish(self, leg: Sending) -> None:
        """Wait until the leg's close was sent, or the leg is lost; then it is forgotten.

        The caller MUST have queued a close, or stopped the sender of the leg, and see to it that
        the timer aborts a leg whose peer does not read.
        """
        done = threading.Event()
        self._calls.append((leg, done))
        self._wake()
        if not self._is_over:
            done.wait()

    def stop(self) -> None:
        """Let the thread end behind all calls; after the legs, which have nobody else."""
        self._is_stopped = True
        self._wake()

    def _wake(self) -> None:
        # The thread looks at the calls once more between setting this and its wait.
        if self._is_idle:
            self._is_idle = False
            with contextlib.suppress(OSError):  # Full: woken already. Closed: it has ended.
                self._wake_w.send(b"\0")

    # The thread.

    def _run(self) -> None:
        with self._selector, self._wake_r, self._wake_w:
            due: list[Sending] = []
            while due or self._calls or not self._is_stopped:
                again = [leg for leg in due if self._serve(leg) is Next.AT_ONCE]
                due.clear()  # A leg is not kept while nobody calls.
                due = self._wait(has_more=bool(again)) + again
        # Legs that end now or later wait for nobody: the process ends.
        self._is_over = True
        for done in (*self._ending.values(), *(done for _, done in self._calls)):
            if done is not None:
                done.set()

    def _wait(self, *, has_more: bool) -> list[Sending]:
        """Return the legs whose turn it is now."""
        self._is_idle = True
        timeout_s = _CROSS_WAIT_S if self._later else None
        if has_more or self._calls or self._is_stopped:
            timeout_s = 0.0
        events = self._selector.select(timeout_s)
        self._is_idle = False
        legs, self._later = self._later, []
        for key, _ in events:
            if key.data is None:
                self._wake_r.recv(64)
            else:
                legs.append(key.data)
        while self._calls:
            leg, done = self._calls.popleft()
            if done is not None:
                self._ending[leg] = done
            legs.append(leg)
        return legs

    def _serve(self, leg: Sending) -> Next:
        try:
            following = leg.send_waiting()
        except Exception:
            _log.exception("sender failed for a leg")
            following = Next.CALLED
        if following is Next.WRITABLE and leg not in self._full:
            self._full.add(leg)
            self._selector.register(leg.fileno(), selectors.EVENT_WRITE, leg)
        elif following is not Next.WRITABLE and leg in self._full:
            self._full.remove(leg)
            self._selector.unregister(leg.fileno())
        if following is Next.SOON:
            self._later.append(leg)
        elif following is Next.CALLED and leg in self._ending:
            self._ending.pop(leg).set()
        return following
