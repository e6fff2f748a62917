"""All tunnels of the client, by user and id. They outlive the legs that carry them.

Legs' readers open, resume and detach; each tunnel's own thread says when it is closed.
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

# Two threads each; far above what a server with its default of 64 threads can ask.
MAX_TUNNELS = 512
# Tunnels that wait for a resume: users who are lost must not cost a small device its memory, nor
# take the places of those who come. But the loss of our own leg is nobody's who was on it: as
# many as a leg carries, with the smallest window each from the server's budget.
MAX_DETACHED = 256
# What they keep: that budget, which is 64 MiB each way, and 64 KiB for each: a message that is
# acked in part is kept whole.
MAX_DETACHED_BYTES = 144 * 1024 * 1024
# Tunnels that are over and remembered.
MAX_REMEMBERED = 512

_Key = tuple[str, str]

log = logging.getLogger("http_network_relay.client")


class TunnelTable:
    """Opens, finds, limits and ends."""

    def __init__(
        self, max_window_bytes: int, grace_s: int, allow: tuple[TargetRule, ...] = ()
    ) -> None:
        self._max_window_bytes = max_window_bytes
        self._grace_s = grace_s
        self._allow = allow
        # Guards the three below.
        self._lock = threading.Lock()
        # Why no more are opened.
        self._stopped: RelayError | None = None
        self._alive: dict[_Key, Forwarder] = {}
        # Closed ones, oldest first, with the time of their end.
        self._over: dict[_Key, tuple[Forwarder, float]] = {}

    def open(self, control: Open, channel: Channel) -> Forwarder:
        """Begin a tunnel. Raises RelayError, whose code is the refusal."""
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
        """Let a tunnel go on, on `link`. Raises RelayError, whose code is the refusal."""
        key = (control.user, control.tunnel_id)
        with self._lock:
            self._forget_late_locked()
            tunnel = self._alive.get(key) or self._over.get(key, (None, 0.0))[0]
        # The same words for whatever does not fit: they must not tell which tunnels are there.
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
        """The leg of these channels is lost: keep their tunnels for a while, or end them."""
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
            # It may have been resumed meanwhile, by the reader of another leg.
            if tunnel.end.give_up(RelayError("user_lost", "too many tunnels wait for a resume")):
                log.warning("tunnel given up %s: too many wait for their users", tunnel.about)

    def alive(self) -> list[Forwarder]:
        """Return all that are not closed."""
        with self._lock:
            return list(self._alive.values())

    def _on_closed(self, tunnel: Forwarder) -> None:
        """In the tunnel's thread, the last that it does."""
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
        """Reset every tunnel with a reason, and refuse those that are still to come."""
        with self._lock:
            self._stopped = error
        for tunnel in self.alive():
            tunnel.end.reset(error, deliver_s=0.5)

    def join(self, deadline: float) -> bool:
        """Join the tunnels' threads; each ends within a second of its end. Whether all have."""
        tunnels = self.alive()
        for tunnel in tunnels:
            tunnel.thread.join(max(0.0, deadline - time.monotonic()))
        return not any(tunnel.thread.is_alive() for tunnel in tunnels)
