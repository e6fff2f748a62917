"""Shapes a user's bytes per second by credit (docs/protocol.md, "A server that paces").

The limit that is passed to a sender rises only as tokens come; no leg is ever paused. The
pacer's thread raises all limits after the first. The first credit of a tunnel is taken by the
thread that opens the tunnel: were it only counted later, many tunnels that begin at once would
all find nothing owed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.limits.paced import Paced, flow_of
from server.limits.token_bucket import TokenBuckets
from server.logs import ROOT_NAME
from server.tunnels.flow_counters import FIRST_CREDIT_BYTES

_log = logging.getLogger(f"{ROOT_NAME}.pacer")

# Tokens that are not used are kept for so long: a pause makes up for what follows. As much may
# be owed, so that a login waits for no download of the same user.
_BURST_S = 1.0
# Between two looks at the tokens while a tunnel waits for them: short against a person's
# patience, long enough that an ack carries some KiB.
_TICK_S = 0.05
# The least that is given at once, but for the rest that a tunnel wants.
_SMALLEST_RAISE_BYTES = 4096
_NEVER = float("inf")

# User, and whether the bytes go up.
_Key = tuple[str, bool]


@dataclass(eq=False)
class _Entry:
    user: str
    tunnel: Paced
    # Whether the log has said that the tunnel is slowed.
    is_logged: bool = False


@dataclass
class _Meter:
    """The tunnels of one user in one direction."""

    # The limit of each as far as tokens were taken for it.
    paid: dict[_Entry, int] = field(default_factory=dict)
    waiting: deque[_Entry] = field(default_factory=deque)


class RateShaper:
    """The meters and tokens of one process. All but first_credit() is the pacer's thread's."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        """`rate`: bytes a second that a user may have passed on, each way; 0: no limit."""
        self._rate = rate
        burst = max(rate * _BURST_S, FIRST_CREDIT_BYTES)
        self._tokens: TokenBuckets[_Key] = TokenBuckets(rate, burst, debt=burst, clock=clock)
        self._entries: dict[Paced, _Entry] = {}
        self._meters: dict[_Key, _Meter] = {}

    @property
    def is_on(self) -> bool:
        """Whether bytes are paced."""
        return bool(self._rate)

    def first_credit(self, user: str, is_up: bool, wanted: int) -> int:
        """Return how much of a tunnel's first credit it has at once. Any thread.

        Where its user owes too much, that is less, or nothing: the tunnel then waits its turn.
        """
        return self._tokens.take((user, is_up), wanted)

    def started(self, user: str, tunnel: Paced) -> None:
        """The bytes down have their first limit, for which tokens were taken."""
        if self.is_on:
            entry = self._entries[tunnel] = _Entry(user, tunnel)
            self._note_first_limit(entry, False)

    def accepted(self, tunnel: Paced) -> None:
        """The bytes up have their first limit, too."""
        entry = self._entries.get(tunnel)
        if entry is not None:
            self._note_first_limit(entry, True)
            for meter in self._meters_of(entry).values():
                meter.waiting.append(entry)

    def credit_headroom(self, tunnel: Paced, is_up: bool) -> None:
        """The limit of this direction could rise."""
        entry = self._entries.get(tunnel)
        if entry is not None:
            meter = self._meters_of(entry)[is_up]
            if entry not in meter.waiting:
                meter.waiting.append(entry)

    def ended(self, tunnel: Paced) -> None:
        """Give credit back that was never used."""
        entry = self._entries.pop(tunnel, None)
        if entry is None:
            return
        for is_up, meter in self._meters_of(entry).items():
            unused = meter.paid.pop(entry) - flow_of(tunnel, is_up).forwarded
            self._tokens.refund((entry.user, is_up), unused)
            if entry in meter.waiting:
                meter.waiting.remove(entry)

    def look(self, now: float) -> float:
        """Raise limits as far as there are tokens; return when to come again."""
        due_at = _NEVER
        for key, meter in list(self._meters.items()):
            self._share(meter, key)
            if meter.waiting:
                due_at = now + _TICK_S
            elif not meter.paid and self._tokens.discard_full(key):
                del self._meters[key]
        return due_at

    def _note_first_limit(self, entry: _Entry, is_up: bool) -> None:
        flow = flow_of(entry.tunnel, is_up)
        meter = self._meters.setdefault((entry.user, is_up), _Meter())
        meter.paid[entry] = max(flow.begun_at, flow.limit)

    def _meters_of(self, entry: _Entry) -> dict[bool, _Meter]:
        """Return the meters that know the tunnel, by whether they are for bytes up."""
        found = {is_up: self._meters.get((entry.user, is_up)) for is_up in (True, False)}
        return {is_up: meter for is_up, meter in found.items() if meter and entry in meter.paid}

    def _share(self, meter: _Meter, key: _Key) -> None:
        """Give the tokens there are to the tunnels that wait, the same to each."""
        is_up = key[1]
        while meter.waiting and (tokens := self._tokens.level(key)) >= _SMALLEST_RAISE_BYTES:
            share = max(_SMALLEST_RAISE_BYTES, int(tokens) // len(meter.waiting))
            for _ in range(len(meter.waiting)):
                # Not the level above: new tunnels take their first credit meanwhile.
                tokens = self._tokens.level(key)
                if tokens < _SMALLEST_RAISE_BYTES:
                    break
                entry = meter.waiting.popleft()
                taken = self._tokens.take(key, min(share, int(tokens)))
                rise, headroom = entry.tunnel.raise_limit(is_up, taken)
                self._tokens.refund(key, taken - rise)
                meter.paid[entry] += rise
                if rise and headroom:
                    meter.waiting.append(entry)
        for entry in meter.waiting:
            flow = flow_of(entry.tunnel, is_up)
            if not entry.is_logged and flow.forwarded >= flow.limit:
                entry.is_logged = True
                _log.info(
                    "tunnel slowed reason=bytes_per_second user=%s tunnel=%s",
                    *(entry.user, entry.tunnel.tunnel_id[:8]),
                )
