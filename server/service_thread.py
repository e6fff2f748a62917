"""The owner of one thread of the server: start, stop, join."""

from __future__ import annotations

import threading


class ServiceThread:
    """Base of a class with one thread, which runs the method `_run`.

    A subclass defines `_run`, and `stop`, which lets `_run` return. The relay calls start() once,
    stop() and then join().
    """

    def __init__(self, name: str, *, is_daemon: bool = False) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=is_daemon)

    def start(self) -> None:
        """Start the thread. Call start() in the worker process, after any fork."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end. Never waits; may be called again."""
        raise NotImplementedError

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended; at once if the thread was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        raise NotImplementedError
