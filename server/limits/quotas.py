"""Limits of a proxy user: tunnels at once, and opens a second. No I/O.

channels.py holds the limit by client, since channels.py counts a client's tunnels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from http_network_relay.wire.codes import Code
from http_network_relay.wire.errors import Refused
from server.config import Config
from server.limits.token_bucket import TokenBuckets

# Seconds of the rate in one burst; a burst is at least one open. A tool that opens many tunnels
# at once sends one burst; only a steady stream of opens is held to the rate.
_BURST_S = 10.0


class Counted(Protocol):
    """The part of a tunnel that the counts need."""

    @property
    def place(self) -> tuple[str, str]:
        """The client and the tunnel's id: equal for a `resume` and the tunnel's older leg."""

    @property
    def is_resume(self) -> bool:
        """Whether the user sent `resume`, not `open`."""

    @property
    def is_over(self) -> bool:
        """Whether the tunnel has ended; an ended tunnel does not count, even before forget()."""


class Limits:
    """The counts of one process, by user. Any thread may call the methods."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = config.tunnels_per_user
        self._rate = config.opens_per_s
        size = max(1.0, self._rate * _BURST_S)
        # Key: the user and the kind, `open` or `resume`.
        self._opens: TokenBuckets[tuple[str, str]] = TokenBuckets(self._rate, size, clock=clock)
        # Guards _tunnels.
        self._lock = threading.Lock()
        self._tunnels: dict[str, list[Counted]] = {}

    def count_open(self, user: str, kind: str) -> None:
        """Count an `open` or `resume` against the rate. Raises Refused.

        Each kind has a bucket of its own, so that opens never use up the rate of resumes. All
        tunnels of a user resume at once after a restart. A refused resume is retried in seconds.
        """
        if self._rate and not self._opens.take((user, kind), 1):
            raise Refused(
                Code.TOO_MANY_OPENS,
                f"more than {self._rate:g} tunnels a second were opened or resumed with this "
                "token; try again",
            )

    def admit(self, user: str, tunnel: Counted) -> None:
        """Count a tunnel until its end. Raises Refused.

        A `resume` and the tunnel's older leg count as one. An `open` always counts: the user
        chooses the id, which may already be in use, at this client or at another.
        """
        if not self._most:
            return
        with self._lock:
            tunnels = [each for each in self._tunnels.get(user, ()) if not each.is_over]
            own = tunnel.place if tunnel.is_resume else None
            others = _count([each for each in tunnels if each.place != own])
            if others < self._most:
                tunnels.append(tunnel)
            self._tunnels[user] = tunnels
        if others >= self._most:
            raise Refused(
                Code.USER_FULL,
                f"as many tunnels are open with this token as may be ({self._most}); end one",
            )

    def forget(self, user: str, tunnel: Counted) -> None:
        """Stop counting a tunnel that has ended or was never opened. Idempotent."""
        with self._lock:
            tunnels = [each for each in self._tunnels.get(user, ()) if each is not tunnel]
            if tunnels:
                self._tunnels[user] = tunnels
            else:
                self._tunnels.pop(user, None)


def _count(tunnels: list[Counted]) -> int:
    """Return the number of tunnels; a `resume` and the tunnel's older leg are one."""
    # Two `open`s with equal ids count as two, until the client refuses one of the two.
    opens = [each.place for each in tunnels if not each.is_resume]
    resumed = {each.place for each in tunnels if each.is_resume}
    return len(opens) + len(resumed.difference(opens))
