"""All tunnels of one client leg: the table, the numbers and the budgets."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

from http_network_relay.wire.codes import Code
from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from http_network_relay.wire.errors import Refused
from server.tunnels.flow_counters import WindowBudget


class Numbered(Protocol):
    """A tunnel, as far as its client's table needs it."""

    @property
    def owner(self) -> tuple[str, str]:
        """User and tunnel id, equal for a `resume` and the older channel of its tunnel."""

    @property
    def is_resume(self) -> bool:
        """Whether the tunnel came by `resume`."""


TunnelT = TypeVar("TunnelT", bound=Numbered)


class Channels(Generic[TunnelT]):
    """All tunnels of one client leg: the table, the numbers and the budgets.

    `lock` is the one lock of a client leg. It guards everything here, and the counts and states
    of the leg's tunnels. Under the lock there is no I/O, no push() and no log. Controls are
    queued under it, so that they leave in the order of the decisions.
    """

    def __init__(self, budget_bytes: int, tunnels_at_most: int = 0) -> None:
        """`tunnels_at_most` 0: as many as the budgets give."""
        self.lock = threading.Lock()
        self._tunnels_at_most = tunnels_at_most
        self.tunnels: dict[int, TunnelT] = {}
        self.highest = 0
        self.is_closed = False
        self.up_budget = WindowBudget(budget_bytes)
        self.down_budget = WindowBudget(budget_bytes)

    def check_room_locked(self, newcomer: TunnelT) -> None:
        """Raise Refused where the client takes no further tunnel.

        A `resume` does not count beside its own older channel. An `open` always counts: its user
        has chosen the id.
        """
        assert self.lock.locked()
        if self.is_closed:
            raise Refused(Code.CLIENT_OFFLINE, "the client's link was lost")
        if min(self.up_budget.free, self.down_budget.free) < MIN_WINDOW_BYTES:
            raise Refused(Code.BUSY, "the client has too many tunnels; try again later")
        if not self._tunnels_at_most or len(self.tunnels) < self._tunnels_at_most:
            return
        owners = (each.owner for each in self.tunnels.values())
        if newcomer.is_resume and newcomer.owner in owners:
            return
        raise Refused(
            Code.CLIENT_FULL,
            f"as many tunnels of this client are open as may be ({self._tunnels_at_most})",
        )

    def add_locked(self, tunnel: TunnelT) -> int:
        """Give the tunnel the next number, and return that number."""
        assert self.lock.locked()
        self.highest += 1
        self.tunnels[self.highest] = tunnel
        return self.highest
