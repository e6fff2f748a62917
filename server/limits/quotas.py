"""What a proxy user may open: how many tunnels at once, and how many a second. No I/O.

The limit by client is where its tunnels are counted, in tunnel.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from http_network_relay.wire.errors import Refused
from server.config import Config

# What may come at once: these seconds' worth, and one at least. A tool that fans out comes in
# one burst; only what never stops is cut down to the rate.
_BURST_S = 10.0
# A user's tunnels that have ended are forgotten when they open the next one; buckets when they
# are full again, looked at when there are so many.
_MANY_BUCKETS = 1000


class Counted(Protocol):
    """A tunnel, as far as it is counted."""

    @property
    def place(self) -> tuple[str, str]:
        """Its client and id: what a user's `resume` has in common with the tunnel's older leg."""

    @property
    def is_resume(self) -> bool:
        """Whether it came by `resume`."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended: then it does not count any more, from that moment on."""


class Limits:
    """The counts of one process, by user. Any thread."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = config.tunnels_per_user
        self._rate = config.opens_per_s
        self._clock = clock
        # Guards everything below.
        self._lock = threading.Lock()
        self._tunnels: dict[str, list[Counted]] = {}
        # (user, open or resume) -> (tokens, when it was so).
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def count_open(self, user: str, kind: str) -> None:
        """Take note of an `open` or `resume`. Raises Refused.

        Each kind has a bucket of its own, so that new tunnels never take from those that come
        back. All of a user's tunnels come back at once after a restart; those that find the
        bucket empty try again by themselves, within seconds.
        """
        if not self._rate:
            return
        size = max(1.0, self._rate * _BURST_S)
        key, now = (user, kind), self._clock()
        with self._lock:
            tokens, since = self._buckets.get(key, (size, now))
            tokens = min(size, tokens + (now - since) * self._rate)
            if len(self._buckets) >= _MANY_BUCKETS:
                self._forget_full_locked(size, now)
            self._buckets[key] = (tokens if tokens < 1 else tokens - 1, now)
        if tokens < 1:
            raise Refused(
                "too_many_opens",
                f"more than {self._rate:g} tunnels a second were opened or resumed with this "
                "token; try again",
            )

    def admit(self, user: str, tunnel: Counted) -> None:
        """Count a tunnel until it is over. Raises Refused.

        A `resume` counts as any other, but not beside the tunnel's own older leg. An `open`
        always counts: its id is the user's choice, and may be in use, here or at another client.
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
                "user_full",
                f"as many tunnels are open with this token as may be ({self._most}); end one",
            )

    def forget(self, user: str, tunnel: Counted) -> None:
        """The tunnel is over, or was not opened after all. Again is harmless."""
        with self._lock:
            tunnels = [each for each in self._tunnels.get(user, ()) if each is not tunnel]
            if tunnels:
                self._tunnels[user] = tunnels
            else:
                self._tunnels.pop(user, None)

    def _forget_full_locked(self, size: float, now: float) -> None:
        self._buckets = {
            key: (tokens, since)
            for key, (tokens, since) in self._buckets.items()
            if tokens + (now - since) * self._rate < size
        }


def _count(tunnels: list[Counted]) -> int:
    """Return how many tunnels these are: a resume and its older leg are one."""
    # Equal ids of two `open`s are two, until the client has refused one.
    opens = [each.place for each in tunnels if not each.is_resume]
    resumed = {each.place for each in tunnels if each.is_resume}
    return len(opens) + len(resumed.difference(opens))
