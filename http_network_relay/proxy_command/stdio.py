"""Standard input and output of the proxy command, as the operating system gives them."""

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

# What a pipe as stdin or stdout is given as soon as it was full: the most that any user may, by
# default.
PIPE_BYTES = 1024 * 1024

# Windows has no poll, and no select for pipes.
CAN_POLL = hasattr(select, "poll")


def fill_standard_files() -> None:
    """Open what is closed of 0, 1 and 2: a socket in that place would be taken for stdin."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.dup(number)
    os.close(number)


class QuickStdout:
    """Writes what stdout takes at once, by a description of its own: the shared one stays as is."""

    def __init__(self, stdout: int) -> None:
        """Raises OSError where there is no such way."""
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
        """Return how many bytes it took; raises OSError."""
        if self._is_socket:
            return int(self._file.send(data, DONT_WAIT))
        count = self._file.write(data) or 0  # None: it would have to wait.
        if count < len(data) and not self._is_enlarged:
            self._is_enlarged = True
            enlarge_pipe(self._stdout)
        return count

    def close(self) -> None:
        """Let it go; nobody is inside write() any more."""
        self._file.close()


def enlarge_pipe(descriptor: int) -> None:
    """Give it room, so that we need not take turns with its other end for each 64 KiB."""
    import fcntl  # Not everywhere; and only bulk needs it.

    set_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 has no names for them.
    get_size = getattr(fcntl, "F_GETPIPE_SZ", 1032)
    with contextlib.suppress(OSError):  # This user has many such pipes.
        if fcntl.fcntl(descriptor, get_size) < PIPE_BYTES:
            fcntl.fcntl(descriptor, set_size, PIPE_BYTES)


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_NONBLOCK)


def write_stdout(stdout: int, chunk: Any) -> None:
    """Write all of it, with waits."""
    view = memoryview(chunk)
    while view:
        try:
            view = view[os.write(stdout, view) :]
        except BlockingIOError:  # Somebody made the shared pipe non-blocking.
            select.select([], [stdout], [])


def close_stdout(stdout: int) -> None:
    """Deliver the eof: every duplicate of stdout must go, or its reader waits on."""
    about = os.fstat(stdout)
    if stat.S_ISSOCK(about.st_mode):
        # stdin may be the same socket, so closing would not be enough.
        with socket.socket(fileno=os.dup(stdout)) as sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if not stat.S_ISCHR(about.st_mode) and os.path.samestat(about, stderr):
            os.dup2(null, 2)
    os.dup2(null, stdout)
    os.close(null)
