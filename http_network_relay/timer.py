"""The one timer thread of a process: pings, deadlines, and the signals.

The timer polls a socket pair, into which the interpreter writes the number of each signal at
once (signal.set_wakeup_fd). A Python handler would be too late: it runs when the main thread
next runs, which may be inside recv() until the next byte.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable

from http_network_relay.leg.duplex_socket import wait_ready

# A wait that ends so much later than planned, by the wall clock, means that the machine slept
# or that the process was stopped.
_SLEPT_S = 5.0
# The longest wait, whatever is due: the monotonic clock stands still while the machine sleeps,
# and afterwards the rest of the wait is still to come.
_LONGEST_WAIT_S = 2.0
# Codes in the pair beside signal numbers, which lie between the two.
_WAKE = 0
_STOP = 255


class Timer:
    """Calls `tick(now, slept)` when it is due, and `on_signal(number)` for each signal.

    `tick` returns the time of its next call, monotonic. Both run in the timer's thread, and MUST
    neither write to a leg nor wait for a lock.
    """

    def __init__(
        self,
        tick: Callable[[float, bool], float],
        on_signal: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._tick = tick
        self._on_signal = on_signal
        # From start() to stop(): the side that the thread reads, and the side to write to.
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._thread = threading.Thread(target=self._run, name="timer")

    def start(self, signals: Iterable[int] = ()) -> None:
        """Start the thread and catch `signals` (main thread only); stop() ends both."""
        self._pair = socket.socketpair()
        for side in self._pair:
            side.setblocking(False)
        self._thread.start()
        numbers = tuple(signals)
        if numbers:
            # Before the handlers, which would lose a signal.
            signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
        for number in numbers:
            # Only replaces the default action: the number comes through the socket pair.
            signal.signal(number, lambda _number, _frame: None)

    def wake(self) -> None:
        """Call `tick` now, since something is due sooner than it said. Never waits."""
        self._post(_WAKE)

    def stop(self) -> None:
        """End the thread and join it. By the thread that called start()."""
        if self._pair is None:
            return
        self._post(_STOP)
        self._thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        for side in self._pair:
            side.close()
        self._pair = None

    def _post(self, code: int) -> None:
        pair = self._pair
        if pair is not None:
            # A full pair wakes the thread anyway; a closed one has no thread any more.
            with contextlib.suppress(OSError):
                pair[1].send(bytes((code,)))

    def _run(self) -> None:
        assert self._pair is not None  # Made by start().
        posted = self._pair[0]
        slept = False
        codes = b""
        while _STOP not in codes:
            for code in codes:
                if code != _WAKE:
                    self._on_signal(code)
            now = time.monotonic()
            wait_s = max(0.0, min(self._tick(now, slept) - now, _LONGEST_WAIT_S))
            planned = time.time() + wait_s
            is_posted = wait_ready(posted, write=False, timeout_s=wait_s)
            codes = posted.recv(4096) if is_posted else b""
            slept = time.time() - planned > _SLEPT_S
