"""The legs that are served now, and what ends them all: revoked credentials, a stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from http_network_relay.wire.codes import CloseCode, Code
from http_network_relay.wire.errors import Refused
from server.access.access import Access
from server.legs.client_leg import ClientLeg
from server.legs.leg import Leg
from server.legs.timer import Timer
from server.legs.user_leg import UserLeg

# How far apart peers should come back after a restart: about the time that a TLS handshake and an
# upgrade take here. Not more: all of some 150 legs are to have their turn before the worker ends
# them.
SPREAD_MS_PER_LEG = 3


class LiveLegs:
    """The legs that are served now. Any thread; iteration sees the legs of one moment."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        # Guards the replacement of _legs, which itself is never changed; notified of each.
        self._changed = threading.Condition()
        self._legs: tuple[Leg, ...] = ()

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._legs)

    def __len__(self) -> int:
        return len(self._legs)

    def add(self, leg: Leg) -> None:
        """Serve the leg from now on: it is ticked, and ended with the others."""
        with self._changed:
            self._legs = (*self._legs, leg)
            self._changed.notify_all()
        self._timer.add(leg)

    def drop(self, leg: Leg) -> None:
        """The leg has ended."""
        with self._changed:
            self._legs = tuple(each for each in self._legs if each is not leg)
            self._changed.notify_all()
        self._timer.drop(leg)

    def going_away(self) -> None:
        """Send `going_away` to all legs. Does not wait."""
        legs = self._legs
        for leg in legs:
            leg.going_away(SPREAD_MS_PER_LEG * len(legs))

    def end(self) -> None:
        """Give all tunnels up, and let each leg flush and close. Does not wait."""
        legs = self._legs
        # Clients first: they end the tunnels, and send the reason to the users.
        for leg in legs:
            if isinstance(leg, ClientLeg):
                leg.end_tunnels(Code.SERVER_RESTART)
        for leg in legs:
            leg.end(CloseCode.RESTART, Code.SERVER_RESTART)

    def abort(self) -> None:
        """Shut every leg down at once."""
        for leg in self._legs:
            leg.abort(Code.SERVER_RESTART)

    def join(self, timeout_s: float) -> bool:
        """Wait until all legs have ended; False if some have not."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._legs, timeout_s)


def enforce_all(access: Access, legs: LiveLegs) -> None:
    """The credentials have changed: end what they do not allow any more."""
    failure: Exception | None = None
    for leg in legs:
        try:
            enforce(access, leg)
        except Exception as exc:
            failure = exc  # The others have their turn first; then all are asked again.
    if failure is not None:
        raise failure


def enforce(access: Access, leg: Leg) -> None:
    """End the leg, or its tunnel, where the credentials do not allow it any more."""
    login = leg.login
    if not access.credentials.is_valid(login):
        leg.revoke(Code.REVOKED, f"the access of {login.name} was revoked, or has expired")
    elif isinstance(leg, UserLeg) and (tunnel := leg.opened_tunnel()) is not None:
        try:
            access.check_open(login.name, tunnel.asked)
        except Refused as exc:
            leg.revoke(exc.code, exc.message)
