"""The frames that wait on one leg: FrameSender's private part. No I/O, calls nobody.

The fast lane is bounded by its slots, the data by the windows of the tunnels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable
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
    """A fast lane of fixed slots, then channels by turns, then the close. Any thread.

    What each method does is said where others call it, in FrameSender.
    """

    def __init__(self) -> None:
        # Guards everything below. A leaf: nothing is called under it.
        self._lock = threading.Lock()
        self._fast: dict[Hashable, Frame] = {}
        self._cancellable: dict[int, Hashable] = {}
        self._channels: dict[int, _Channel] = {}
        self._turns: deque[int] = deque()
        self._close: Frame | None = None
        self._is_over = False

    # Fast lane.

    def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
        with self._lock:
            key = ("first", channel)
            if cancellable:
                self._cancellable[channel] = key
            self._put_fast_locked(key, frame)

    def cancel_first(self, channel: int) -> None:
        with self._lock:
            self._fast.pop(self._cancellable.pop(channel, None), None)

    def put_ack(self, channel: int, frame: Frame) -> None:
        with self._lock:
            self._put_fast_locked(("ack", channel), frame)

    def put_leg(self, kind: str, frame: Frame) -> None:
        with self._lock:
            self._put_fast_locked(kind, frame)

    def try_put_leg(self, kind: str, frame: Frame) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._put_fast_locked(kind, frame)
        finally:
            self._lock.release()
        return True

    # Data, by turns.

    def put_data(self, channel: int, head: bytes, data: Any) -> None:
        """Queue stream bytes; the caller has made sure that the window allows them."""
        with self._lock:
            entry = self._channel_locked(channel, head)
            if entry is not None and not entry.last:
                append_merged(entry.data, data)

    def put_eof(self, channel: int, frame: Frame) -> None:
        with self._lock:
            entry = self._channel_locked(channel, b"")
            if entry is not None and not entry.last:
                entry.last.append(frame)

    def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
        with self._lock:
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

    def drop(self, channel: int) -> None:
        with self._lock:
            self._cancellable.pop(channel, None)
            self._fast.pop(("first", channel), None)
            self._drop_locked(channel)

    # The leg's end.

    def close(self, frame: Frame, *, flush: bool = True) -> None:
        with self._lock:
            if self._close is None:
                self._close = frame
                if not flush:
                    self._clear_locked()

    def stop(self) -> None:
        with self._lock:
            self._is_over = True
            self._clear_locked()

    # What is taken. The properties need no lock.

    @property
    def has_frames(self) -> bool:
        return bool(self._fast or self._turns)

    @property
    def is_closing(self) -> bool:
        return self._close is not None

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def is_clear(self) -> bool:
        """Whether nothing waits, and data may still be put."""
        return not (self._fast or self._turns or self._close is not None or self._is_over)

    def take(self, *, with_close: bool = False) -> Frame | None:
        """Return the next frame; None: nothing waits. Only the writer takes the close."""
        with self._lock:
            if self._is_over:
                return None
            frame = self._next_locked()
            if frame is None and with_close and self._close is not None:
                self._is_over = True
                return self._close
            return frame

    def _next_locked(self) -> Frame | None:
        assert self._lock.locked()
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

    def _put_fast_locked(self, key: Hashable, frame: Frame) -> None:
        assert self._lock.locked()
        if self._close is None and not self._is_over:
            self._fast[key] = frame

    def _channel_locked(self, channel: int, head: bytes) -> _Channel | None:
        assert self._lock.locked()
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
        assert self._lock.locked()
        self._fast.pop(("ack", channel), None)
        if self._channels.pop(channel, None) is not None:
            self._turns.remove(channel)

    def _clear_locked(self) -> None:
        assert self._lock.locked()
        self._fast.clear()
        self._cancellable.clear()
        self._channels.clear()
        self._turns.clear()
