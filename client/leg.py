"""The client's leg while it is up: reads it and hands each message to its tunnel."""

from __future__ import annotations

import logging
import threading

from client.forwarder import Forwarder, refuse
from client.tunnel_table import TunnelTable
from http_network_relay.dial.connection import Connection
from http_network_relay.end.channel import Link
from http_network_relay.wire.codes import CLOSE_INTERNAL_ERROR
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
    """Channels of one leg. All but `is_leaving` is the reader's own, who calls serve()."""

    def __init__(self, transport: Connection, tunnels: TunnelTable) -> None:
        self._transport = transport
        self._tunnels = tunnels
        # May hold channels that have ended; each new one prunes them.
        self._channels: dict[int, tuple[Forwarder, Link]] = {}
        self._highest_channel = 0
        # Those whose on_pause() is to be called.
        self._owing: dict[int, tuple[Forwarder, Link]] = {}
        # Set when the server is about to go or the leg has ended: time for the next leg.
        self.is_leaving = threading.Event()
        # From the server's `going_away`: spread the return over so many seconds.
        self.spread_s: float | None = None
        # Whether a tunnel came by it.
        self.was_used = False

    def serve(self) -> int:
        """Read until the leg ends; return the close code. Detaches all its tunnels."""
        code = CLOSE_INTERNAL_ERROR
        try:
            code = self._read()
        except LegError as exc:
            code = exc.close_code
            log.error("leg failed: %s", exc)
            self._transport.close(code, str(exc), flush=False)
        finally:
            error = RelayError("leg_lost", "the client lost its connection to the server")
            self._tunnels.detach(self._channels.values(), error)
            self.is_leaving.set()
        return code

    def _read(self) -> int:
        while True:
            opcode, payload = self._transport.receive(self._on_pause if self._owing else None)
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
        channel = split_channel(message)
        found = self._find(channel)
        if found is None:
            return
        tunnel, link = found
        try:
            if tunnel.end.on_data(link, memoryview(message)[CHANNEL_BYTES:]):
                self._owing[channel] = found
        except TunnelError as exc:
            raise TunnelError(str(exc), channel, exc.code) from exc

    def _on_pause(self) -> None:
        for tunnel, link in self._owing.values():
            tunnel.end.on_pause(link)
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
                self._hand(*found, control)

    def _hand(self, tunnel: Forwarder, link: Link, control: Control) -> None:
        end = tunnel.end
        try:
            if isinstance(control, Ack):
                end.on_ack(link, control)
            elif isinstance(control, Eof):
                end.on_eof(link, control.count)
            elif isinstance(control, Reset):
                end.on_reset(link, RelayError(control.code, control.message))
            elif isinstance(control, Detached):
                error = RelayError(control.code, "the proxy user's connection was lost")
                self._tunnels.detach([(tunnel, link)], error)
        except TunnelError as exc:
            # The stream state does not know its channel.
            raise TunnelError(str(exc), link.channel, exc.code) from exc

    def _on_first(self, control: Opening) -> None:
        """Take a new channel, with its `open` or `resume`."""
        channel = control.channel
        if channel <= self._highest_channel:
            raise LegError(f"channel {channel} was used before")
        self._highest_channel = channel
        self._channels = {
            number: (tunnel, link)
            for number, (tunnel, link) in self._channels.items()
            if tunnel.end.is_at(link)
        }
        link = Link(self._transport.outbox, channel)
        try:
            if isinstance(control, Open):
                tunnel = self._tunnels.open(control, link)
            else:
                tunnel = self._tunnels.resume(control, link)
            self._channels[channel] = (tunnel, link)
            self.was_used = True
        except RelayError as exc:
            refuse(link, exc)

    def _fail_tunnel(self, exc: TunnelError) -> None:
        """Reset one tunnel for a broken rule; the leg goes on."""
        if not exc.channel:
            raise LegError(str(exc)) from exc  # A bad `going_away` names no tunnel.
        found = self._find(exc.channel)
        log.warning("tunnel failed channel=%d reason=protocol_error: %s", exc.channel, exc)
        if found is not None:
            tunnel, link = found
            tunnel.end.reset(RelayError(exc.code, str(exc)), link)

    def _find(self, channel: int) -> tuple[Forwarder, Link] | None:
        """Return a channel's tunnel, None if it has ended; a new number is a leg error."""
        if channel > self._highest_channel:
            raise LegError(f"channel {channel} was never opened")
        return self._channels.get(channel)
