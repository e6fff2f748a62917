"""Sends the frames of one leg, in the order of docs/protocol.md, "Order".

To give each message to another thread costs more than to send it. So push() sends at once what
the socket takes without waiting; what the socket does not take is left to the leg's writer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.send_queue import Frame, SendQueue
from http_network_relay.wire.constants import OP_BINARY
from http_network_relay.wire.frames import ZERO_KEY, frame_header, mask

# Most that one push() sends: the calling thread has its own work, and the writer goes on.
_PUSH_BYTES = 256 * 1024


class FrameSender:
    """The only object that others put a leg's frames into. Any thread; a put never waits.

    put_first, put_eof, put_end, try_put_leg and close call the writer, since their callers may
    hold locks. After put_data, put_ack and put_leg the caller MUST call push(), holding no
    lock. Before start() frames are only queued.

    Args:
        make_key: Returns the masking key of each frame; None for a frame that is not masked.
        call: Called when the writer has work, by any thread, with locks held: it must not wait,
            and have run() or push_all() called. None: run() waits for the call by itself.
    """

    def __init__(
        self,
        make_key: Callable[[], bytes | None] = lambda: None,
        call: Callable[[], None] | None = None,
    ) -> None:
        self._queue = SendQueue()
        self._make_key = make_key
        self._call = call
        # Set while the writer has a call that it has not begun to serve.
        self._called = threading.Event()
        # Guards the next two. Held from a frame's taking to its last byte, by the writer across
        # waits; push() only tries it, and never holds it across a wait.
        self._send_lock = threading.Lock()
        # Bytes of a frame that the socket did not take: they go out before anything else.
        self._rest: memoryview | None = None
        # None before start() and after stop().
        self._duplex: DuplexSocket | None = None

    def start(self, duplex: DuplexSocket) -> None:
        """Send on `duplex` from now on, first what was queued before."""
        with self._send_lock:
            self._duplex = duplex
        self._called.clear()
        self.call_writer()

    def stop(self) -> None:
        """Drop what is queued, and end the writer; after it nobody is inside the socket.

        The caller MUST abort the socket first, or be the writer: this waits for who sends.
        """
        self._queue.stop()
        self.call_writer()
        with self._send_lock:
            self._duplex = None

    # What is put.

    def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
        """Queue a channel's first message; `cancellable` if an end may take it back."""
        self._queue.put_first(channel, frame, cancellable=cancellable)
        self.call_writer()

    def cancel_first(self, channel: int) -> None:
        """Take an unsent first message back; nothing if it was sent."""
        self._queue.cancel_first(channel)

    def put_ack(self, channel: int, frame: Frame) -> None:
        """Queue an ack; it replaces an unsent one of the same channel."""
        self._queue.put_ack(channel, frame)

    def put_leg(self, kind: str, frame: Frame) -> None:
        """Queue a message of the leg itself (pong, going_away): one slot a kind."""
        self._queue.put_leg(kind, frame)

    def try_put_leg(self, kind: str, frame: Frame) -> bool:
        """As put_leg, but without waiting even for the queue's lock; False: try later."""
        is_put = self._queue.try_put_leg(kind, frame)
        if is_put:
            self.call_writer()
        return is_put

    def put_data(self, channel: int, head: bytes, data: Any) -> None:
        """Send stream bytes at once if nothing waits, else queue them. The window allows them."""
        queue = self._queue
        if not queue.is_clear or not self._send_lock.acquire(blocking=False):
            queue.put_data(channel, head, data)
            return
        try:
            duplex = self._duplex
            if duplex is None or self._rest is not None or not queue.is_clear:
                queue.put_data(channel, head, data)
                return
            self._rest = self._send_now_locked(duplex, *self._encode(OP_BINARY, head, data))
        finally:
            self._send_lock.release()
        if self._rest is not None:
            self.call_writer()

    def put_eof(self, channel: int, frame: Frame) -> None:
        """Queue the eof behind the channel's data."""
        self._queue.put_eof(channel, frame)
        self.call_writer()

    def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
        """Queue a channel's reset or detached, and delete what waits of the channel.

        `in_turn` puts it behind the channel's data instead; after a second it overtakes.
        """
        self._queue.put_end(channel, frame, in_turn=in_turn)
        self.call_writer()

    def drop(self, channel: int) -> None:
        """Delete what waits of a channel that has ended: nobody would act on it."""
        self._queue.drop(channel)

    def close(self, frame: Frame, *, flush: bool = True) -> None:
        """Send `frame` (a close) last: behind all that is queued, or at once.

        What is put later is dropped. The first close wins.
        """
        self._queue.close(frame, flush=flush)
        self.call_writer()

    # Who sends.

    @property
    def has_frames(self) -> bool:
        """Whether a frame waits, the close not counted. Needs no lock."""
        return self._queue.has_frames

    @property
    def is_closing(self) -> bool:
        """Whether a close waits or was sent. Needs no lock."""
        return self._queue.is_closing

    @property
    def is_full(self) -> bool:
        """Whether a frame has begun that the socket did not take whole. Needs no lock."""
        return self._rest is not None

    @property
    def is_over(self) -> bool:
        """Whether the close was taken, or stop() called. Needs no lock."""
        return self._queue.is_over

    def call_writer(self) -> None:
        """Let the writer send what waits. Takes no lock that is held across a wait."""
        # Two threads may both call: the second call finds nothing to send.
        if not self._called.is_set():
            self._called.set()
            if self._call is not None:
                self._call()

    def push(self) -> None:
        """Send what waits, as far as the socket takes it now. The caller MUST hold no lock."""
        # The rest of a frame is the writer's, which was called.
        while self._queue.has_frames and self._rest is None:
            if not self._send_lock.acquire(blocking=False):
                return  # The thread inside looks again after its release.
            try:
                is_done = self._push_locked()
            finally:
                self._send_lock.release()
            if not is_done:
                self.call_writer()
                return

    def push_all(self) -> bool:
        """Serve a call in place of run(): send the rest, all frames and the close, no waiting.

        Returns: Whether all was sent, or the leg is lost; else this MUST be called again, when
        the socket can be written if is_full, or at once.
        """
        # Before the look at the queue: what is put behind it calls again.
        self._called.clear()
        with self._send_lock:
            if self._duplex is None:
                return True
            if self._rest is not None:
                self._rest = self._send_now_locked(self._duplex, b"", self._rest)
            is_done = self._push_locked(with_close=True)
            if is_done and self._queue.is_over:
                # Under the lock: after stop() the descriptor may be another's.
                self._duplex.finish_sending()
            return is_done

    def _push_locked(self, *, with_close: bool = False) -> bool:
        """Return whether all was sent; the rest, if any, is the writer's."""
        assert self._send_lock.locked()
        sent = 0
        while self._rest is None and self._duplex is not None:
            if sent >= _PUSH_BYTES:
                return False
            frame = self._queue.take(with_close=with_close)
            if frame is None:
                return True
            sent += len(frame.payload)
            self._rest = self._send_now_locked(self._duplex, *self._encode(*frame))
        return False

    def _send_now_locked(self, duplex: DuplexSocket, *parts: Any) -> memoryview | None:
        """As DuplexSocket.send_now; a lost leg takes all, and its reader finds the loss."""
        assert self._send_lock.locked()
        try:
            return duplex.send_now(*parts)
        except OSError:
            duplex.abort()
            return None

    def run(self) -> None:
        """Be the writer: send what push() could not, to the close or stop(). Raises OSError."""
        while True:
            self._called.clear()
            with self._send_lock:
                self._send_rest_locked()
                while self._duplex and (frame := self._queue.take(with_close=True)) is not None:
                    self._rest = self._duplex.send_now(*self._encode(*frame))
                    self._send_rest_locked()
            if self._queue.is_over:
                return
            if not self._queue.has_frames:
                self._called.wait()

    def _send_rest_locked(self) -> None:
        assert self._send_lock.locked()
        if self._rest is not None and self._duplex is not None:
            self._duplex.send(self._rest)
            self._rest = None

    def _encode(self, opcode: int, head: bytes, payload: Any) -> tuple[bytes, Any]:
        size = len(head) + len(payload)
        key = self._make_key()
        header = frame_header(opcode, size, key)
        if key is None or key == ZERO_KEY:
            return header + head, payload
        data = bytearray(head)
        data += payload
        mask(data, key)
        return header, data
