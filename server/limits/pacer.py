"""Looks after tunnels: ends those that are idle or too old, and paces a user's bytes.

Bytes are paced by credit (docs/protocol.md, "A server that paces"): the limit that is passed
on rises only as tokens come, and no leg is ever paused. One thread, `pacer:tunnels`, raises all
limits after the first, so that nothing here needs a lock; others leave notes in a queue, and
borrow the first credit of a tunnel from purses.py. The thread may wait for a tunnel's locks,
which are held for moments: therefore it is not the timer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from http_network_relay.wire.errors import TunnelError
from server.config import Config
from server.limits.token_bucket import TokenBuckets
from server.logs import ROOT_NAME
from server.service_thread import ServiceThread
from server.tunnels.flow_counters import FIRST_CREDIT_BYTES, FlowCounters

_log = logging.getLogger(f"{ROOT_NAME}.pacer")

# Between two looks at the tokens while somebody waits for them: short against a person's
# patience, long enough that an ack carries some KiB.
_TICK_S = 0.05
# The least that is given at once, but for the rest that somebody wants.
_SMALLEST_RAISE_BYTES = 4096
# Idle and old tunnels are looked for so often: a part of the timeout, a second at most.
_LOOK_S = 1.0
_LOOKS = 10
# Tunnels whose age is remembered after they lost a leg, in case they come back.
_MOST_AGES = 4096


class Paced(Protocol):
    """A tunnel, as the pacer sees it."""

    up: FlowCounters
    down: FlowCounters

    @property
    def tunnel_id(self) -> str: ...

    @property
    def is_over(self) -> bool: ...

    def raise_limit(self, is_up: bool, size: int) -> tuple[int, int]:
        """Raise a limit by `size` at most, and say so; how much it rose, and still might."""

    def fail(self, error: TunnelError) -> None:
        """Reset both ends."""


@dataclass(eq=False)
class _Entry:
    """A tunnel, from its `open` or `resume` on. The pacer's thread alone uses it."""

    user: str
    tunnel: Paced
    begun_at: float
    active_at: float
    is_opened: bool = False
    counts: tuple[int, ...] = ()
    is_told_of: bool = False


@dataclass
class _Meter:
    """The tunnels of one user in one direction. The pacer's thread alone uses it."""

    # The limit of each as far as it was paid for.
    paid: dict[_Entry, int] = field(default_factory=dict)
    waiting: deque[_Entry] = field(default_factory=deque)


