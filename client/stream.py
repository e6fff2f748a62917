"""The stream state of one end of a tunnel (docs/protocol.md, "Streams and credit").

No I/O, no clock, no thread. Both ends use it unchanged, so it does not know which
end it is. Offsets are counts of bytes from 0 in each direction.
"""

from __future__ import annotations

from typing import NamedTuple

from client.wire import DEFAULT_MAX_WINDOW_BYTES, MAX_COUNT, MIN_WINDOW_BYTES, TunnelError

# An ack is due at the latest when the receive queue is empty and this much was not
# acked: the receiver cannot know how far the server lowered its limit.
_DRAINED_ACK_BYTES = 64 * 1024
# The ack round trip may grow this much over its minimum before the window shrinks:
# more means that our own bytes stand in a queue somewhere.
_QUEUE_S = 0.020


class Ack(NamedTuple):
    """What an `ack` says: bytes handed on, the sender's new limit, eof handed on."""

    delivered: int
    limit: int
    eof: bool


class Sender:
    """The bytes that this end sends. Not thread-safe."""

    def __init__(self) -> None:
        self.sent = 0
        self.limit = 0
        self.delivered = 0
        self.eof_sent = False
        self.eof_acked = False

    @property
    def credit(self) -> int:
        """How many bytes may be sent now."""
        return 0 if self.eof_sent else self.limit - self.sent

    def send(self, size: int) -> None:
        """Record that `size` bytes, at most `credit`, go out."""
        if size > self.credit:
            raise ValueError(f"{size} bytes to send, credit for {self.credit}")
        self.sent += size

    def end(self) -> int:
        """Record that eof goes out; return its count."""
        self.eof_sent = True
        return self.sent

    def on_ack(self, ack: Ack) -> None:
        """Take the peer's ack in; raises TunnelError if it cannot be true."""
        if not self.delivered <= ack.delivered <= self.sent:
            raise TunnelError(f"ack of {ack.delivered} bytes, {self.sent} were sent")
        if ack.limit < self.limit:
            raise TunnelError(f"limit fell from {self.limit} to {ack.limit}")
        if ack.eof and not (self.eof_sent and ack.delivered == self.sent):
            raise TunnelError("ack of an eof that is not due")
        self.delivered, self.limit = ack.delivered, ack.limit
        self.eof_acked = self.eof_acked or ack.eof


class Receiver:
    """The bytes that this end takes in and hands on. Not thread-safe.

    The window grows while the peer uses it up within an ack's round trip, and shrinks
    when that round trip grows: then the bytes stand in a queue on the way.
    """

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self._max_window = max_window_bytes
        self.window = MIN_WINDOW_BYTES
        self.limit = self.window
        self.received = 0
        self.delivered = 0
        self.eof_at: int | None = None
        self.eof_delivered = False
        self.eof_acked = False
        self._acked = 0
        # The limit before the ack being timed, its time, and `received` then.
        self._probe: tuple[int, float, int] | None = None
        self._shortest_s = float("inf")

    def on_data(self, size: int, now: float) -> None:
        """Record `size` bytes that came in; raises TunnelError for an overrun."""
        if self.eof_at is not None:
            raise TunnelError("data after eof")
        if self.received + size > self.limit:
            raise TunnelError(f"window overrun: {self.received + size} over {self.limit}")
        self.received += size
        if self._probe is not None and self.received > self._probe[0]:
            _, since, received = self._probe
            self._probe = None
            self._resize(now - since, self.received - received)

    def _resize(self, round_trip_s: float, size: int) -> None:
        self._shortest_s = min(self._shortest_s, round_trip_s)
        if round_trip_s > self._shortest_s + _QUEUE_S:
            # By a quarter: an ack is due after a quarter, so the limit still never falls.
            self.window = max(MIN_WINDOW_BYTES, self.window - self.window // 4)
        elif size * 2 >= self.window:
            self.window = min(self._max_window, self.window * 2)

    def on_eof(self, count: int) -> None:
        """Record the peer's eof; raises TunnelError if its count is not ours."""
        if count != self.received:
            raise TunnelError(f"eof after {count} bytes, {self.received} came")
        if self.eof_at is not None:
            raise TunnelError("a second eof")
        self.eof_at = count

    def on_delivered(self, size: int, now: float, *, drained: bool) -> Ack | None:
        """Record that `size` bytes were handed on; return the ack, if one is due.

        Call it after the bytes were written on, not when they arrived: an ack for
        unread bytes would defeat the window. `drained`: nothing more is queued.
        """
        self.delivered += size
        unacked = self.delivered - self._acked
        if unacked * 4 < self.window and not (drained and unacked >= _DRAINED_ACK_BYTES):
            return None
        return self._ack(now)

    def on_eof_delivered(self, now: float) -> Ack:
        """Record that the eof was handed on; its ack is due at once.

        Set `eof_acked` when that ack is on its way.
        """
        self.eof_delivered = True
        return self._ack(now)

    def _ack(self, now: float) -> Ack:
        before = self.limit
        self.limit = min(MAX_COUNT, max(before, self.delivered + self.window))
        self._acked = self.delivered
        if self._probe is None and self.limit > before:
            self._probe = (before, now, self.received)
        return Ack(self.delivered, self.limit, self.eof_delivered)


class Stream:
    """One direction-pair of a tunnel at one end."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self.out = Sender()
        self.into = Receiver(max_window_bytes)

    @property
    def is_finished(self) -> bool:
        """Whether both eofs were handed on and both acks have passed."""
        return self.out.eof_acked and self.into.eof_acked
