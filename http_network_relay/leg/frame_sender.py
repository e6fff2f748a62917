"""Who sends what an outbox holds: whoever has put something, or the leg's writer thread.

To hand each message to another thread costs more than to send it. So push() sends at once
what the socket takes without waiting; only what it does not take is the writer's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.send_queue import SendQueue
from http_network_relay.wire.constants import OP_BINARY
from http_network_relay.wire.frames import ZERO_KEY, frame_header, mask

# What one push() sends for others at most: then it has its own work to do, and the writer
# goes on.
_PUSH_BYTES = 256 * 1024


class FrameSender:
    """Sends the frames of one outbox, in its order.

    `_send_lock` is held from a frame's taking to its last byte, waits included, but for a
    frame that push() has begun and the socket has not taken whole: its rest is kept, and goes
    out before anything else. Taken before the outbox's lock and the duplex's. Who does not
    get it at once leaves: the one inside looks again after it has let go.
    """

    def __init__(
        self,
        outbox: SendQueue,
        duplex: DuplexSocket,
        on_lost: Callable[[], None],
        make_key: Callable[[], bytes | None],
    ) -> None:
        """`make_key` returns a masking key for each frame; None: it is not masked.

        `on_lost` is called when the socket fails under push(), by any thread.
        """
        self._outbox = outbox
        self._duplex = duplex
        self._on_lost = on_lost
        self._make_key = make_key
        self._send_lock = threading.Lock()
        self._rest: memoryview | None = None
        self._is_stopped = False

    def start(self) -> None:
        """From now on who puts sends."""
        self._outbox.push = self.push
        self._outbox.put_data_now = self.put_data_now

    def put_data_now(self, channel: int, head: bytes, data: Any) -> None:
        """As put_data of the outbox, but sent at once if nothing waits. Any thread; never waits."""
        if not self._outbox.is_clear or not self._send_lock.acquire(blocking=False):
            self._outbox.put_data(channel, head, data)
            return
        try:
            is_first = self._outbox.is_clear and self._rest is None and not self._is_stopped
            if is_first:
                self._rest = self._duplex.send_now(*self._encode(OP_BINARY, head, data))
        except OSError:
            self._on_lost()
            return
        finally:
            self._send_lock.release()
        if not is_first:
            self._outbox.put_data(channel, head, data)
        elif self._rest is not None:
            self._outbox.call_writer()

    def push(self) -> None:
        """Send what waits, as far as the socket takes it now. Any thread that holds no lock."""
        # A rest is the writer's, who has been called.
        while self._outbox.has_frames and self._rest is None:
            if not self._send_lock.acquire(blocking=False):
                return
            try:
                is_done = self._push_some()
            except OSError:
                # The peer is gone: the leg's reader finds out, and tells.
                self._on_lost()
                return
            finally:
                self._send_lock.release()
            if not is_done:
                self._outbox.call_writer()
                return

    def push_all(self) -> bool:
        """As push(), with the close, where there is no writer; False: now there has to be one."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            return self._push_some(with_close=True)
        except OSError:
            self._on_lost()
            return True
        finally:
            self._send_lock.release()

    def _push_some(self, *, with_close: bool = False) -> bool:
        """Return whether all was sent; the rest, if any, is the writer's."""
        sent = 0
        while self._rest is None and not self._is_stopped:
            if sent >= _PUSH_BYTES:
                return False
            frame = self._outbox.take(with_close=with_close)
            if frame is None:
                return True
            sent += len(frame.payload)
            self._rest = self._duplex.send_now(*self._encode(*frame))
        return False

    def run(self) -> None:
        """Send what push() could not, until the close has gone out. Raises OSError."""
        goes_on = True
        while goes_on:
            with self._send_lock:
                self._send_rest()
                while (frame := self._outbox.take(with_close=True)) is not None:
                    self._rest = self._duplex.send_now(*self._encode(*frame))
                    self._send_rest()
            goes_on = self._outbox.has_frames or self._outbox.wait_call()

    def stop(self) -> None:
        """Let nobody send any more; after it the socket may be freed."""
        with self._send_lock:
            self._is_stopped = True

    def _send_rest(self) -> None:
        if self._rest is not None:
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