class Pacer(ServiceThread):
    """The thread and its tables. What a tunnel does may be told by any thread."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("pacer:tunnels")
        self._rate = config.bytes_per_s
        self._idle_timeout_s = config.idle_timeout_s
        self._max_age_s = config.max_age_s
        self._clock = clock
        self._purses = TokenBuckets(self._rate, FIRST_CREDIT_BYTES, clock=clock)
        shortest = min([s for s in (self._idle_timeout_s, self._max_age_s) if s], default=0.0)
        self._look_s = min(_LOOK_S, shortest / _LOOKS) if shortest else float("inf")
        self._notes: deque[tuple[str, Paced, str]] = deque()
        self._woken = threading.Event()
        self._is_stopped = False
        # The thread's own from here on.
        self._entries: dict[Paced, _Entry] = {}
        self._meters: dict[tuple[str, bool], _Meter] = {}
        self._ages: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._look_at = 0.0

    @property
    def is_pacing(self) -> bool:
        """Whether bytes are paced."""
        return bool(self._rate)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to look after."""
        return bool(self._rate or self._idle_timeout_s or self._max_age_s)

    def start(self) -> None:
        if self.is_on:
            super().start()

    def stop(self) -> None:
        self._is_stopped = True
        self._woken.set()

    def first_credit(self, user: str, is_up: bool, wanted: int) -> int:
        """Return how much of a tunnel's first credit it has at once. Any thread.

        Where its user owes too much, that is less, or nothing: the tunnel then waits its turn.
        """
        return self._purses.borrow(user, is_up, wanted)

    # Notes, from any thread. A deque's append is one step.

    def started(self, user: str, tunnel: Paced) -> None:
        """The client is asked for the tunnel: a client that never answers is idle, too."""
        self._note("started", tunnel, user)

    def opened(self, tunnel: Paced) -> None:
        """The client has accepted it."""
        self._note("opened", tunnel)

    def hungry(self, tunnel: Paced, is_up: bool) -> None:
        """The limit of this direction could rise: an ack has come."""
        self._note("up" if is_up else "down", tunnel)

    def ended(self, tunnel: Paced) -> None:
        """The tunnel is over."""
        self._note("ended", tunnel)

    def _note(self, kind: str, tunnel: Paced, user: str = "") -> None:
        if self.is_on:
            self._notes.append((kind, tunnel, user))
            self._woken.set()

    # The thread.

    def _run(self) -> None:
        while not self._is_stopped:
            self._woken.clear()
            try:
                due_at = self.look()
            except Exception:
                _log.exception("pacer failed")
                due_at = self._clock() + _LOOK_S
            wait_s = max(0.0, due_at - self._clock())
            self._woken.wait(None if due_at == float("inf") else wait_s)

    def look(self) -> float:
        """Do what is due; return when to come again. The thread's work, and the tests'."""
        now = self._clock()
        while self._notes:
            self._take_note(*self._notes.popleft(), now)
        due_at = float("inf")
        for (user, is_up), meter in list(self._meters.items()):
            self._share(meter, user, is_up)
            if meter.waiting:
                due_at = now + _TICK_S
            elif not meter.paid and self._purses.forget(user, is_up):
                del self._meters[user, is_up]
        if self._entries and self._look_s < float("inf"):
            if now >= self._look_at:
                self._look_at = now + self._look_s
                for entry in list(self._entries.values()):
                    self._end_if_due(entry, now)
            due_at = min(due_at, self._look_at)
        return due_at

    def _take_note(self, kind: str, tunnel: Paced, user: str, now: float) -> None:
        entry = self._entries.get(tunnel)
        if kind == "started":
            entry = self._entries[tunnel] = _Entry(user, tunnel, now, now)
            self._note_first_limit(entry, False)
        elif entry is None:
            return
        elif kind == "opened":
            # From here on it is as old as what it resumes; before, nobody knows whose that is.
            key = (entry.user, tunnel.tunnel_id)
            entry.begun_at = self._ages.setdefault(key, entry.begun_at)
            entry.active_at, entry.is_opened = now, True
            self._note_first_limit(entry, True)
            for meter in self._meters_of(entry).values():
                meter.waiting.append(entry)
        elif kind == "ended":
            self._forget(entry)
        else:
            meter = self._meters_of(entry)[kind == "up"]
            if entry not in meter.waiting:
                meter.waiting.append(entry)

    def _note_first_limit(self, entry: _Entry, is_up: bool) -> None:
        """A direction has its first limit, which was borrowed for and nobody else raises."""
        if self._rate:
            flow = _flow(entry.tunnel, is_up)
            meter = self._meters.setdefault((entry.user, is_up), _Meter())
            meter.paid[entry] = max(flow.begun_at, flow.limit)

    def _meters_of(self, entry: _Entry) -> dict[bool, _Meter]:
        """Return those that know the tunnel, by whether they are for bytes up."""
        found = {is_up: self._meters.get((entry.user, is_up)) for is_up in (True, False)}
        return {is_up: meter for is_up, meter in found.items() if meter and entry in meter.paid}

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.tunnel]
        for is_up, meter in self._meters_of(entry).items():
            # Credit that was never used is given back.
            used = _flow(entry.tunnel, is_up).forwarded
            self._purses.pay(entry.user, is_up, used - meter.paid.pop(entry))
            if entry in meter.waiting:
                meter.waiting.remove(entry)
        if not entry.is_opened:
            return
        # Behind all others: so long it may still come back.
        key = (entry.user, entry.tunnel.tunnel_id)
        self._ages.pop(key, None)
        self._ages[key] = entry.begun_at
        while len(self._ages) > max(_MOST_AGES, len(self._entries)):
            self._ages.popitem(last=False)

    # Bytes.

    def _share(self, meter: _Meter, user: str, is_up: bool) -> None:
        """Give the tokens there are to those that wait, the same to each."""
        while meter.waiting and (tokens := self._purses.left(user, is_up)) >= _SMALLEST_RAISE_BYTES:
            share = max(_SMALLEST_RAISE_BYTES, int(tokens) // len(meter.waiting))
            for _ in range(len(meter.waiting)):
                # Not what was left above: tunnels borrow meanwhile.
                tokens = self._purses.left(user, is_up)
                if tokens < _SMALLEST_RAISE_BYTES:
                    break
                entry = meter.waiting.popleft()
                used, hunger = entry.tunnel.raise_limit(is_up, min(share, int(tokens)))
                self._purses.pay(user, is_up, used)
                meter.paid[entry] += used
                if used and hunger:
                    meter.waiting.append(entry)
        for entry in meter.waiting:
            flow = _flow(entry.tunnel, is_up)
            if not entry.is_told_of and flow.forwarded >= flow.limit:
                entry.is_told_of = True
                _log.info(
                    "tunnel slowed reason=bytes_per_second user=%s tunnel=%s",
                    *(entry.user, entry.tunnel.tunnel_id[:8]),
                )

    # Age.

    def _end_if_due(self, entry: _Entry, now: float) -> None:
        up, down = entry.tunnel.up, entry.tunnel.down
        counts = (up.forwarded, up.delivered, down.forwarded, down.delivered)
        if counts != entry.counts:
            entry.counts, entry.active_at = counts, now
        age_s, idle_s = now - entry.begun_at, now - entry.active_at
        if self._max_age_s and age_s >= self._max_age_s:
            message = f"the relay ends tunnels after {self._max_age_s:g} s; connect again"
            entry.tunnel.fail(TunnelError(message, code="max_age"))
        elif self._idle_timeout_s and idle_s >= self._idle_timeout_s:
            message = f"nothing went through the tunnel for {self._idle_timeout_s:g} s"
            entry.tunnel.fail(TunnelError(message, code="idle_timeout"))


def _flow(tunnel: Paced, is_up: bool) -> FlowCounters:
    return tunnel.up if is_up else tunnel.down
