"""Ends tunnels that are idle, or too old. No thread of its own: the pacer's calls."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from http_network_relay.wire.codes import Code
from http_network_relay.wire.errors import TunnelError
from server.limits.paced import Paced

# Interval of the looks for idle and old tunnels: a part of the timeout, a second at most.
_LOOK_S = 1.0
_LOOKS = 10
# Tunnels whose age is remembered after they lost a leg, in case they come back.
_MOST_AGES = 4096
_NEVER = float("inf")


@dataclass(eq=False)
class _Entry:
    """A tunnel, from its `open` or `resume` on."""

    user: str
    tunnel: Paced
    begun_at: float
    active_at: float
    is_opened: bool = False
    counts: tuple[int, ...] = ()


class Lifetimes:
    """The ages of one process. The pacer's thread alone uses it."""

    def __init__(self, idle_timeout_s: float, max_age_s: float) -> None:
        """A limit of 0 is off."""
        self._idle_timeout_s = idle_timeout_s
        self._max_age_s = max_age_s
        shortest = min([s for s in (idle_timeout_s, max_age_s) if s], default=0.0)
        self._interval_s = min(_LOOK_S, shortest / _LOOKS)
        self._entries: dict[Paced, _Entry] = {}
        # By user and tunnel id: when the tunnel began. The newest stands last.
        self._ages: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._look_at = 0.0

    @property
    def is_on(self) -> bool:
        """Whether there is a limit."""
        return bool(self._interval_s)

    def started(self, user: str, tunnel: Paced, now: float) -> None:
        """The client is asked for the tunnel: a tunnel without an answer is idle, too."""
        if self.is_on:
            self._entries[tunnel] = _Entry(user, tunnel, now, now)

    def accepted(self, tunnel: Paced, now: float) -> None:
        """The client has accepted the tunnel, so it is as old as the tunnel that it resumes.

        Before, nobody knows whose tunnel that is.
        """
        entry = self._entries.get(tunnel)
        if entry is None:
            return
        key = (entry.user, tunnel.tunnel_id)
        entry.begun_at = self._ages.setdefault(key, entry.begun_at)
        entry.active_at, entry.is_opened = now, True

    def ended(self, tunnel: Paced) -> None:
        """Remember the age of a tunnel that was open."""
        entry = self._entries.pop(tunnel, None)
        if entry is None or not entry.is_opened:
            return
        # Newest last: the oldest are evicted first, and this tunnel may yet be resumed.
        key = (entry.user, tunnel.tunnel_id)
        self._ages.pop(key, None)
        self._ages[key] = entry.begun_at
        while len(self._ages) > max(_MOST_AGES, len(self._entries)):
            self._ages.popitem(last=False)

    def look(self, now: float) -> float:
        """End what is due; return when to come again."""
        if not self._entries:
            return _NEVER
        if now >= self._look_at:
            self._look_at = now + self._interval_s
            for entry in list(self._entries.values()):
                self._end_if_due(entry, now)
        return self._look_at

    def _end_if_due(self, entry: _Entry, now: float) -> None:
        up, down = entry.tunnel.up, entry.tunnel.down
        counts = (up.forwarded, up.delivered, down.forwarded, down.delivered)
        if counts != entry.counts:
            entry.counts, entry.active_at = counts, now
        age_s, idle_s = now - entry.begun_at, now - entry.active_at
        if self._max_age_s and age_s >= self._max_age_s:
            message = f"the relay ends tunnels after {self._max_age_s:g} s; connect again"
            entry.tunnel.fail(TunnelError(message, code=Code.MAX_AGE))
        elif self._idle_timeout_s and idle_s >= self._idle_timeout_s:
            message = f"nothing went through the tunnel for {self._idle_timeout_s:g} s"
            entry.tunnel.fail(TunnelError(message, code=Code.IDLE_TIMEOUT))
