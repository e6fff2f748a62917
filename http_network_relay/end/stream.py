"""The stream state of one end of a tunnel (docs/protocol.md, "Streams and credit", "Resume").

No I/O, no clock, no thread. Both ends share this code, so none of it depends on the
end. Offsets are counts of bytes from 0 in each direction.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from http_network_relay.end.window import Window
from http_network_relay.leg.send_queue import append_merged
from http_network_relay.wire.constants import (
    DEFAULT_MAX_WINDOW_BYTES,
    MAX_COUNT,
    MESSAGE_BYTES,
    MIN_WINDOW_BYTES,
)
from http_network_relay.wire.controls import Ack
from http_network_relay.wire.errors import TunnelError

# With an empty receive queue, an ack is due from this many unacknowledged bytes on: the
# receiver cannot know how far the server lowered the limit.
_DRAINED_ACK_BYTES = 64 * 1024
# On a thin link the receiver's window is smaller than the first. A message is 1/16 of the window:
# about 4 of 60 ms of the link. The lower bound limits the cost of frame headers.
_THIN_MESSAGES = 16
_LEAST_MESSAGE_BYTES = 4 * 1024
# Kept pieces are merged up to this size. A piece of one byte costs 100 bytes; merging
# large pieces would copy bytes without a gain.
_MERGED_BYTES = 4 * 1024


class Position(NamedTuple):
    """The counts in `resume` and `resumed` of the stream that the sender receives."""

    received: int
    delivered: int
    limit: int


class SendStream:
    """The bytes that this end sends, and those kept for a resume. Not thread-safe.

    `sent`, `limit`, `eof_sent` and `eof_acked` concern the present channel; a resume
    resets them.
    """

    def __init__(self) -> None:
        self.taken = 0  # from the source
        self.is_ended = False  # the source
        self.sent = 0
        self.limit = 0
        self.delivered = 0
        self._message_bytes = MESSAGE_BYTES
        self.eof_sent = False
        self.eof_acked = False
        # Bytes from `_kept_from`, at most `delivered`, to `taken`; `_unsent` waits for credit.
        self._kept: deque[Any] = deque()
        self._kept_from = 0
        self._unsent: deque[Any] = deque()

    @property
    def credit(self) -> int:
        """The number of bytes that may be taken from the source now."""
        return 0 if self.is_ended or self._unsent else max(0, self.limit - self.sent)

    @property
    def waits_for_credit(self) -> bool:
        """Whether taken bytes are still unsent on this channel."""
        return bool(self._unsent)

    @property
    def kept_bytes(self) -> int:
        """The number of bytes kept for a resume."""
        return self.taken - self._kept_from

    def take(self, data: Any) -> None:
        """Take bytes from the source; next_piece() returns them as credit allows.

        More than `credit` is accepted: a resume may have lowered the credit while the
        source was read.
        """
        append_merged(self._kept, data, _MERGED_BYTES)
        self._unsent.append(data)
        self.taken += len(data)

    def end(self) -> None:
        """Record that the source has ended."""
        self.is_ended = True

    def next_piece(self) -> Any:
        """Return the bytes of the next message to send; None if no bytes or no credit."""
        size = min(self.limit - self.sent, self._message_bytes)
        if size <= 0 or not self._unsent:
            return None
        piece = self._unsent.popleft()
        if len(piece) > size:
            view = memoryview(piece)
            self._unsent.appendleft(view[size:])
            piece = view[:size]
        self.sent += len(piece)
        return piece

    def next_eof(self) -> int | None:
        """Return the count of an eof to send now; None if not yet due or already sent."""
        if not self.is_ended or self.eof_sent or self._unsent:
            return None
        self.eof_sent = True
        return self.taken

    def on_ack(self, ack: Ack) -> None:
        """Apply the peer's ack; raises TunnelError if its counts are impossible."""
        if not self.delivered <= ack.delivered <= self.sent:
            raise TunnelError(f"ack of {ack.delivered} bytes, {self.sent} were sent")
        if ack.limit < self.limit:
            raise TunnelError(f"limit fell from {self.limit} to {ack.limit}")
        if ack.eof and not (self.eof_sent and ack.delivered == self.sent):
            raise TunnelError("ack of an eof that is not due")
        self._fit_messages(ack.limit - ack.delivered)
        self.limit = ack.limit
        self.eof_acked = self.eof_acked or ack.eof
        self._free(ack.delivered)

    def _fit_messages(self, window: int) -> None:
        """Send small messages on a thin link: a keystroke would wait behind a large one.

        A slow source has a small window too, but still has credit when an ack arrives.
        """
        is_thin = window < MIN_WINDOW_BYTES and self.sent >= self.limit
        size = window // _THIN_MESSAGES if is_thin else MESSAGE_BYTES
        self._message_bytes = max(_LEAST_MESSAGE_BYTES, size)

    def check_resume(self, peer: Position) -> None:
        """Raise TunnelError if the peer's counts are impossible."""
        if not self.delivered <= peer.delivered <= peer.received <= self.taken:
            raise TunnelError(
                f"resume at {peer.delivered}, {peer.received};"
                f" {self.delivered} were acked, {self.taken} sent"
            )

    def resume(self, peer: Position) -> None:
        """Send from the peer's position on a new channel. The caller MUST check_resume() first."""
        self._free(peer.delivered)
        self.sent, self.limit = peer.received, peer.limit
        self.eof_sent = self.eof_acked = False
        self._unsent.clear()
        at = self._kept_from
        for piece in self._kept:
            skipped = max(0, peer.received - at)
            if skipped < len(piece):
                # Copy a merged piece, which is small: a bytearray cannot grow under a view.
                # Copy no other piece: a view costs no memory while the piece is kept.
                whole = bytes(piece) if isinstance(piece, bytearray) else piece
                self._unsent.append(memoryview(whole)[skipped:])
            at += len(piece)

    def forget(self) -> None:
        """Free all kept bytes: no resume can follow."""
        self._kept.clear()
        self._unsent.clear()
        self._kept_from = self.taken

    def _free(self, delivered: int) -> None:
        self.delivered = delivered
        while self._kept and self._kept_from + len(self._kept[0]) <= delivered:
            self._kept_from += len(self._kept.popleft())


