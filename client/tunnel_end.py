"""One end of a tunnel, between its leg and its two threads.

The leg's reader calls the on_... methods, which never wait. A consumer thread takes
chunks and hands them on; a producer thread waits for credit and sends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from client.errors import RelayError
from client.outbox import Frame, Outbox, append_merged
from client.stream import Ack, Stream
from client.wire import (
    FLUSH_S,
    MAX_DATA_BYTES,
    OP_TEXT,
    TunnelError,
    encode_channel,
    encode_control,
)

# These ends take their turn behind the data (docs/protocol.md, "Order").
_IN_TURN = ("user_gone", "target_reset")


class TunnelEnd:
    """The thread-safe state of one end; `channel` 0 is a user leg's only tunnel."""

    def __init__(
        self,
        outbox: Outbox,
        channel: int,
        max_window_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._outbox = outbox
        self._channel = channel
        self._head = encode_channel(channel) if channel else b""
        # Called, without the lock, when credit came or the end did.
        self._on_change = on_change
        # Guards all below; woken by whatever a thread of the tunnel waits for.
        self._changed = threading.Condition()
        self._stream = Stream(max_window_bytes)
        self._inbound: deque[Any] = deque()
        self._is_open = False
        self._ended: RelayError | None = None
        self._deliver_until = float("inf")
        self._consumer_failed = False

    # What is known. Each is one read; none needs the lock.

    @property
    def ended(self) -> RelayError | None:
        """Why the tunnel ended before it was finished, if it did. The first reason."""
        return self._ended

    @property
    def is_finished(self) -> bool:
        """Whether both directions ended cleanly and both ends know."""
        return self._stream.is_finished

    @property
    def is_over(self) -> bool:
        """Finished or ended."""
        return self._ended is not None or self._stream.is_finished

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes sent and bytes handed on, for the log."""
        return self._stream.out.sent, self._stream.into.delivered

    @property
    def first_limit(self) -> int:
        """What `open` or `opened` says: the bytes that the peer may send at first."""
        return self._stream.into.limit

    @property
    def has_both_eofs(self) -> bool:
        """Whether our eof was sent and the peer's handed on; acks may be missing."""
        return self._stream.out.eof_sent and self._stream.into.eof_delivered

    def must_stop(self) -> bool:
        """Whether the time for handing on what came before the end has passed."""
        return self._ended is not None and time.monotonic() >= self._deliver_until

    def deliver_left_s(self) -> float:
        """Return the seconds that are left of that time; only after the end."""
        return max(0.0, self._deliver_until - time.monotonic())

    # The leg's reader. Raise TunnelError for what breaks the protocol.

    def on_open(self, limit: int) -> bool:
        """Take the peer's first limit; False if the end came first."""
        with self._changed:
            if self._ended is not None:
                return False
            self._is_open = True
            self._stream.out.limit = limit
            return True

    def on_data(self, data: Any) -> None:
        """Queue stream bytes for the consumer."""
        with self._changed:
            if self._ended is not None:
                return
            self._require_open_locked("data")
            self._stream.into.on_data(len(data), time.monotonic())
            append_merged(self._inbound, data)
            self._changed.notify_all()

    def on_eof(self, count: int) -> None:
        """Note that no byte follows."""
        with self._changed:
            if self._ended is not None:
                return
            self._require_open_locked("eof")
            self._stream.into.on_eof(count)
            self._changed.notify_all()

    def on_ack(self, ack: Ack) -> None:
        """Take an ack in."""
        with self._changed:
            if self._ended is not None:
                return
            self._require_open_locked("ack")
            self._stream.out.on_ack(ack)
            self._changed.notify_all()
        self._on_change()

    def on_end(self, error: RelayError, *, deliver_s: float = FLUSH_S) -> None:
        """End the tunnel without a word to the peer: it, or the leg, ended it.

        What came before is still handed on if the consumer takes it in `deliver_s`.
        """
        with self._changed:
            if self._ended is not None or self._stream.is_finished:
                return
            self._ended = error
            self._deliver_until = time.monotonic() + deliver_s
            self._changed.notify_all()
        self._on_change()

    def _require_open_locked(self, what: str) -> None:
        if not self._is_open:
            raise TunnelError(f"{what} before the tunnel was open", self._channel)

    # The consumer's thread.

    def next_chunk(self) -> Any:
        """Wait for bytes to hand on; b"" is the eof, None the end of the tunnel."""
        with self._changed:
            self._changed.wait_for(self._has_news_locked)
            if self.must_stop():
                return None
            if self._inbound:
                return self._inbound.popleft()
            return b"" if self._eof_is_due_locked() else None

    def _has_news_locked(self) -> bool:
        return bool(self._inbound) or self._ended is not None or self._eof_is_due_locked()

    def _eof_is_due_locked(self) -> bool:
        into = self._stream.into
        return into.eof_at is not None and not into.eof_delivered and not self._inbound

    def delivered(self, size: int) -> None:
        """Say that `size` bytes of a chunk were handed on; sends the ack that is due."""
        with self._changed:
            drained = not self._inbound
            ack = self._stream.into.on_delivered(size, time.monotonic(), drained=drained)
        self._put_ack(ack)

    def delivered_eof(self) -> None:
        """Say that the eof was handed on; its ack goes at once."""
        with self._changed:
            ack = self._stream.into.on_eof_delivered(time.monotonic())
        self._put_ack(ack)
        # Only now: who sees the tunnel finished may close the leg behind this ack.
        with self._changed:
            self._stream.into.eof_acked = True
            self._changed.notify_all()
        self._on_change()

    def _put_ack(self, ack: Ack | None) -> None:
        if ack is not None and self._ended is None:
            text = encode_control("ack", self._channel, **ack._asdict())
            self._outbox.put_ack(self._channel, Frame(OP_TEXT, b"", text))

    def fail_consumer(self, error: RelayError) -> None:
        """Say that nothing can be handed on any more (the target, not the user).

        The peer learns of it when what the target still had to say was sent.
        """
        with self._changed:
            self._consumer_failed = True
            is_last = self._stream.out.eof_sent
        if is_last:
            self.reset(error)

    # The producer's thread.

    def credit(self) -> int:
        """Return how many bytes one message may have now; 0: none, or the tunnel is over."""
        if self._ended is not None:
            return 0
        return min(self._stream.out.credit, MAX_DATA_BYTES)

    def wait_credit(self) -> int:
        """Wait until a message may be sent; return its size, 0 when the tunnel is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self._stream.out.credit > 0)
            return self.credit()

    def send(self, data: Any) -> None:
        """Send 1 to credit() bytes."""
        with self._changed:
            if self._ended is not None:
                return
            self._stream.out.send(len(data))
        self._outbox.put_data(self._channel, self._head, data)

    def send_eof(self) -> bool:
        """End our direction; False if the consumer failed before, so that a reset is due."""
        with self._changed:
            if self._ended is not None:
                return True
            if self._consumer_failed:
                return False
            count = self._stream.out.end()
        text = encode_control("eof", self._channel, count=count)
        self._outbox.put_eof(self._channel, Frame(OP_TEXT, b"", text))
        return True

    # Any thread.

    def reset(self, error: RelayError, *, deliver_s: float = FLUSH_S) -> None:
        """End the tunnel with an error and tell the peer; nothing if it is over already."""
        with self._changed:
            if self._ended is not None or self._stream.is_finished:
                return
            self._ended = error
            self._deliver_until = time.monotonic() + deliver_s
            self._changed.notify_all()
        text = encode_control("reset", self._channel, code=error.code, message=str(error))
        in_turn = error.code in _IN_TURN
        self._outbox.put_end(self._channel, Frame(OP_TEXT, b"", text), in_turn=in_turn)
        self._on_change()

    def wait_over(self, timeout_s: float | None = None) -> None:
        """Wait until the tunnel is finished or ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over, timeout_s)
