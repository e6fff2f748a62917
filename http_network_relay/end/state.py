"""Where one end of a tunnel stands: its states, and what both of its directions share."""

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
    # The leg is lost; a resume may come.
    DETACHED = "detached"
    # Both directions have ended cleanly, and both ends know.
    FINISHED = "finished"
    # This end has ended the tunnel: a resume is answered with the reason.
    RESET = "reset"
    # The peer, the loss of the leg or this program has ended the tunnel; the peer is not told.
    ENDED = "ended"
    # Nobody has resumed the tunnel in time.
    EXPIRED = "expired"

    def __init__(self, word: str) -> None:
        self.has_error = word in ("reset", "ended", "expired")
        self.is_over = self.has_error or word == "finished"


# Every other change of state is a bug.
END_TRANSITIONS: dict[EndState, tuple[EndState, ...]] = {
    EndState.OPENING: (EndState.OPEN, EndState.RESET, EndState.ENDED),
    # OPEN again: a newer attempt to resume replaces the channel.
    EndState.OPEN: (
        EndState.OPEN,
        EndState.DETACHED,
        EndState.FINISHED,
        EndState.RESET,
        EndState.ENDED,
    ),
    EndState.DETACHED: (EndState.OPEN, EndState.RESET, EndState.ENDED, EndState.EXPIRED),
    # The last ack may have been lost with the user's leg.
    EndState.FINISHED: (EndState.OPEN,),
    EndState.RESET: (),
    EndState.ENDED: (),
    EndState.EXPIRED: (),
}


class EndCore:
    """The lock, the state, the streams and the present channel of one end.

    A single read of a field needs no lock. Only the methods here change a field.
    """

    def __init__(
        self, channel: Channel, max_window_bytes: int, on_change: Callable[[], None]
    ) -> None:
        """`on_change`: called, without the lock, after credit, the leg's loss or the end."""
        self.on_change = on_change
        # Guards the whole end. Messages are queued under it, so that they leave in order;
        # push() comes after the release.
        self.lock = threading.Lock()
        # Woken by whatever a thread of the tunnel waits for.
        self.changed = threading.Condition(self.lock)
        self.stream = Stream(max_window_bytes)
        self.state = EndState.OPENING
        # None without a leg.
        self.channel: Channel | None = channel
        # For how long both ends keep the tunnel without a leg; 0 until the tunnel is open.
        self.grace_s = 0.0
        # Why the tunnel ended before it was finished. The first reason counts.
        self.ended: RelayError | None = None
        # Until then bytes that came before the end are still delivered.
        self.deliver_until = float("inf")
        # Of the newest loss of a leg.
        self.detached_at = 0.0
        self._lost: RelayError | None = None

    @property
    def is_over(self) -> bool:
        """Whether the tunnel is finished or has ended."""
        return self.state.is_over

    def is_stale_locked(self, channel: Channel, message: str) -> bool:
        """Whether a message comes too late to count; raises TunnelError if it comes too early."""
        assert self.lock.locked()
        if channel is not self.channel or self.state.has_error:
            return True
        if self.state is EndState.OPENING:
            raise TunnelError(f"{message} before the tunnel was open", channel.channel_id)
        return False

    def open_locked(self, limit: int, grace_s: float) -> None:
        """Take what `open` or `opened` says of the peer."""
        assert self.lock.locked()
        self.grace_s = grace_s
        self.stream.out.limit = limit
        self._change_locked(EndState.OPEN)

    def attach_locked(self, channel: Channel) -> None:
        """Go on, on `channel`."""
        assert self.lock.locked()
        self.channel = channel
        self._change_locked(EndState.OPEN)

    def detach_locked(self, error: RelayError) -> bool:
        """Wait for a resume, or end if none can come; return whether the end waits."""
        assert self.lock.locked()
        if self.state is not EndState.OPEN or self.grace_s <= 0:
            self.end_locked(EndState.ENDED, error)
            return False
        self.channel = None
        self.detached_at, self._lost = time.monotonic(), error
        self._change_locked(EndState.DETACHED)
        return True

    def finish_locked(self) -> None:
        """Note that an ack of an eof has come or gone; the tunnel is finished after both."""
        assert self.lock.locked()
        if self.stream.is_finished and self.state is EndState.OPEN:
            self._change_locked(EndState.FINISHED)

    def end_locked(self, state: EndState, error: RelayError, deliver_s: float = FLUSH_S) -> None:
        """End with `error`; what came before is delivered for `deliver_s` more."""
        assert self.lock.locked()
        # Before the state: a thread without the lock reads the state first.
        self.ended, self.deliver_until = error, time.monotonic() + deliver_s
        self.stream.out.forget()
        self._change_locked(state)

    def _change_locked(self, state: EndState) -> None:
        assert self.lock.locked()
        assert state in END_TRANSITIONS[self.state], (self.state, state)
        self.state = state
        self.changed.notify_all()

    def resume_left_locked(self) -> float | None:
        """Return the seconds that a detached tunnel has left; None if it is not detached."""
        assert self.lock.locked()
        if self.state is not EndState.DETACHED:
            return None
        return max(0.0, self.detached_at + self.grace_s - time.monotonic())

    def expire_locked(self) -> None:
        """End a tunnel that nobody has resumed in time."""
        assert self.lock.locked()
        if self.resume_left_locked() == 0.0 and self._lost is not None:
            self.end_locked(EndState.EXPIRED, self._lost, 0.0)

    def wait_locked(self, is_due: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for `is_due`, at most `timeout_s`; a detached tunnel may expire meanwhile."""
        assert self.lock.locked()
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not is_due() and (left_s := until - time.monotonic()) > 0:
            resume_left_s = self.resume_left_locked()
            waits = [s for s in (left_s, resume_left_s) if s is not None and s < float("inf")]
            self.changed.wait(min(waits, default=None))
            self.expire_locked()
