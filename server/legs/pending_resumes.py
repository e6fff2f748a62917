"""The `resume`s that wait for their client to come back (docs/protocol.md, "Resume").

Only who waits for whom. A leg itself decides, under its own lock, whether it still waits:
so it is opened, refused or forgotten once, whoever comes first.
"""

from __future__ import annotations

import threading
import time
from typing import Generic, Protocol, TypeVar

# After a restart a client comes back within its spread and the 0.3 s of its tries; a device
# behind NAT needs some seconds more. A proxy command tries again anyway.
HELD_RESUME_S = 10.0


class Waiting(Protocol):
    """A leg whose `resume` is held."""

    def open_wanted(self) -> None:
        """Open its tunnel if it still wants one."""


WaitingT = TypeVar("WaitingT", bound=Waiting)


class PendingResumes(Generic[WaitingT]):
    """Legs by the client that they wait for. At most one `resume` a leg: the slots bound it."""

    def __init__(self) -> None:
        # Guards _legs.
        self._lock = threading.Lock()
        self._legs: dict[str, set[WaitingT]] = {}

    def park(self, client: str, leg: WaitingT) -> float:
        """Note that `leg` waits; return until when, monotonic.

        Park first, then look for the client: one that comes in between finds the leg here.
        """
        with self._lock:
            self._legs.setdefault(client, set()).add(leg)
        return time.monotonic() + HELD_RESUME_S

    def forget(self, client: str, leg: WaitingT) -> None:
        """`leg` waits no more. Again is harmless."""
        with self._lock:
            legs = self._legs.get(client, set())
            legs.discard(leg)
            if not legs:
                self._legs.pop(client, None)

    def open_for(self, client: str) -> None:
        """The client is there: let each leg that waits for it open its tunnel."""
        with self._lock:
            legs = list(self._legs.get(client, ()))
        for leg in legs:
            leg.open_wanted()

    def open_all(self) -> None:
        """The server stops: let each leg find that out."""
        with self._lock:
            legs = [leg for waiting in self._legs.values() for leg in waiting]
        for leg in legs:
            leg.open_wanted()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._legs.values()))
