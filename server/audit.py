"""The audit log: one JSON object a line, to a file or stdout (docs/limits.md, "Audit log").

Any thread may call put(), which waits neither for the disk nor for a lock. One thread,
`audit:writer`, writes; the relay starts, stops and joins this thread. Events that do not fit
into the queue are lost; a `lost` line gives their number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import select
import stat
import sys
import threading
import time
from datetime import datetime, timezone
from itertools import count

from server.log_paths import STDOUT
from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.audit")


# The value of a field, and an event with its fields by name.
Value = str | int | float | None
_Event = dict[str, Value]

# Upper bound of queued events: about 4 MB, or minutes of a busy relay.
MAX_WAITING = 10_000

# Seconds between two tries while the disk is full or the FIFO has no reader.
_RETRY_S = 1.0

# Seconds of one poll() of a full pipe, before the writer checks for stop() again.
_POLL_S = 0.1


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, with milliseconds."""
    now = datetime.now(timezone.utc)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class AuditLog(ServiceThread):
    """Writes events to `path` (`-`: stdout; empty: nowhere)."""

    def __init__(self, path: str, *, max_waiting: int = MAX_WAITING) -> None:
        # A daemon: no call interrupts a blocked write, which must not keep the process alive.
        super().__init__("audit:writer", is_daemon=True)
        self._path = path
        self._max_waiting = max_waiting
        # SimpleQueue.put is atomic and takes no lock, so the timer may call put() too.
        self._queue: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        # Counts lost events, plus one for each read by the writer. next() is atomic; `+=` by
        # several threads would miss some.
        self._losses = count(1)
        self._is_stopped = threading.Event()
        # Only the writer's thread uses the fields below.
        self._fd = -1
        # The current line, and the bytes of the line that are not yet written.
        self._line = b""
        self._rest = b""
        self._looks = 0
        self._reported = 0
        self._reported_at = float("-inf")
        self._failure = ""

    @property
    def is_on(self) -> bool:
        """Whether the log has a path; without a path put() drops every event."""
        return bool(self._path)

    def start(self) -> None:
        if self.is_on:
            super().start()

    def put(self, event: str, **fields: Value) -> None:
        """Queue one event with the time of the call, or count the event as lost. Never waits."""
        if not self.is_on:
            return
        if self._queue.qsize() >= self._max_waiting:
            next(self._losses)
        else:
            self._queue.put({"time": utc_now(), "event": event, **fields})

    def stop(self) -> None:
        """End the writer after the queued events; a write that would wait ends the writer early."""
        self._is_stopped.set()
        self._queue.put(None)

    # All methods below run in the writer's thread.

    def _run(self) -> None:
        line: _Event | None = None
        try:
            while not (self._is_stopped.is_set() and self._queue.empty()):
                line = self._queue.get()
                if line is not None:
                    self._write_patiently(_encode(line))
                self._report_losses()
        except _GiveUpError:
            left = 1
            with contextlib.suppress(queue.Empty):
                while True:
                    left += self._queue.get_nowait() is not None
            _log.error("audit lines lost at the end count=%d", left)
        except Exception:
            _log.exception("audit log failed")
        finally:
            self._close()

    def _report_losses(self) -> None:
        """Write the number of newly lost events, once in _RETRY_S or when the queue is empty."""
        self._looks += 1
        lost = next(self._losses) - self._looks - self._reported
        now = time.monotonic()
        if lost and (self._queue.empty() or now - self._reported_at >= _RETRY_S):
            self._write_patiently(_encode({"time": utc_now(), "event": "lost", "count": lost}))
            self._reported += lost
            self._reported_at = now

    def _write_patiently(self, line: bytes) -> None:
        """Write a whole line, and retry without a deadline. Raises _GiveUpError after stop()."""
        self._line = self._rest = line
        while True:
            try:
                self._open_again_if_moved()
                while self._rest:
                    self._wait_writable()
                    # After poll() a pipe takes PIPE_BUF bytes without blocking, and maybe no more.
                    sent = os.write(self._fd, self._rest[: select.PIPE_BUF])
                    self._rest = self._rest[sent:]
            except OSError as exc:
                self._note_failure(exc)
            else:
                self._note_success()
                return
            if self._is_stopped.wait(_RETRY_S):
                raise _GiveUpError

    def _wait_writable(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while not (events := poll.poll(_POLL_S * 1000)):
            if self._is_stopped.is_set():
                raise _GiveUpError
        if events[0][1] & (select.POLLERR | select.POLLNVAL):
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _open_again_if_moved(self) -> None:
        """Open the file, and open the path again after a rotation."""
        if self._path == STDOUT:
            self._fd = sys.stdout.fileno() if self._fd < 0 else self._fd
            return
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                there, here = os.stat(self._path), os.fstat(self._fd)
                if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                    return
            self._close()
        # O_NONBLOCK: the open of a FIFO without a reader fails, and does not wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        # A newline first ends a line that a full disk has cut short.
        self._rest = b"\n" + self._line if self._ends_within_a_line() else self._line

    def _ends_within_a_line(self) -> bool:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return False
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
        return False  # The file is not readable, only writable.

    def _close(self) -> None:
        if self._fd >= 0 and self._path != STDOUT:
            os.close(self._fd)
        self._fd = -1

    def _note_failure(self, exc: OSError) -> None:
        if exc.errno in (errno.EPIPE, errno.ENXIO):
            self._close()  # The FIFO has no reader any more.
        if not self._failure:
            self._failure = exc.strerror or type(exc).__name__
            _log.warning("audit log cannot be written path=%s error=%s", self._path, self._failure)

    def _note_success(self) -> None:
        if self._failure:
            self._failure = ""
            _log.warning("audit log is written again path=%s", self._path)


class _GiveUpError(Exception):
    """The server stops while a line cannot be written."""


def _encode(event: _Event) -> bytes:
    # ASCII only: a peer's text could otherwise contain a Unicode line separator.
    return json.dumps(event, separators=(",", ":")).encode("ascii") + b"\n"
