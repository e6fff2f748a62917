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


class TunnelEnd:
    """The thread-safe state of one end.

    `inbound` and `outbound` are its directions. A method that takes a `channel` does nothing
    if that is not the newest: what comes late on another leg or channel must not count.
    """

    def __init__(
        self,
        channel: Channel,
        max_window_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change`: called, without a lock, after credit, the leg's loss or the end."""
        self._core = EndCore(channel, max_window_bytes, on_change)
        self.inbound = Inbound(self._core)
        self.outbound = Outbound(self._core)

    # Each is one read; none needs the lock.

    @property
    def ended(self) -> RelayError | None:
        """Why the tunnel ended before it was finished, if it did. The first reason."""
        return self._core.ended

    @property
    def is_finished(self) -> bool:
        """Whether both directions ended cleanly and both ends know."""
        return self._core.state is EndState.FINISHED

    @property
    def is_over(self) -> bool:
        """Finished or ended."""
        return self._core.state.is_over

    @property
    def is_detached(self) -> bool:
        """Whether the end has no leg, and may be resumed."""
        return self._core.state is EndState.DETACHED

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes taken for sending and bytes delivered, for the log."""
        return self._core.stream.out.taken, self._core.stream.into.delivered

    @property
    def first_limit(self) -> int:
        """The bytes that the peer may send at first, for `open` or `opened`."""
        return self._core.stream.into.limit

    @property
    def grace_s(self) -> float:
        """For how long both ends keep the tunnel without a leg; 0 until the tunnel is open."""
        return self._core.grace_s

    # The leg's reader, or whoever opens the tunnel.

    def on_open(self, limit: int, grace_s: float) -> bool:
        """Take the peer's first limit; False if the end came first."""
        with self._core.lock:
            if self._core.state.is_over:
                return False
            self._core.open_locked(limit, grace_s)
            return True

    def on_end(self, error: RelayError) -> None:
        """End the tunnel without a word to the peer; bytes that came are still delivered."""
        with self._core.lock:
            if self._core.state.is_over:
                return
            self._core.end_locked(EndState.ENDED, error)
        self._core.on_change()

    def on_reset(self, channel: Channel, error: RelayError) -> None:
        """The peer has ended the tunnel."""
        with self._core.lock:
            if channel is not self._core.channel or self._core.state.is_over:
                return
            self._core.end_locked(EndState.ENDED, error)
        self._core.on_change()

    def detach(self, channel: Channel, error: RelayError) -> bool:
        """The leg is lost: wait for a resume, or end with `error` if none can come.

        Returns:
            Whether the end waits.
        """
        with self._core.lock:
            if channel is not self._core.channel or self._core.state.is_over:
                return False
            waits = self._core.detach_locked(error)
        channel.drop()
        self._core.on_change()
        return waits

    # Any thread.

    def reset(
        self, error: RelayError, channel: Channel | None = None, *, deliver_s: float = FLUSH_S
    ) -> None:
        """End the tunnel with an error and tell the peer; nothing if it is over already.

        `channel`: only if that is still the newest.
        """
        core = self._core
        with core.lock:
            if core.state.is_over or (channel is not None and channel is not core.channel):
                return
            self.outbound.reset_locked(error, deliver_s)
        core.on_change()

    def resume_left_s(self) -> float:
        """Return for how long a resume may still come; ends a tunnel whose grace is over."""
        with self._core.lock:
            self._core.expire_locked()
            return self._core.resume_left_locked() or 0.0

    def wait_over(self, timeout_s: float | None = None) -> None:
        """Wait until the tunnel is finished or ended."""
        with self._core.lock:
            self._core.wait_locked(lambda: self._core.state.is_over, timeout_s)

    def _attach_locked(self, channel: Channel, peer: Position) -> None:
        """Go on, on `channel`, from where the peer stands."""
        assert self._core.lock.locked()
        self._core.stream.out.resume(peer)
        self._core.attach_locked(channel)
        self.inbound.resumed_locked()
        self.outbound.flush_locked()
