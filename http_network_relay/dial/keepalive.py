"""When a leg pings, and when it counts as lost: silence, sleep, another network."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Any

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import Code
from http_network_relay.wire.constants import OP_PING, SILENCE_INTERVALS
from http_network_relay.wire.errors import RelayError

# A machine that slept, or came into another network, pings at once and waits this long.
_AFTER_SLEEP_S = 3.0
# How often to look whether the way to the server goes out by another address.
_LOOK_S = 2.0
# Until the next try to put a ping, when another thread is inside the queue.
_RETRY_S = 0.01
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def far_peer(sock: Any) -> Any:
    """Return the address of a peer on another machine, None for one that is here."""
    try:
        peer = sock.getpeername() if sock.family in _INTERNET else None
    except OSError:
        return None
    return None if peer is None or ipaddress.ip_address(peer[0]).is_loopback else peer


def _source_address(peer: Any) -> str | None:
    """Return the local address of the route to `peer`, a getpeername(); None without a route.

    No packet is sent, and nothing waits: the kernel looks into its routes.
    """
    family = socket.AF_INET if len(peer) == 2 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError:
        return None


class Keepalive:
    """The pings and the patience of one leg. The timer's thread alone uses it."""

    def __init__(
        self, frame_sender: FrameSender, duplex: DuplexSocket, peer: Any, ping_interval_s: float
    ) -> None:
        """`peer` is a far_peer(): on this machine the way to the server never changes."""
        self._frame_sender = frame_sender
        self._duplex = duplex
        self._peer = peer
        self._ping_interval_s = ping_interval_s
        self._ping_at = time.monotonic() + ping_interval_s
        self._woke_at = 0.0
        self._look_at = float("inf") if peer is None else 0.0
        # The address that the server was reached from last.
        self._source: str | None = None

    def tick(self, now: float, *, slept: bool) -> float:
        """Ping if that is due; return when to be called again. Never writes, never waits.

        Raises RelayError when nothing was heard for too long.
        """
        if slept or self._has_moved(now):
            self._woke_at = self._ping_at = now
        heard_at = self._duplex.heard_at
        if heard_at < self._woke_at:
            silent_at = self._woke_at + _AFTER_SLEEP_S
        else:
            silent_at = heard_at + SILENCE_INTERVALS * self._ping_interval_s
        if now >= silent_at:
            silence = f"nothing was heard from the server for {now - heard_at:.0f} s"
            raise RelayError(Code.LEG_LOST, silence)
        if now >= self._ping_at:
            is_put = self._frame_sender.try_put_leg("ping", Frame(OP_PING, b"", b""))
            self._ping_at = now + (self._ping_interval_s if is_put else _RETRY_S)
        return min(self._ping_at, silent_at, self._look_at)

    def _has_moved(self, now: float) -> bool:
        """Return whether the server is reached from another address than before.

        A laptop that changes its Wi-Fi: the old connection is dead, and nothing reports it.
        """
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_S
        before, after = self._source, _source_address(self._peer)
        if after is not None:  # No network: the address of before may come back.
            self._source = after
        return None not in (before, after) and before != after
