"""The registry of the client's tunnels, by user and id. Tunnels outlive their legs.

The legs' readers open, resume and detach; each tunnel's own thread reports the close.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from client.forwarder import Forwarder
from http_network_relay.end.channel import Channel
from http_network_relay.end.stream import Position
from http_network_relay.rules.target import TargetRule
from http_network_relay.wire.controls import Open, Resume
from http_network_relay.wire.errors import RelayError, TunnelError

# Each tunnel has two threads. A server with its default of 64 threads asks for far fewer.
MAX_TUNNELS = 512
# Detached tunnels. Lost users must not exhaust a small device's memory or displace new users. A
# lost leg of the client is no user's fault: the limit is one leg's tunnels, each with the smallest
# window from the server's budget.
MAX_DETACHED = 256
# Bytes kept by detached tunnels: the server's budget of 64 MiB each way, plus 64 KiB per tunnel,
# because a message acknowledged in part is kept whole.
MAX_DETACHED_BYTES = 144 * 1024 * 1024
# Closed tunnels kept to answer a late `resume`.
MAX_REMEMBERED = 512

_Key = tuple[str, str]

log = logging.getLogger("http_network_relay.client")


class TunnelTable:
    """Opens, finds, limits and resets tunnels."""

    def __init__(
        self, max_window_bytes: int, grace_s: int, allow: tuple[TargetRule, ...] = ()
    ) -> None:
        self._max_window_bytes = max_window_bytes
        self._grace_s = grace_s
        self._allow = allow
        # Guards the three fields below.
        self._lock = threading.Lock()
        # The refusal of every further `open`, set by reset_all().
        self._stopped: RelayError | None = None
        self._alive: dict[_Key, Forwarder] = {}
        # Closed tunnels, oldest first, each with the time to forget the tunnel.
        self._over: dict[_Key, tuple[Forwarder, float]] = {}

    def open(self, control: Open, channel: Channel) -> Forwarder:
        """Start a tunnel. Raises RelayError, whose code is the refusal."""
        if control.protocol != "tcp":
            raise RelayError("protocol_unsupported", "only the protocol tcp is supported")
        settings = (self._max_window_bytes, self._grace_s, self._allow)
        tunnel = Forwarder(control, channel, *settings, self._on_closed)
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._forget_late_locked()
            if tunnel.key in self._alive or tunnel.key in self._over:
                raise RelayError("protocol_error", "a tunnel with this id is there already")
            if len(self._alive) >= MAX_TUNNELS:
                raise RelayError("busy", f"this client has {MAX_TUNNELS} tunnels already")
            self._alive[tunnel.key] = tunnel
        try:
            tunnel.thread.start()
        except RuntimeError as exc:
            with self._lock:
                del self._alive[tunnel.key]
            log.warning("tunnel refused reason=busy: %s", exc)
            raise RelayError("busy", "the client's machine can start no more threads") from exc
        return tunnel

    def resume(self, control: Resume, channel: Channel) -> Forwarder:
        """Resume a tunnel on `channel`. Raises RelayError, whose code is the refusal."""
        key = (control.user, control.tunnel_id)
        with self._lock:
            self._forget_late_locked()
            tunnel = self._alive.get(key) or self._over.get(key, (None, 0.0))[0]
        # One answer for every mismatch: the answer must not reveal which tunnels exist.
        if tunnel is None or not tunnel.is_opened_by(control) or not tunnel.end.can_be_asked:
            raise RelayError(
                "unknown_tunnel",
                "the client does not have this tunnel any more: it was started anew, or the"
                " connection was away for too long",
            )
        peer = Position(control.received, control.delivered, control.limit)
        try:
            tunnel.end.accept_resume(channel, peer, control.attempt)
        except TunnelError as exc:
            raise RelayError("protocol_error", str(exc)) from exc
        log.info("tunnel resumed %s attempt=%d", tunnel.about, control.attempt)
        return tunnel

    def detach(self, carried: Iterable[tuple[Forwarder, Channel]], error: RelayError) -> None:
        """Detach the tunnels of a lost leg, or end those that cannot be resumed."""
        for tunnel, channel in carried:
            if tunnel.end.detach(channel, error):
                log.info("tunnel detached %s reason=%s", tunnel.about, error.code)
        self._limit_detached()

    def _limit_detached(self) -> None:
        waits = []
        for tunnel in self.alive():
            waiting = tunnel.end.detached_bytes()
            if waiting is not None:
                waits.append((*waiting, tunnel))
        waits.sort(key=lambda wait: wait[0])
        kept = sum(size for _, size, _ in waits)
        while len(waits) > MAX_DETACHED or kept > MAX_DETACHED_BYTES:
            _, size, tunnel = waits.pop(0)
            kept -= size
            # False: the reader of another leg has resumed the tunnel meanwhile.
            if tunnel.end.give_up(RelayError("user_lost", "too many tunnels wait for a resume")):
                log.warning("tunnel given up %s: too many wait for their users", tunnel.about)

    def alive(self) -> list[Forwarder]:
        """Return all tunnels that are not closed."""
        with self._lock:
            return list(self._alive.values())

    def _on_closed(self, tunnel: Forwarder) -> None:
        """Move a tunnel to the closed ones. The tunnel's thread, as its last action."""
        end = tunnel.end
        with self._lock:
            del self._alive[tunnel.key]
            if end.can_be_asked:
                self._over[tunnel.key] = (tunnel, time.monotonic() + end.grace_s)
                while len(self._over) > MAX_REMEMBERED:
                    del self._over[next(iter(self._over))]

    def _forget_late_locked(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, until) in self._over.items() if until <= now]:
            del self._over[key]

    # The end.

    def reset_all(self, error: RelayError) -> None:
        """Reset every tunnel with a reason, and refuse all later ones."""
        with self._lock:
            self._stopped = error
        for tunnel in self.alive():
            tunnel.end.reset(error, deliver_s=0.5)

    def join(self, deadline: float) -> bool:
        """Join all threads, which end within 1 s of their tunnel; return whether all have ended."""
        tunnels = self.alive()
        for tunnel in tunnels:
            tunnel.thread.join(max(0.0, deadline - time.monotonic()))
        return not any(tunnel.thread.is_alive() for tunnel in tunnels)
