"""The deadline of a dial: one object for all its waits, made once and passed down."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.wire.errors import DialError

# RFC 8305, "Connection Attempt Delay": a dead first address costs this much.
STAGGER_S = 0.250


class Deadline:
    """Ends a dial after `timeout_s`, or soon after `is_cancelled` returns true."""

    def __init__(self, timeout_s: float, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._at = time.monotonic() + timeout_s
        self._is_cancelled = is_cancelled

    def slice_s(self) -> float:
        """Return how long to wait, in seconds, before the next check()."""
        return max(0.0, min(STAGGER_S, self._at - time.monotonic()))

    def check(self, failure: str) -> None:
        """Raise DialError with the sentence `failure` if the dial must end."""
        if self._is_cancelled():
            raise DialError("cancelled", f"{failure} before the dial was cancelled")
        if time.monotonic() >= self._at:
            raise DialError("timeout", f"{failure} in time")

    def wait_ready(self, sock: socket.socket, *, write: bool, what: str) -> None:
        """Wait for the peer `what` behind the socket. Raises DialError."""
        while not wait_ready(sock, write=write, timeout_s=self.slice_s()):
            self.check(f"{what} did not answer")
