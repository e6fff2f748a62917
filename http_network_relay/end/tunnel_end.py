"""One end of a tunnel, between its leg and its two threads: what client and proxy command share.

The end outlives its legs: a detached end waits for a resume on another leg
(docs/protocol.md, "Resume").
"""

from __future__ import annotations

from collections.abc import Callable

from http_network_relay.end.channel import Channel
from http_network_relay.end.inbound import Inbound
from http_network_relay.end.outbound import Outbound
from http_network_relay.end.state import EndCore, EndState
from http_network_relay.end.stream import Position
from http_network_relay.wire.constants import FLUSH_S
from http_network_relay.wire.errors import RelayError


class TunnelEnd(EndCore):
    """The thread-safe state of one end, and its two directions.

    A method that takes a `channel` does nothing if that is not the newest: what comes late
    on another leg or channel must not count.
    """

    def __init__(
        self,
        channel: Channel,
        max_window_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(channel, max_window_bytes, on_change)
        self.inbound = Inbound(self)
        self.outbound = Outbound(self)

    # One read each; none needs the lock.

    @property
    def is_finished(self) -> bool:
        """Whether both directions ended cleanly and both ends know."""
        return self.state is EndState.FINISHED

    @property
    def is_detached(self) -> bool:
        """Whether the end has no leg, and may be resumed."""
        return self.state is EndState.DETACHED

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes taken for sending and bytes delivered, for the log."""
        return self.stream.out.taken, self.stream.into.delivered

    @property
    def first_limit(self) -> int:
        """The bytes that the peer may send at first, for `open` or `opened`."""
        return self.stream.into.limit

    # The leg's reader, or whoever opens the tunnel.

    def on_open(self, limit: int, grace_s: float) -> bool:
        """Take the peer's first limit; False if the end came first."""
        with self.lock:
            if self.is_over:
                return False
            self.open_locked(limit, grace_s)
            return True

    def on_end(self, error: RelayError) -> None:
        """End the tunnel without a word to the peer; bytes that came are still delivered."""
        with self.lock:
            if self.is_over:
                return
            self.end_locked(EndState.ENDED, error)
        self.on_change()

    def on_reset(self, channel: Channel, error: RelayError) -> None:
        """The peer has ended the tunnel."""
        with self.lock:
            if channel is not self.channel or self.is_over:
                return
            self.end_locked(EndState.ENDED, error)
        self.on_change()

    def detach(self, channel: Channel, error: RelayError) -> bool:
        """The leg is lost: wait for a resume, or end with `error` if none can come.

        Returns:
            Whether the end waits.
        """
        with self.lock:
            if channel is not self.channel or self.is_over:
                return False
            waits = self.detach_locked(error)
        channel.drop()
        self.on_change()
        return waits

    # Any thread.

    def reset(
        self, error: RelayError, channel: Channel | None = None, *, deliver_s: float = FLUSH_S
    ) -> None:
        """End the tunnel with an error and tell the peer; nothing if it is over already.

        `channel`: only if that is still the newest.
        """
        with self.lock:
            if self.is_over or (channel is not None and channel is not self.channel):
                return
            self.outbound.reset_locked(error, deliver_s)
        self.on_change()

    def resume_left_s(self) -> float:
        """Return for how long a resume may still come; ends a tunnel whose grace is over."""
        with self.lock:
            self.expire_locked()
            return self.resume_left_locked() or 0.0

    def wait_over(self, timeout_s: float | None = None) -> None:
        """Wait until the tunnel is finished or ended."""
        with self.lock:
            self.wait_locked(lambda: self.is_over, timeout_s)

    def _attach_locked(self, channel: Channel, peer: Position) -> None:
        """Go on, on `channel`, from where the peer stands."""
        assert self.lock.locked()
        self.stream.out.resume(peer)
        self.attach_locked(channel)
        self.inbound.resumed_locked()
        self.outbound.flush_locked()
