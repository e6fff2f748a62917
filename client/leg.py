"""The client's leg while the leg is up: passes each message to the message's tunnel."""

from __future__ import annotations

import logging
import threading

from client.forwarder import Forwarder, refuse
from client.tunnel_table import TunnelTable
from http_network_relay.dial.connection import Connection
from http_network_relay.end.channel import Channel
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import CHANNEL_BYTES, OP_BINARY, OP_CLOSE
from http_network_relay.wire.controls import (
    TO_CLIENT,
    Ack,
    Control,
    Detached,
    Eof,
    GoingAway,
    Open,
    Opening,
    Reset,
    Resume,
    decode_text,
    parse_control,
    split_channel,
)
from http_network_relay.wire.errors import LegError, RelayError, TunnelError

log = logging.getLogger("http_network_relay.client")


class Leg:
    """The channels of one leg. For the reader thread only, except `is_leaving`."""

    def __init__(self, connection: Connection, tunnels: TunnelTable) -> None:
        self._connection = connection
        self._tunnels = tunnels
        # May contain channels that have ended; each new channel removes the ended ones.
        self._channels: dict[int, tuple[Forwarder, Channel]] = {}
        self._highest_channel_id = 0
        # Channels whose on_pause() is due when no more messages are ready.
        self._owing: dict[int, tuple[Forwarder, Channel]] = {}
        # Set after `going_away` or at the leg's end: the next leg is due.
        self.is_leaving = threading.Event()
        # From the server's `going_away`: spread the reconnect over this many seconds.
        self.spread_s: float | None = None
        # Whether the leg has carried a tunnel.
        self.was_used = False

    def serve(self) -> int:
        """Read until the leg ends; detach all its tunnels; return the close code."""
        code: int = CloseCode.INTERNAL_ERROR
        try:
            code = self._read()
        except LegError as exc:
            code = exc.close_code
            log.error("leg failed: %s", exc)
            self._connection.close(code, str(exc), flush=False)
        finally:
            error = RelayError("leg_lost", "the client lost its connection to the server")
            self._tunnels.detach(self._channels.values(), error)
            self.is_leaving.set()
        return code

    def _read(self) -> int:
        while True:
            opcode, payload = self._connection.receive(self._on_pause if self._owing else None)
            if opcode == OP_CLOSE:
                return int(payload)
            try:
                if opcode == OP_BINARY:
                    self._on_data(payload)
                else:
                    self._on_control(payload)
            except TunnelError as exc:
                self._fail_tunnel(exc)

    def _on_data(self, message: bytes | bytearray | memoryview) -> None:
        channel_id = split_channel(message)
        found = self._find(channel_id)
        if found is None:
            return
        tunnel, channel = found
        try:
            if tunnel.end.inbound.on_data(channel, memoryview(message)[CHANNEL_BYTES:]):
                self._owing[channel_id] = found
        except TunnelError as exc:
            raise TunnelError(str(exc), channel_id, exc.code) from exc

    def _on_pause(self) -> None:
        for tunnel, channel in self._owing.values():
            tunnel.end.inbound.on_pause(channel)
        self._owing.clear()

    def _on_control(self, payload: bytes | bytearray) -> None:
        control = parse_control(decode_text(payload), TO_CLIENT, has_channel=True)
        if isinstance(control, GoingAway):
            self.spread_s = control.spread_ms / 1000
            log.info("server going away spread_ms=%d", control.spread_ms)
            self.is_leaving.set()
        elif isinstance(control, (Open, Resume)):
            self._on_first(control)
        else:
            found = self._find(control.channel)
            if found is not None:
                self._pass_on(*found, control)

    def _pass_on(self, tunnel: Forwarder, channel: Channel, control: Control) -> None:
        end = tunnel.end
        try:
            if isinstance(control, Ack):
                end.outbound.on_ack(channel, control)
            elif isinstance(control, Eof):
                end.inbound.on_eof(channel, control.count)
            elif isinstance(control, Reset):
                end.on_reset(channel, RelayError(control.code, control.message))
            elif isinstance(control, Detached):
                error = RelayError(control.code, "the proxy user's connection was lost")
                self._tunnels.detach([(tunnel, channel)], error)
        except TunnelError as exc:
            # The stream state has no channel number; the reset needs one.
            raise TunnelError(str(exc), channel.channel_id, exc.code) from exc

    def _on_first(self, control: Opening) -> None:
        """Register a new channel for its `open` or `resume`."""
        channel_id = control.channel
        if channel_id <= self._highest_channel_id:
            raise LegError(f"channel {channel_id} was used before")
        self._highest_channel_id = channel_id
        self._channels = {
            number: (tunnel, channel)
            for number, (tunnel, channel) in self._channels.items()
            if tunnel.end.is_at(channel)
        }
        channel = Channel(self._connection.frame_sender, channel_id)
        try:
            if isinstance(control, Open):
                tunnel = self._tunnels.open(control, channel)
            else:
                tunnel = self._tunnels.resume(control, channel)
            self._channels[channel_id] = (tunnel, channel)
            self.was_used = True
        except RelayError as exc:
            refuse(channel, exc)

    def _fail_tunnel(self, exc: TunnelError) -> None:
        """Reset one tunnel for a protocol error; the leg stays up."""
        if not exc.channel:
            raise LegError(str(exc)) from exc  # A bad `going_away` has no channel.
        found = self._find(exc.channel)
        log.warning("tunnel failed channel=%d reason=protocol_error: %s", exc.channel, exc)
        if found is not None:
            tunnel, channel = found
            tunnel.end.reset(RelayError(exc.code, str(exc)), channel)

    def _find(self, channel_id: int) -> tuple[Forwarder, Channel] | None:
        """Return a channel's tunnel, None if the tunnel has ended; a new number is a leg error."""
        if channel_id > self._highest_channel_id:
            raise LegError(f"channel {channel_id} was never opened")
        return self._channels.get(channel_id)
