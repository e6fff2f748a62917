"""ClientLeg: the one leg of a client, which carries many tunnels."""

from __future__ import annotations

import time

from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import CHANNEL_BYTES
from http_network_relay.wire.controls import FROM_CLIENT, parse_control, split_channel
from http_network_relay.wire.errors import LegError, TunnelError
from server.access.credentials import Login
from server.legs.leg import Leg, Message
from server.legs.sender import LegSender
from server.legs.timer import Timer
from server.legs.websocket import Connection, close_frame
from server.tunnels.channels import Channels
from server.tunnels.tunnel import Tunnel

# A leg that was replaced holds a thread beyond its slot while its close frame goes out.
_REPLACED_FLUSH_S = 0.2


class ClientLeg(Leg):
    """The one leg of a client: many channels, one lock for all of them."""

    def __init__(
        self,
        transport: Connection,
        login: Login,
        ping_interval_s: float,
        timer: Timer,
        sender: LegSender,
        budget_bytes: int,
        tunnels_at_most: int,
    ) -> None:
        """`tunnels_at_most` 0: as many as the budgets give."""
        super().__init__(transport, login, ping_interval_s, timer, sender)
        self.channels: Channels[Tunnel] = Channels(budget_bytes, tunnels_at_most)

    def open(self, tunnel: Tunnel, max_window_bytes: int) -> None:
        """Give the tunnel a channel and queue its `open`. Raises TunnelRefused."""
        # Queued under the lock that numbers the channels: they go out in number order.
        with self.channels.lock:
            frame = tunnel.assign_locked(max_window_bytes)
            self.frame_sender.put_first(tunnel.channel, frame, cancellable=True)
        self.frame_sender.push()

    def replace(self, close_code: int) -> None:
        """End this leg at once: a newer leg of the same client is here."""
        self._note("replaced")
        self.end_tunnels("client_replaced")
        self.frame_sender.close(close_frame(close_code), flush=False)
        self._abort_by(time.monotonic() + _REPLACED_FLUSH_S)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, str):
            self._on_control(message)
            return
        channel = 0
        try:
            channel = split_channel(message)
            tunnel = self._tunnel(channel)
            if tunnel is not None:
                tunnel.on_client_data(memoryview(message)[CHANNEL_BYTES:])
        except TunnelError as exc:
            self._fail(exc.channel or channel, exc)

    def _on_control(self, text: str) -> None:
        channel = 0
        try:
            control = parse_control(text, FROM_CLIENT, has_channel=True)
            channel = control.channel
            tunnel = self._tunnel(channel)
            if tunnel is not None:
                tunnel.on_client_control(control)
        except TunnelError as exc:
            self._fail(exc.channel or channel, exc)

    def _tunnel(self, channel: int) -> Tunnel | None:
        """Return the channel's tunnel, None if it has ended. Raises LegError."""
        with self.channels.lock:
            if not 0 < channel <= self.channels.highest:
                raise LegError(f"channel {channel} was never assigned")
            return self.channels.tunnels.get(channel)

    def _fail(self, channel: int, error: TunnelError) -> None:
        tunnel = self._tunnel(channel)
        if tunnel is not None:
            tunnel.fail(error)

    def lost(self) -> None:
        """Tell the users of all its tunnels."""
        self.end_tunnels("client_lost")

    def end_tunnels(self, code: str) -> None:
        """Refuse new tunnels, and tell the users of all tunnels."""
        for tunnel in self._close_channels():
            tunnel.client_lost(code)

    def revoke(self, code: str, message: str) -> None:
        """As in Leg; the tunnels are reset, so that no user waits for this client."""
        for tunnel in self._close_channels():
            tunnel.fail(TunnelError(message, code=code))
        self.end(CloseCode.REVOKED, code)

    def _close_channels(self) -> list[Tunnel]:
        with self.channels.lock:
            self.channels.is_closed = True
            return list(self.channels.tunnels.values())
