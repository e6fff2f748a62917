"""What the relay tells its legs when it is about to end them."""

from __future__ import annotations

from typing import Any

from server.access.credentials import Credentials
from server.config import Config
from server.relay import Relay
from server.worker.drain import LEAVE_S


class ToldLeg:
    """A leg that notes over which time it is to come back."""

    spread_ms = -1

    def going_away(self, spread_ms: int) -> None:
        self.spread_ms = spread_ms


def spread_of(count: int) -> int:
    relay = Relay(Config(), Credentials({}, {}))
    legs: list[Any] = [ToldLeg() for _ in range(count)]
    for leg in legs:
        relay._legs.add(leg)
    relay.drain()
    (spread_ms,) = {leg.spread_ms for leg in legs}
    return int(spread_ms)


def test_legs_have_their_turn_before_they_are_ended_when_a_worker_is_replaced() -> None:
    """All of 150; the more there are the longer they are spread, so that they are no herd."""
    assert spread_of(150) <= LEAVE_S * 1000
    assert spread_of(64) <= LEAVE_S * 1000 / 2, "time for the dial too"
    assert spread_of(1000) == 10 * spread_of(100) > 1000
