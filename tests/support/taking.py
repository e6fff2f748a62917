"""An outbox read as a leg's writer would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def take(outbox: Any) -> Any:
    """Wait for the next frame, of a client's outbox or the server's; None when it is over."""
    while True:
        frame = outbox.take(with_close=True)
        if frame is not None or not outbox.wait_call():
            return frame


class TakingOutlet:
    """In place of the Outlet of a leg without a network: what is put is taken by its writer."""

    def __init__(self, outbox: Any, write: Callable[[Any], None] = lambda _: None) -> None:
        self._outbox = outbox
        self._write = write

    def start(self) -> None:
        """The writer is called by itself."""

    def push_all(self) -> bool:
        """All of it is the writer's."""
        return False

    def run(self) -> None:
        """As the leg's writer."""
        while (frame := take(self._outbox)) is not None:
            self._write(frame)

    def stop(self) -> None:
        """Nobody else sends."""
