"""How long a wait in a dial may last: until its deadline, or until the dial is cancelled."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.wire.errors import DialError, RelayError

# RFC 8305, "Connection Attempt Delay": a dead first address costs this much.
STAGGER_S = 0.250


def slice_s(deadline: float) -> float:
    """Return how long to wait before the next look at the deadline and a cancellation."""
    return max(0.0, min(STAGGER_S, deadline - time.monotonic()))


def check_going_on(failure: str, deadline: float, is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise DialError("cancelled", f"{failure} before the dial was cancelled")
    if time.monotonic() >= deadline:
        raise DialError("timeout", f"{failure} in time")


def wait_until(
    sock: socket.socket,
    deadline: float,
    is_cancelled: Callable[[], bool] = lambda: False,
    *,
    write: bool,
    what: str,
) -> None:
    """Wait for the socket until the deadline; raises RelayError when it has passed."""
    while not wait_ready(sock, write=write, timeout_s=slice_s(deadline)):
        if is_cancelled():
            raise RelayError("server_unreachable", f"the dial of {what} was cancelled")
        if time.monotonic() >= deadline:
            raise RelayError("server_unreachable", f"{what} did not answer in time")
