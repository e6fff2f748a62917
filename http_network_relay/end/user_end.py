"""The proxy command's end of a tunnel: asks for a resume when its leg is lost."""

from __future__ import annotations

from http_network_relay.end.channel import Channel
from http_network_relay.end.stream import Position
from http_network_relay.end.tunnel_end import TunnelEnd


class UserEnd(TunnelEnd):
    """The end that resumes."""

    @property
    def has_both_eofs(self) -> bool:
        """Whether our source ended and the peer's eof was delivered; acks may be missing."""
        return self.stream.out.is_ended and self.stream.into.eof_delivered

    def begin_resume(self) -> Position:
        """Return the position for `resume`. Only while detached: all channels are stale then."""
        with self.lock:
            return self.stream.into.resume()

    def on_resumed(self, channel: Channel, peer: Position) -> None:
        """Go on, on `channel`, after the peer's `resumed`. Raises TunnelError."""
        with self.lock:
            if self.is_over:
                return
            self.stream.out.check_resume(peer)
            self._attach_locked(channel, peer)
        channel.push()
        self.on_change()
