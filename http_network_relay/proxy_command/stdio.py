"""Standard input and output of the proxy command, on each operating system."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import sys
from typing import Any

from http_network_relay.leg.duplex_socket import DONT_WAIT

STDIN = 0

STDOUT = 1

# The new size of a stdin or stdout pipe once full: the default maximum of an unprivileged user.
PIPE_BYTES = 1024 * 1024

# Windows has no poll, and no select for pipes.
CAN_POLL = hasattr(select, "poll")


def fill_standard_files() -> None:
    """Open /dev/null for each closed one of 0, 1, 2: a socket could get the number of stdin."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.dup(number)
    os.close(number)


class QuickStdout:
    """Writes to stdout without waiting, and without O_NONBLOCK on the shared file description."""

    def __init__(self, stdout: int) -> None:
        """Raises OSError if stdout or the system does not support such writes."""
        self._stdout = stdout
        mode = os.fstat(stdout).st_mode
        self._is_socket = stat.S_ISSOCK(mode)
        self._is_enlarged = False
        if self._is_socket and DONT_WAIT:
            self._file: Any = socket.socket(fileno=os.dup(stdout))
        elif stat.S_ISFIFO(mode) and sys.platform == "linux":
            self._file = open(  # noqa: SIM115  # close() closes it.
                f"/proc/self/fd/{stdout}", "wb", buffering=0, opener=_open_now
            )
        else:
            raise OSError(errno.ENOTSUP, "stdout is neither a pipe nor a socket")

    def write(self, data: Any) -> int:
        """Write and return the number of bytes accepted; raises OSError."""
        if self._is_socket:
            return int(self._file.send(data, DONT_WAIT))
        count = self._file.write(data) or 0  # None: the write would block.
        if count < len(data) and not self._is_enlarged:
            self._is_enlarged = True
            enlarge_pipe(self._stdout)
        return count

    def close(self) -> None:
        """Close the own description. The caller MUST ensure that no thread is in write()."""
        self._file.close()


def enlarge_pipe(descriptor: int) -> None:
    """Enlarge a pipe: at 64 KiB, each refill would cost a switch to the peer process."""
    import fcntl  # Not on Windows; and only bulk transfers need fcntl.

    set_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 lacks both names.
    get_size = getattr(fcntl, "F_GETPIPE_SZ", 1032)
    with contextlib.suppress(OSError):  # The user's limit for pipe memory.
        if fcntl.fcntl(descriptor, get_size) < PIPE_BYTES:
            fcntl.fcntl(descriptor, set_size, PIPE_BYTES)


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_NONBLOCK)


def write_stdout(stdout: int, chunk: Any) -> None:
    """Write the whole chunk; blocks."""
    view = memoryview(chunk)
    while view:
        try:
            view = view[os.write(stdout, view) :]
        except BlockingIOError:  # Another process set O_NONBLOCK on the shared pipe.
            select.select([], [stdout], [])


def close_stdout(stdout: int) -> None:
    """Deliver the eof: close every duplicate of stdout, or the reader gets no eof."""
    about = os.fstat(stdout)
    if stat.S_ISSOCK(about.st_mode):
        # stdin may be the same socket: close() alone would send no eof.
        with socket.socket(fileno=os.dup(stdout)) as sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if not stat.S_ISCHR(about.st_mode) and os.path.samestat(about, stderr):
            os.dup2(null, 2)
    os.dup2(null, stdout)
    os.close(null)
