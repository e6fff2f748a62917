"""A tunnel as the limits see it."""

from __future__ import annotations

from typing import Protocol

from http_network_relay.wire.errors import TunnelError
from server.tunnels.flow_counters import FlowCounters


class Paced(Protocol):
    """A tunnel whose bytes, idleness and age are limited."""

    @property
    def up(self) -> FlowCounters:
        """The counts of what the user sends."""

    @property
    def down(self) -> FlowCounters:
        """The counts of what the client sends."""

    @property
    def tunnel_id(self) -> str:
        """The tunnel's id, 32 hex digits."""

    def raise_limit(self, is_up: bool, size: int) -> tuple[int, int]:
        """Raise a limit by `size` at most, and send it; how much it rose, and still could."""

    def fail(self, error: TunnelError) -> None:
        """Reset both ends."""


def flow_of(tunnel: Paced, is_up: bool) -> FlowCounters:
    """Return the counts of one direction."""
    return tunnel.up if is_up else tunnel.down