class ReceiveStream:
    """The bytes that this end receives and delivers. Not thread-safe."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self._window = Window(max_window_bytes)
        self.limit = self.window
        self.received = 0
        self.delivered = 0
        self.eof_at: int | None = None
        self.eof_delivered = False
        # On the present channel only, as are the two below.
        self.eof_acked = False
        self._eof_came = False
        self._acked = 0

    @property
    def window(self) -> int:
        """The most bytes that the limit may be beyond `delivered`."""
        return self._window.size

    def on_data(self, size: int, now: float) -> None:
        """Record `size` received bytes; raises TunnelError for an overrun."""
        if self.eof_at is not None:
            raise TunnelError("data after eof")
        if self.received + size > self.limit:
            raise TunnelError(f"window overrun: {self.received + size} over {self.limit}")
        self.received += size
        self._window.on_data(size, self.received, now)

    def on_eof(self, count: int) -> None:
        """Record the peer's eof, once a channel; raises TunnelError if the counts differ."""
        if count != self.received:
            raise TunnelError(f"eof after {count} bytes, {self.received} came")
        if self._eof_came:
            raise TunnelError("a second eof")
        self._eof_came = True
        self.eof_at = count

    def on_delivered(self, size: int, now: float, *, drained: bool) -> Ack | None:
        """Record that `size` bytes were delivered; return the ack, if one is due.

        The caller MUST have written the bytes: an ack on arrival would defeat the
        window. `drained`: the receive queue is empty.
        """
        self.delivered += size
        unacked = self.delivered - self._acked
        # A quarter of the granted window: the peer does not know of growth since the last ack.
        granted = min(self.window, self.limit - self._acked)
        if unacked * 4 < granted and not (drained and unacked >= _DRAINED_ACK_BYTES):
            return None
        return self._ack(now)

    def on_eof_delivered(self, now: float) -> Ack | None:
        """Record that the eof was delivered; return its ack, which is due at once.

        None if the peer has not yet sent the eof on this channel; the ack follows then. The
        caller MUST set `eof_acked` once the ack is queued.
        """
        self.eof_delivered = True
        return self._ack(now) if self._eof_came else None

    @property
    def owes_ack(self) -> bool:
        """Whether an ack is due as soon as no more data is ready."""
        return self.delivered - self._acked >= _DRAINED_ACK_BYTES

    def _ack(self, now: float) -> Ack:
        before = self.limit
        self.limit = min(MAX_COUNT, max(before, self.delivered + self.window))
        self._acked = self.delivered
        if self.limit > before:
            self._window.on_limit(before, self.received - self.delivered, now)
        return Ack(self.delivered, self.limit, self.eof_delivered and self._eof_came)

    def resume(self) -> Position:
        """Restart the counts for another channel; return the position for the peer.

        The caller MUST ignore all later messages on earlier channels.
        """
        self._window.begin()
        self.limit = max(self.received, self.delivered + self.window)
        self._acked = self.delivered
        self._eof_came = self.eof_acked = False
        return Position(self.received, self.delivered, self.limit)


class Stream:
    """Both directions of a tunnel at one end."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self.out = SendStream()
        self.into = ReceiveStream(max_window_bytes)

    @property
    def is_finished(self) -> bool:
        """Whether both eofs were delivered and acknowledged on one channel."""
        return self.out.eof_acked and self.into.eof_acked
