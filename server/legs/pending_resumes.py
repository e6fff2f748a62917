"""The `resume`s that wait for their client to come back (docs/protocol.md, "Resume").

This table only says which leg waits for which client. Whether a leg still waits, the leg decides
under its own lock: so a `resume` is opened, refused or forgotten once, by whichever thread comes
first.
"""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

# After a restart a client comes back within its spread and the 0.3 s of its tries; a device
# behind NAT needs some seconds more. A proxy command tries again anyway.
PENDING_RESUME_S = 10.0


class Waiting(Protocol):
    """A leg whose `resume` waits."""

    def try_open(self) -> None:
        """Open the leg's tunnel if the leg still wants one."""


WaitingT = TypeVar("WaitingT", bound=Waiting)


class PendingResumes(Generic[WaitingT]):
    """Legs by the client that they wait for. At most one `resume` a leg: the slots bound it."""

    def __init__(self) -> None:
        # Guards _legs.
        self._lock = threading.Lock()
        self._legs: dict[str, set[WaitingT]] = {}

    def add(self, client: str, leg: WaitingT) -> None:
        """Note that `leg` waits for `client`.

        The caller MUST add first and then look for the client: a client that comes in between
        finds the leg here.
        """
        with self._lock:
            self._legs.setdefault(client, set()).add(leg)

    def discard(self, client: str, leg: WaitingT) -> None:
        """Forget a leg that no longer waits. Again is harmless."""
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
            leg.try_open()

    def fail_all(self) -> None:
        """The server stops: each leg tries, and is refused for that reason."""
        with self._lock:
            legs = [leg for waiting in self._legs.values() for leg in waiting]
        for leg in legs:
            leg.try_open()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._legs.values()))
