"""The states of one end of a tunnel, and the data shared by both directions."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable

from http_network_relay.end.channel import Channel
from http_network_relay.end.stream import Stream
from http_network_relay.wire.constants import FLUSH_S
from http_network_relay.wire.errors import RelayError, TunnelError


class EndState(enum.Enum):
    """The states of one end of a tunnel (docs/architecture.md, "States")."""

    OPENING = "opening"
    OPEN = "open"
    # The leg is lost; a resume may follow.
    DETACHED = "detached"
    # Both eofs were delivered and acknowledged.
    FINISHED = "finished"
    # This end has reset the tunnel; the reason answers a resume.
    RESET = "reset"
    # The peer, the loss of the leg or this program has ended the tunnel; no reset is sent.
    ENDED = "ended"
    # No resume came within the grace period.
    EXPIRED = "expired"

    def __init__(self, word: str) -> None:
        self.has_error = word in ("reset", "ended", "expired")
        self.is_over = self.has_error or word == "finished"


# Any other transition is a bug.
END_TRANSITIONS: dict[EndState, tuple[EndState, ...]] = {
    EndState.OPENING: (EndState.OPEN, EndState.RESET, EndState.ENDED),
    # OPEN to OPEN: a newer attempt to resume replaces the channel.
    EndState.OPEN: (
        EndState.OPEN,
        EndState.DETACHED,
        EndState.FINISHED,
        EndState.RESET,
        EndState.ENDED,
    ),
    EndState.DETACHED: (EndState.OPEN, EndState.RESET, EndState.ENDED, EndState.EXPIRED),
    # A resume repeats a last ack that was lost with the user's leg.
    EndState.FINISHED: (EndState.OPEN,),
    EndState.RESET: (),
    EndState.ENDED: (),
    EndState.EXPIRED: (),
}


class EndCore:
    """The lock, the state, the streams and the present channel of one end.

    A single read of a field needs no lock. Only this class's methods change a field.
    """

    def __init__(
        self, channel: Channel, max_window_bytes: int, on_change: Callable[[], None]
    ) -> None:
        """`on_change`: called without the lock after credit, the leg's loss or the end."""
        self.on_change = on_change
        # Guards the whole end. Messages are queued under the lock, which keeps their order;
        # push() follows the release.
        self.lock = threading.Lock()
        # Notified of every event for which a thread of the tunnel waits.
        self.changed = threading.Condition(self.lock)
        self.stream = Stream(max_window_bytes)
        self.state = EndState.OPENING
        # None while no leg carries the tunnel.
        self.channel: Channel | None = channel
        # Seconds for which both ends keep a detached tunnel; 0 until the tunnel is open.
        self.grace_s = 0.0
        # The reason of an unclean end. The first reason counts.
        self.ended: RelayError | None = None
        # The deadline to deliver bytes received before the end.
        self.deliver_until = float("inf")
        # The time and the reason of the newest loss of a leg.
        self.detached_at = 0.0
        self._lost: RelayError | None = None

    @property
    def is_over(self) -> bool:
        """Whether the tunnel is finished or has ended."""
        return self.state.is_over

    def is_stale_locked(self, channel: Channel, message: str) -> bool:
        """Whether a message is too late to count; raises TunnelError for a message too early."""
        assert self.lock.locked()
        if channel is not self.channel or self.state.has_error:
            return True
        if self.state is EndState.OPENING:
            raise TunnelError(f"{message} before the tunnel was open", channel.channel_id)
        return False

    def open_locked(self, limit: int, grace_s: float) -> None:
        """Apply the peer's limit and the grace period from `open` or `opened`."""
        assert self.lock.locked()
        self.grace_s = grace_s
        self.stream.out.limit = limit
        self._change_locked(EndState.OPEN)

    def attach_locked(self, channel: Channel) -> None:
        """Make `channel` the present channel."""
        assert self.lock.locked()
        self.channel = channel
        self._change_locked(EndState.OPEN)

    def detach_locked(self, error: RelayError) -> bool:
        """Detach, or end if no resume can follow; return whether the end is detached."""
        assert self.lock.locked()
        if self.state is not EndState.OPEN or self.grace_s <= 0:
            self.end_locked(EndState.ENDED, error)
            return False
        self.channel = None
        self.detached_at, self._lost = time.monotonic(), error
        self._change_locked(EndState.DETACHED)
        return True

    def finish_locked(self) -> None:
        """Finish the tunnel if the eofs of both directions are acknowledged."""
        assert self.lock.locked()
        if self.stream.is_finished and self.state is EndState.OPEN:
            self._change_locked(EndState.FINISHED)

    def end_locked(self, state: EndState, error: RelayError, deliver_s: float = FLUSH_S) -> None:
        """End with `error`; earlier bytes may be delivered for another `deliver_s` seconds."""
        assert self.lock.locked()
        # Set before the state: a thread without the lock reads the state first.
        self.ended, self.deliver_until = error, time.monotonic() + deliver_s
        self.stream.out.forget()
        self._change_locked(state)

    def _change_locked(self, state: EndState) -> None:
        assert self.lock.locked()
        assert state in END_TRANSITIONS[self.state], (self.state, state)
        self.state = state
        self.changed.notify_all()

    def resume_left_locked(self) -> float | None:
        """Return the seconds left of the grace period; None if the tunnel is not detached."""
        assert self.lock.locked()
        if self.state is not EndState.DETACHED:
            return None
        return max(0.0, self.detached_at + self.grace_s - time.monotonic())

    def expire_locked(self) -> None:
        """End a detached tunnel whose grace period is over."""
        assert self.lock.locked()
        if self.resume_left_locked() == 0.0 and self._lost is not None:
            self.end_locked(EndState.EXPIRED, self._lost, 0.0)

    def wait_locked(self, is_due: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for `is_due`, at most `timeout_s`; expire a detached tunnel meanwhile."""
        assert self.lock.locked()
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not is_due() and (left_s := until - time.monotonic()) > 0:
            resume_left_s = self.resume_left_locked()
            waits = [s for s in (left_s, resume_left_s) if s is not None and s < float("inf")]
            self.changed.wait(min(waits, default=None))
            self.expire_locked()
