"""The frames of a FrameSender, read as a leg's writer would: nothing else looks inside one.

A FrameSender that was not started only queues, so it stands for a leg without a network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame


class UnsentFrames(FrameSender):
    """A sender that is never started, whoever tries: what is put stays, to be taken."""

    def start(self, duplex: DuplexSocket) -> None:
        """Send nothing."""


def take(sender: Any) -> Any:
    """Wait for the next frame of a FrameSender (or a SendQueue); None when it is over."""
    while True:
        if hasattr(sender, "_called"):
            sender._called.clear()
        frame = take_now(sender)
        if frame is not None or sender.is_over:
            return frame
        sender._called.wait()


def take_now(sender: Any) -> Any:
    """The next frame, up to the close; None: nothing waits."""
    return getattr(sender, "_queue", sender).take(with_close=True)


def drained(sender: Any) -> Iterator[Any]:
    """Take all that waits."""
    while (frame := take_now(sender)) is not None:
        yield frame


def put_data(sender: Any, channel: int, head: bytes, data: Any) -> None:
    """Queue stream bytes without sending them, as while another thread sends."""
    sender._queue.put_data(channel, head, data)


def queue_lock(sender: Any) -> threading.Lock:
    """The lock of the queue, for tests on who may wait for it."""
    lock: threading.Lock = sender._queue._lock
    return lock


class FrameTaker:
    """In place of a DuplexSocket: small frames are taken apart again, and none fails."""

    def __init__(self, write: Callable[[Frame], None]) -> None:
        self._write = write

    def send_now(self, header: bytes, payload: Any) -> None:
        """All of it is taken."""
        assert header[1] < 126
        self._write(Frame(header[0] & 0xF, b"", header[2:] + bytes(payload)))

    def finish_sending(self) -> None:
        """Nobody reads."""

    def abort(self) -> None:
        """Nobody waits."""
