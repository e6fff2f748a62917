"""All tunnels of one client leg: the table, the numbers and the budgets."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from server.tunnels.flow_counters import WindowBudget

TunnelT = TypeVar("TunnelT")


class Channels(Generic[TunnelT]):
    """All tunnels of one client leg: the table, the numbers and the budgets.

    `lock` is the one lock of a client leg. It guards everything here and all counts and
    states of the leg's tunnels; under it there is no I/O, no outbox and no log.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.lock = threading.Lock()
        # Set before the leg is served. 0: as many as the budgets give.
        self.tunnels_at_most = 0
        self.tunnels: dict[int, TunnelT] = {}
        self.highest = 0
        self.is_closed = False
        self.up_budget = WindowBudget(budget_bytes)
        self.down_budget = WindowBudget(budget_bytes)
