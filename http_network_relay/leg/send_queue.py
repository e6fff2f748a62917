"""What waits to be written on one leg, in the order of docs/protocol.md, "Order".

Any thread puts, and never waits for the network; who takes and sends is the Outlet's matter.
The fast lane is bounded by its slots, the data by the windows of the tunnels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from http_network_relay.wire.constants import FLUSH_S, MAX_DATA_BYTES, OP_BINARY


class Frame(NamedTuple):
    """One WebSocket message: opcode, and payload in two parts (channel, bytes)."""

    opcode: int
    head: bytes
    payload: Any  # bytes, bytearray or memoryview


def append_merged(queue: deque[Any], data: Any, max_bytes: int = MAX_DATA_BYTES) -> None:
    """Append bytes, merged into a small last piece, of `max_bytes` at most.

    Without it a peer that sends single bytes would make us keep a queue entry, some
    hundred bytes, for each byte of its window.
    """
    if queue and len(queue[-1]) + len(data) <= max_bytes:
        last = queue[-1]
        if not isinstance(last, bytearray):
            last = bytearray(last)
            queue[-1] = last
        last += data
    else:
        queue.append(data)


class _Channel:
    """Data and the end of one channel that wait for their turn."""

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.data: deque[Any] = deque()
        self.last: list[Frame] = []  # eof, then an end that takes its turn
        self.overtakes_at: float | None = None


class SendQueue:
    """A fair outbox: a fast lane of fixed slots, then channels by turns.

    What is put calls the leg's writer, but for data, acks and the leg's own messages: who has
    put them calls push() when it holds no lock.
    """

    def __init__(self) -> None:
        # Both are the Outlet's as soon as the leg is up: it sends what waits, and data at once.
        self.push: Callable[[], None] = self.call_writer
        self.put_data_now: Callable[[int, bytes, Any], None] = self.put_data
        # Where there is no writer yet: told of its first call, and again after hear_call().
        # Any thread, with locks held: it never waits.
        self.on_call: Callable[[], None] | None = None
        # Guards everything below; woken when the writer is called.
        self._ready = threading.Condition()
        self._is_called = False
        self._fast: dict[Hashable, Frame] = {}
        self._cancellable: dict[int, Hashable] = {}
        self._channels: dict[int, _Channel] = {}
        self._turns: deque[int] = deque()
        self._close: Frame | None = None
        self._is_over = False

    # Fast lane.

    def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
        """Queue a channel's first message; `cancellable` if an end may take it back."""
        with self._ready:
            key = ("first", channel)
            if cancellable:
                self._cancellable[channel] = key
            self._put_fast_locked(key, frame)

    def cancel_first(self, channel: int) -> None:
        """Take an unsent first message back; nothing if it has gone out."""
        with self._ready:
            self._fast.pop(self._cancellable.pop(channel, None), None)

    def put_ack(self, channel: int, frame: Frame) -> None:
        """Queue an ack; it replaces one of the same channel that is still here."""
        with self._ready:
            self._put_fast_locked(("ack", channel), frame, calls=False)

    def put_leg(self, kind: str, frame: Frame) -> None:
        """Queue a message of the leg itself (pong, going_away): one slot a kind."""
        with self._ready:
            self._put_fast_locked(kind, frame, calls=False)

    def try_put_leg(self, kind: str, frame: Frame) -> bool:
        """As put_leg, but never wait, not even for the lock; False: try later."""
        if not self._ready.acquire(blocking=False):
            return False
        try:
            self._put_fast_locked(kind, frame)
        finally:
            self._ready.release()
        return True

    # Data, by turns.

    def put_data(self, channel: int, head: bytes, data: Any) -> None:
        """Queue stream bytes; the caller has made sure that the window allows them."""
        with self._ready:
            entry = self._channel_locked(channel, head)
            if entry is not None and not entry.last:
                append_merged(entry.data, data)

    def put_eof(self, channel: int, frame: Frame) -> None:
        """Queue the eof behind the channel's data."""
        with self._ready:
            entry = self._channel_locked(channel, b"")
            if entry is not None and not entry.last:
                entry.last.append(frame)
                self._call_locked()

    def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
        """Queue a channel's reset or detached; whatever still waits of it is deleted.

        `in_turn` puts it behind the channel's data instead; after a second it overtakes.
        """
        with self._ready:
            if self._close is not None or self._is_over:
                return  # What was queued before the close is still flushed.
            if self._fast.pop(self._cancellable.pop(channel, None), None) is not None:
                self._drop_locked(channel)
                return
            if in_turn:
                entry = self._channel_locked(channel, b"")
                if entry is not None and entry.overtakes_at is None:
                    entry.last.append(frame)
                    entry.overtakes_at = time.monotonic() + FLUSH_S
            else:
                self._drop_locked(channel)
                self._put_fast_locked(("end", channel), frame)
            self._call_locked()

    def drop(self, channel: int) -> None:
        """Delete what waits of a channel that has ended: nobody would act on it."""
        with self._ready:
            self._cancellable.pop(channel, None)
            self._fast.pop(("first", channel), None)
            self._drop_locked(channel)

    # The leg's end.

    def close(self, frame: Frame, *, flush: bool = True) -> None:
        """Send `frame` (a close) last: behind all that is queued, or at once.

        What is put later is dropped. The first close wins.
        """
        with self._ready:
            if self._close is None:
                self._close = frame
                if not flush:
                    self._clear_locked()
            self._call_locked()

    def stop(self) -> None:
        """End the writer now; nothing more is taken."""
        with self._ready:
            self._is_over = True
            self._clear_locked()
            self._ready.notify_all()

    # Who sends.

    @property
    def has_frames(self) -> bool:
        """Whether something waits, but for the close. Needs no lock."""
        return bool(self._fast or self._turns)

    @property
    def is_over(self) -> bool:
        """Whether the close was taken, or stop() called. Needs no lock."""
        return self._is_over

    @property
    def is_clear(self) -> bool:
        """Whether nothing waits and the leg goes on. Needs no lock."""
        return not (self._fast or self._turns or self._close is not None or self._is_over)

    def take(self, *, with_close: bool = False) -> Frame | None:
        """Return the next frame, None: nothing waits. The close only for the writer."""
        with self._ready:
            if self._is_over:
                return None
            frame = self._next_locked()
            if frame is None and with_close and self._close is not None:
                self._is_over = True
                return self._close
            return frame

    def call_writer(self) -> None:
        """Let the writer send what waits."""
        with self._ready:
            self._call_locked()

    def hear_call(self) -> None:
        """In place of wait_call(): who serves the call looks at the outbox from here on."""
        with self._ready:
            self._is_called = False

    def wait_call(self) -> bool:
        """Wait until the writer is called; False when the close was taken, or stop() called."""
        with self._ready:
            while not self._is_called and not self._is_over:
                self._ready.wait()
            self._is_called = False
            return not self._is_over

    def _next_locked(self) -> Frame | None:
        if self._fast:
            key = next(iter(self._fast))
            frame = self._fast.pop(key)
            if isinstance(key, tuple) and key[0] == "first":
                self._cancellable.pop(key[1], None)
            return frame
        if not self._turns:
            return None
        channel = self._turns.popleft()
        entry = self._channels[channel]
        if entry.overtakes_at is not None and time.monotonic() >= entry.overtakes_at:
            del self._channels[channel]
            return entry.last[-1]
        if entry.data:
            data = entry.data.popleft()
            frame = Frame(OP_BINARY, entry.head, data)
        else:
            frame = entry.last.pop(0)
        if entry.data or entry.last:
            self._turns.append(channel)
        else:
            del self._channels[channel]
        return frame

    def _put_fast_locked(self, key: Hashable, frame: Frame, *, calls: bool = True) -> None:
        if self._close is None and not self._is_over:
            self._fast[key] = frame
            if calls:
                self._call_locked()

    def _call_locked(self) -> None:
        if self._is_called:
            return
        self._is_called = True
        self._ready.notify()
        if self.on_call is not None:
            self.on_call()

    def _channel_locked(self, channel: int, head: bytes) -> _Channel | None:
        if self._close is not None or self._is_over:
            return None
        entry = self._channels.get(channel)
        if entry is None:
            entry = self._channels[channel] = _Channel(head)
            self._turns.append(channel)
        elif not entry.head:
            entry.head = head
        return entry

    def _drop_locked(self, channel: int) -> None:
        self._fast.pop(("ack", channel), None)
        if self._channels.pop(channel, None) is not None:
            self._turns.remove(channel)

    def _clear_locked(self) -> None:
        self._fast.clear()
        self._cancellable.clear()
        self._channels.clear()
        self._turns.clear()
