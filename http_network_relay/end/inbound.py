"""The bytes that come in at one end of a tunnel: from the leg's reader to the consumer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from http_network_relay.end.channel import Channel
from http_network_relay.end.state import EndCore
from http_network_relay.leg.send_queue import append_merged


class Inbound:
    """Receives stream bytes and delivers them in order; one thread delivers at a time.

    The leg's reader calls the on_... methods, which never wait. It delivers at once what the
    consumer takes without a wait. The consumer's thread delivers the rest from a queue.
    """

    def __init__(self, core: EndCore) -> None:
        self._core = core
        self._into = core.stream.into
        # The core's lock guards all below. Bytes that wait for the consumer:
        self._queue: deque[Any] = deque()
        # Takes bytes without a wait and returns how many.
        self._deliver: Callable[[Any], int] | None = None
        self._reader_delivers = False
        self._consumer_delivers = False

    # The leg's reader. Raises TunnelError for what breaks the protocol.

    def on_data(self, channel: Channel, data: Any) -> bool:
        """Deliver stream bytes, or queue them for the consumer.

        Returns:
            Whether the caller MUST call on_pause() when nothing more comes.
        """
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "data"):
                return False
            self._into.on_data(len(data), time.monotonic())
            is_busy = self._consumer_delivers or self._reader_delivers or self._queue
            deliver = self._deliver
            if deliver is None or is_busy:
                append_merged(self._queue, data)
                core.changed.notify_all()
                return False
            self._reader_delivers = True
        # A hand-over to the consumer's thread costs more than the delivery.
        try:
            count = deliver(data)
        except OSError:
            count = 0  # The consumer's thread meets the same error, and reports it.
        with core.lock:
            self._reader_delivers = False
            if count < len(data):
                self._queue.appendleft(memoryview(data)[count:])
            if self.has_news_locked() or self._deliver is None:
                core.changed.notify_all()
            # More may be on its way, by this thread: only a pause means that all is drained.
            has_ack, newest = self._count_locked(count, drained=False), core.channel
            owes_ack = self._into.owes_ack
        if has_ack and newest is not None:
            newest.push()
        return owes_ack

    def on_pause(self, channel: Channel) -> None:
        """Send the ack that is due when nothing more comes for the moment."""
        with self._core.lock:
            is_newest = channel is self._core.channel
            if not is_newest or self._queue or not self._into.owes_ack:
                return
            has_ack = self._count_locked(0, drained=True)
        if has_ack:
            channel.push()

    def on_eof(self, channel: Channel, count: int) -> None:
        """Note that no byte follows."""
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "eof"):
                return
            self._into.on_eof(count)
            if self._into.eof_delivered:  # A resume made the peer repeat its eof.
                self._ack_eof_locked()
            core.changed.notify_all()
        channel.push()
        core.on_change()

    # The consumer's thread.

    def deliver_directly(self, deliver: Callable[[Any], int] | None) -> None:
        """Let the leg's reader deliver through `deliver`, which MUST NOT wait.

        `deliver` returns how many bytes were taken; the rest, and an OSError, are left to the
        consumer's thread. None ends this; after the return no thread is inside `deliver`.
        """
        with self._core.lock:
            self._deliver = deliver
            while deliver is None and self._reader_delivers:
                self._core.changed.wait()

    def next_chunk(self) -> Any:
        """Wait for bytes to deliver; b"" is the eof, None the end of the tunnel.

        The caller MUST call delivered() after each chunk, and delivered_eof() after the eof.
        """
        core = self._core
        with core.lock:
            self._consumer_delivers = False
            core.wait_locked(self.has_news_locked)
            if core.state.has_error and time.monotonic() >= core.deliver_until:
                return None
            if self._queue:
                self._consumer_delivers = True
                return self._queue.popleft()
            return b"" if self._eof_is_due_locked() else None

    def has_news_locked(self) -> bool:
        """Whether next_chunk() would not wait."""
        assert self._core.lock.locked()
        if self._reader_delivers:
            return False  # The next chunk would overtake the reader, who never waits.
        return bool(self._queue) or self._core.state.has_error or self._eof_is_due_locked()

    def _eof_is_due_locked(self) -> bool:
        assert self._core.lock.locked()
        into = self._into
        return into.eof_at is not None and not into.eof_delivered and not self._queue

    def delivered(self, size: int) -> None:
        """Count a chunk of `size` bytes as delivered; send the ack that is due."""
        with self._core.lock:
            self._consumer_delivers = False
            channel = self._core.channel
            has_ack = self._count_locked(size, drained=not self._queue)
        if has_ack and channel is not None:
            channel.push()

    def delivered_eof(self) -> None:
        """Count the eof as delivered; its ack goes at once, or on the next leg."""
        core = self._core
        with core.lock:
            self._ack_eof_locked()
            core.changed.notify_all()
            channel = core.channel
        if channel is not None:
            channel.push()
        core.on_change()

    # Any thread.

    def resumed_locked(self) -> None:
        """Acknowledge what was delivered since this end told the peer its position."""
        assert self._core.lock.locked()
        self._count_locked(0, drained=not self._queue)

    def clear(self) -> None:
        """Free the bytes that wait."""
        with self._core.lock:
            self._queue.clear()

    def _count_locked(self, size: int, *, drained: bool) -> bool:
        """Count delivered bytes; return whether the caller must push an ack."""
        assert self._core.lock.locked()
        channel = self._core.channel
        if channel is None:
            self._into.delivered += size  # The resume tells the peer, or the ack behind it.
            return False
        ack = self._into.on_delivered(size, time.monotonic(), drained=drained)
        if ack is None or self._core.state.has_error:
            return False
        channel.put_ack(ack)
        return True

    def _ack_eof_locked(self) -> None:
        assert self._core.lock.locked()
        core, channel = self._core, self._core.channel
        ack = self._into.on_eof_delivered(time.monotonic())
        if ack is not None and channel is not None and not core.state.has_error:
            channel.put_ack(ack)
            # After the ack: whoever sees the tunnel finished may close the leg behind that ack.
            self._into.eof_acked = True
            core.finish_locked()
