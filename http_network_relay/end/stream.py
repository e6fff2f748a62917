"""The stream state of one end of a tunnel (docs/protocol.md, "Streams and credit", "Resume").

No I/O, no clock, no thread. Both ends use it unchanged, so it does not know which
end it is. Offsets are counts of bytes from 0 in each direction.
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

# An ack is due at the latest when the receive queue is empty and this much was not
# acked: the receiver cannot know how far the server lowered its limit.
_DRAINED_ACK_BYTES = 64 * 1024
# On a thin link, where the receiver's window is smaller than the first one, a message is such
# a part of it: some 4 ms of the link, where the window is some 60. Each costs a frame's head.
_THIN_MESSAGES = 16
_LEAST_MESSAGE_BYTES = 4 * 1024
# Kept pieces are merged up to here. Single bytes would else cost a hundred each; merging
# large ones would copy them for nothing.
_MERGED_BYTES = 4 * 1024


class Position(NamedTuple):
    """What `resume` and `resumed` say of the stream that this end receives."""

    received: int
    delivered: int
    limit: int


class SendStream:
    """The bytes that this end sends, and those that it keeps. Not thread-safe.

    `sent`, `limit` and what is said of the eof concern the present channel; a resume
    begins them anew.
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
        # From `_kept_from`, at most `delivered`, to `taken`; and of these what waits for credit.
        self._kept: deque[Any] = deque()
        self._kept_from = 0
        self._unsent: deque[Any] = deque()

    @property
    def credit(self) -> int:
        """How many bytes may be taken from the source now."""
        return 0 if self.is_ended or self._unsent else max(0, self.limit - self.sent)

    @property
    def waits_for_credit(self) -> bool:
        """Whether bytes that were taken have not gone out on this channel."""
        return bool(self._unsent)

    @property
    def kept_bytes(self) -> int:
        """How many bytes are kept."""
        return self.taken - self._kept_from

    def take(self, data: Any) -> None:
        """Take bytes from the source; next_piece() gives them out as credit allows.

        More than `credit` is kept as well: the credit may have fallen, by a resume,
        while the source was read.
        """
        append_merged(self._kept, data, _MERGED_BYTES)
        self._unsent.append(data)
        self.taken += len(data)

    def end(self) -> None:
        """Record that the source has ended."""
        self.is_ended = True

    def next_piece(self) -> Any:
        """Return bytes that go out now, as one message; None: nothing, or no credit."""
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
        """Return the count of an eof that goes out now; None: not yet, or sent already."""
        if not self.is_ended or self.eof_sent or self._unsent:
            return None
        self.eof_sent = True
        return self.taken

    def on_ack(self, ack: Ack) -> None:
        """Take the peer's ack in; raises TunnelError if it cannot be true."""
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
        """Cut messages small on a thin link: a keystroke would wait for the rest of one.

        The window of a slow source is small too, but that has credit left when an ack comes.
        """
        is_thin = window < MIN_WINDOW_BYTES and self.sent >= self.limit
        size = window // _THIN_MESSAGES if is_thin else MESSAGE_BYTES
        self._message_bytes = max(_LEAST_MESSAGE_BYTES, size)

    def check_resume(self, peer: Position) -> None:
        """Raise TunnelError if what the peer says it has cannot be true."""
        if not self.delivered <= peer.delivered <= peer.received <= self.taken:
            raise TunnelError(
                f"resume at {peer.delivered}, {peer.received};"
                f" {self.delivered} were acked, {self.taken} sent"
            )

    def resume(self, peer: Position) -> None:
        """Go on, on a new channel, from where the peer stands; check_resume() first."""
        self._free(peer.delivered)
        self.sent, self.limit = peer.received, peer.limit
        self.eof_sent = self.eof_acked = False
        self._unsent.clear()
        at = self._kept_from
        for piece in self._kept:
            skipped = max(0, peer.received - at)
            if skipped < len(piece):
                # A merged piece, which is small, may still grow: not while a view of it exists.
                # All others are not copied: they may wait for credit as long as they are kept.
                whole = bytes(piece) if isinstance(piece, bytearray) else piece
                self._unsent.append(memoryview(whole)[skipped:])
            at += len(piece)

    def forget(self) -> None:
        """Free all that is kept: nobody will ask for it."""
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
        # On the present channel.
        self.eof_acked = False
        self._eof_came = False
        self._acked = 0

    @property
    def window(self) -> int:
        """How far the limit may be beyond `delivered`."""
        return self._window.size

    def on_data(self, size: int, now: float) -> None:
        """Record `size` bytes that came in; raises TunnelError for an overrun."""
        if self.eof_at is not None:
            raise TunnelError("data after eof")
        if self.received + size > self.limit:
            raise TunnelError(f"window overrun: {self.received + size} over {self.limit}")
        self.received += size
        self._window.on_data(size, self.received, now)

    def on_eof(self, count: int) -> None:
        """Record the peer's eof, once a channel; raises TunnelError if its count is not ours."""
        if count != self.received:
            raise TunnelError(f"eof after {count} bytes, {self.received} came")
        if self._eof_came:
            raise TunnelError("a second eof")
        self._eof_came = True
        self.eof_at = count

    def on_delivered(self, size: int, now: float, *, drained: bool) -> Ack | None:
        """Record that `size` bytes were handed on; return the ack, if one is due.

        Call it after the bytes were written on, not when they arrived: an ack for
        unread bytes would defeat the window. `drained`: nothing more is queued.
        """
        self.delivered += size
        unacked = self.delivered - self._acked
        # Of the window that was granted: it may have grown since, and the peer cannot know.
        granted = min(self.window, self.limit - self._acked)
        if unacked * 4 < granted and not (drained and unacked >= _DRAINED_ACK_BYTES):
            return None
        return self._ack(now)

    def on_eof_delivered(self, now: float) -> Ack | None:
        """Record that the eof was handed on; return its ack, which is due at once.

        None if the eof has not come on this channel: it does, and is acked then. Set
        `eof_acked` when the ack is on its way.
        """
        self.eof_delivered = True
        return self._ack(now) if self._eof_came else None

    @property
    def owes_ack(self) -> bool:
        """Whether an ack is due as soon as nothing more comes."""
        return self.delivered - self._acked >= _DRAINED_ACK_BYTES

    def _ack(self, now: float) -> Ack:
        before = self.limit
        self.limit = min(MAX_COUNT, max(before, self.delivered + self.window))
        self._acked = self.delivered
        if self.limit > before:
            self._window.on_limit(before, self.received - self.delivered, now)
        return Ack(self.delivered, self.limit, self.eof_delivered and self._eof_came)

    def resume(self) -> Position:
        """Begin anew on another channel; return what the peer must know.

        All earlier channels must be deaf by now.
        """
        self._window.begin()
        self.limit = max(self.received, self.delivered + self.window)
        self._acked = self.delivered
        self._eof_came = self.eof_acked = False
        return Position(self.received, self.delivered, self.limit)


class Stream:
    """One direction-pair of a tunnel at one end."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self.out = SendStream()
        self.into = ReceiveStream(max_window_bytes)

    @property
    def is_finished(self) -> bool:
        """Whether both eofs were handed on and both acks have passed, on one channel."""
        return self.out.eof_acked and self.into.eof_acked
