"""NextLeg: dials the next leg while the present one still works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from http_network_relay.dial.backoff import uniform
from http_network_relay.dial.connection import Connection
from http_network_relay.end.user_end import UserEnd
from http_network_relay.wire.errors import RelayError

# The pause between two tries to reach a server that restarts, and for how long to try.
RESTART_RETRY_S = (0.1, 0.3)
RESTART_S = 3.0


class NextLeg:
    """Dials in a thread of its own, for a server that goes away."""

    def __init__(
        self,
        end: UserEnd,
        dial: Callable[[], Connection],
        spread_s: float,
        on_up: Callable[[], None],
    ) -> None:
        """`on_up` is called in the thread when the leg is there."""
        self._end = end
        self._dial = dial
        self._spread_s = spread_s
        self._on_up = on_up
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="next-leg")

    def start(self) -> None:
        """Begin; the caller MUST call take(), which joins the thread."""
        self._thread.start()

    def _run(self) -> None:
        wait_s = uniform(0.0, self._spread_s)
        until = time.monotonic() + self._spread_s + RESTART_S
        while True:
            self._end.wait_over(wait_s)
            if self._end.is_over:
                return
            try:
                self._connection = self._dial()
            except RelayError as exc:
                if not exc.is_retryable or time.monotonic() >= until:
                    return
                wait_s = uniform(*RESTART_RETRY_S)
            else:
                self._on_up()
                return

    def take(self) -> Connection | None:
        """Wait for the leg, which the caller then owns; None if there is none."""
        self._thread.join()
        connection, self._connection = self._connection, None
        return connection
