"""The client's leg while it is up: reads it and hands each message to its tunnel."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from client.errors import RelayError
from client.stream import Ack
from client.transport import Transport
from client.tunnel import Tunnel, refuse
from client.wire import (
    CHANNEL_BYTES,
    CLOSE_INTERNAL_ERROR,
    OP_BINARY,
    OP_CLOSE,
    TO_CLIENT,
    LegError,
    TunnelError,
    decode_text,
    parse_control,
    split_channel,
)

# Two threads each; far above what a server with its default of 64 threads can ask.
MAX_TUNNELS = 512

log = logging.getLogger("http_network_relay.client")


class Leg:
    """Channels of one leg. serve() is the reader; others only call stop()."""

    def __init__(self, transport: Transport, max_window_bytes: int) -> None:
        self._transport = transport
        self._max_window_bytes = max_window_bytes
        # Guards _tunnels.
        self._lock = threading.Lock()
        self._tunnels: dict[int, Tunnel] = {}
        self._highest_channel = 0
        # From the server's `going_away`: spread the return over so many seconds.
        self.spread_s: float | None = None

    def serve(self) -> int:
        """Read until the leg ends; return the close code. Ends all its tunnels."""
        code = CLOSE_INTERNAL_ERROR
        try:
            code = self._read()
        except LegError as exc:
            code = exc.close_code
            log.error("leg failed: %s", exc)
            self._transport.close(code, str(exc), flush=False)
        finally:
            error = RelayError("leg_lost", "the client lost its connection to the server")
            for tunnel in self._all():
                tunnel.end.on_end(error)
        return code

    def _read(self) -> int:
        while True:
            opcode, payload = self._transport.receive()
            if opcode == OP_CLOSE:
                return int(payload)
            try:
                if opcode == OP_BINARY:
                    self._on_data(payload)
                else:
                    self._on_control(payload)
            except TunnelError as exc:
                self._fail_tunnel(exc)

    def _on_data(self, message: bytes) -> None:
        channel = split_channel(message)
        tunnel = self._find(channel)
        if tunnel is not None:
            self._hand(tunnel, "data", {"data": memoryview(message)[CHANNEL_BYTES:]})

    def _on_control(self, payload: bytes) -> None:
        control = parse_control(decode_text(payload), TO_CLIENT, has_channel=True)
        kind = control["type"]
        if kind == "going_away":
            self.spread_s = control["spread_ms"] / 1000
            log.info("server going away spread_ms=%d", control["spread_ms"])
        elif kind in ("open", "resume"):
            self._on_open(control)
        else:
            tunnel = self._find(control["channel"])
            if tunnel is not None:
                self._hand(tunnel, kind, control)

    def _hand(self, tunnel: Tunnel, kind: str, control: dict[str, Any]) -> None:
        end = tunnel.end
        try:
            if kind == "data":
                end.on_data(control["data"])
            elif kind == "ack":
                end.on_ack(Ack(control["delivered"], control["limit"], control["eof"]))
            elif kind == "eof":
                end.on_eof(control["count"])
            elif kind == "reset":
                end.on_end(RelayError(control["code"], control["message"]))
            else:
                end.on_end(RelayError(control["code"], "the proxy user's connection was lost"))
        except TunnelError as exc:
            # The stream state does not know its channel.
            raise TunnelError(str(exc), tunnel.channel, exc.code) from exc

    def _on_open(self, control: dict[str, Any]) -> None:
        channel = control["channel"]
        if channel <= self._highest_channel:
            raise LegError(f"channel {channel} was used before")
        self._highest_channel = channel
        error = self._why_not(control)
        if error is not None:
            refuse(self._transport.outbox, channel, error)
            return
        tunnel = Tunnel(control, self._transport.outbox, self._max_window_bytes, self._forget)
        with self._lock:
            self._tunnels[channel] = tunnel
        try:
            tunnel.thread.start()
        except RuntimeError as exc:
            log.warning("tunnel refused reason=busy: %s", exc)
            self._forget(tunnel)
            error = RelayError("busy", "the client's machine can start no more threads")
            refuse(self._transport.outbox, channel, error)

    def _why_not(self, control: dict[str, Any]) -> RelayError | None:
        if control["type"] == "resume":
            return RelayError("unknown_tunnel", "this client knows no such tunnel")
        if control["protocol"] != "tcp":
            return RelayError("protocol_unsupported", "only the protocol tcp is supported")
        tunnels = self._all()
        if any(t.key == (control["user"], control["tunnel_id"]) for t in tunnels):
            return RelayError("protocol_error", "a tunnel with this id is there already")
        if len(tunnels) >= MAX_TUNNELS:
            return RelayError("busy", f"this client has {MAX_TUNNELS} tunnels already")
        return None

    def _fail_tunnel(self, exc: TunnelError) -> None:
        """Reset one tunnel for a broken rule; the leg goes on."""
        if not exc.channel:
            raise LegError(str(exc)) from exc  # A bad `going_away` names no tunnel.
        tunnel = self._find(exc.channel)
        log.warning("tunnel failed channel=%d reason=protocol_error: %s", exc.channel, exc)
        if tunnel is not None:
            tunnel.end.reset(RelayError(exc.code, str(exc)))

    def _find(self, channel: int) -> Tunnel | None:
        """Return a channel's tunnel, None if it has ended; a new number is a leg error."""
        if channel > self._highest_channel:
            raise LegError(f"channel {channel} was never opened")
        with self._lock:
            return self._tunnels.get(channel)

    def _forget(self, tunnel: Tunnel) -> None:
        with self._lock:
            self._tunnels.pop(tunnel.channel, None)

    def _all(self) -> list[Tunnel]:
        with self._lock:
            return list(self._tunnels.values())

    # The end.

    def is_over(self) -> bool:
        """Whether none of its tunnels is left."""
        return not self._all()

    def reset_all(self, error: RelayError) -> None:
        """Reset every tunnel with a reason."""
        for tunnel in self._all():
            tunnel.end.reset(error, deliver_s=0.5)

    def join(self, deadline: float) -> None:
        """Join the tunnels' threads; each ends within a second of its end."""
        for tunnel in self._all():
            tunnel.thread.join(max(0.0, deadline - time.monotonic()))
