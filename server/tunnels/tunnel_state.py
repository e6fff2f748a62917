"""The states of a tunnel at the server, drawn in docs/architecture.md, "States"."""

from __future__ import annotations

from enum import Enum


class TunnelState(Enum):
    """State of a tunnel at the server. Two states are final: CLOSED and REFUSED."""

    # No channel yet: the client knows nothing of the tunnel.
    NEW = "new"
    # An `open` was queued for the client.
    ASKED = "asked"
    # A `resume` was queued, and the client has not checked its token: the sender of the `resume`
    # must not be able to end a tunnel that lives at the client.
    UNPROVEN = "unproven"
    # The client has answered `opened` or `resumed`.
    OPEN = "open"
    # The tunnel has ended after it was open.
    CLOSED = "closed"
    # The tunnel has ended before the client accepted it.
    REFUSED = "refused"


TUNNEL_TRANSITIONS: dict[TunnelState, frozenset[TunnelState]] = {
    TunnelState.NEW: frozenset({TunnelState.ASKED, TunnelState.UNPROVEN}),
    TunnelState.ASKED: frozenset({TunnelState.OPEN, TunnelState.REFUSED}),
    TunnelState.UNPROVEN: frozenset({TunnelState.OPEN, TunnelState.REFUSED}),
    TunnelState.OPEN: frozenset({TunnelState.CLOSED}),
    TunnelState.CLOSED: frozenset(),
    TunnelState.REFUSED: frozenset(),
}
