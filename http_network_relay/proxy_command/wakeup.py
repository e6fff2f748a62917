"""Wakeup: how any thread wakes pump-up, and why the user has gone."""

from __future__ import annotations

import contextlib
import os
import threading

from http_network_relay.proxy_command.stdio import CAN_POLL


class Wakeup:
    """Any thread; leave() and wake() never wait."""

    def __init__(self) -> None:
        # 128+n once the user has gone. The first wins.
        self.exit_code: int | None = None
        # Where there is no poll.
        self.woken = threading.Event()
        self.left = threading.Event()
        # The end that pump-up polls; -1 without poll.
        self.reader, self._writer = os.pipe() if CAN_POLL else (-1, -1)
        if CAN_POLL:
            os.set_blocking(self.reader, False)
            os.set_blocking(self._writer, False)

    def leave(self, exit_code: int) -> None:
        """Note that the user has gone; pump-up tells the client."""
        if self.exit_code is None:
            self.exit_code = exit_code
        self.wake()
        self.left.set()

    def wake(self) -> None:
        """Let pump-up look: credit came, the user has gone, or the tunnel is over."""
        if CAN_POLL:
            with contextlib.suppress(BlockingIOError):  # Full: pump-up is awake.
                os.write(self._writer, b"w")
        else:
            self.woken.set()
