"""Limits of a proxy user: how many tunnels at once, and how many opens a second. No I/O.

The limit by client is in channels.py, where a client's tunnels are counted.
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

# Seconds of the rate that may come at once, and one open at least. A tool that fans out comes in
# one burst; only opens that never stop are cut down to the rate.
_BURST_S = 10.0


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
        size = max(1.0, self._rate * _BURST_S)
        # By user and kind: open or resume.
        self._opens: TokenBuckets[tuple[str, str]] = TokenBuckets(self._rate, size, clock=clock)
        # Guards _tunnels.
        self._lock = threading.Lock()
        self._tunnels: dict[str, list[Counted]] = {}

    def count_open(self, user: str, kind: str) -> None:
        """Count an `open` or `resume` against the rate. Raises Refused.

        Each kind has a bucket of its own, so that new tunnels never take from those that come
        back. All of a user's tunnels come back at once after a restart; those that find the
        bucket empty try again by themselves, within seconds.
        """
        if self._rate and not self._opens.take((user, kind), 1):
            raise Refused(
                Code.TOO_MANY_OPENS,
                f"more than {self._rate:g} tunnels a second were opened or resumed with this "
                "token; try again",
            )

    def admit(self, user: str, tunnel: Counted) -> None:
        """Count a tunnel until it is over. Raises Refused.

        A `resume` does not count beside the tunnel's own older leg. An `open` always counts: its
        id is the user's choice, and may be in use, here or at another client.
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
        """The tunnel is over, or was not opened after all. Again is harmless."""
        with self._lock:
            tunnels = [each for each in self._tunnels.get(user, ()) if each is not tunnel]
            if tunnels:
                self._tunnels[user] = tunnels
            else:
                self._tunnels.pop(user, None)


def _count(tunnels: list[Counted]) -> int:
    """Return how many tunnels these are: a resume and its older leg are one."""
    # Equal ids of two `open`s are two, until the client has refused one.
    opens = [each.place for each in tunnels if not each.is_resume]
    resumed = {each.place for each in tunnels if each.is_resume}
    return len(opens) + len(resumed.difference(opens))
