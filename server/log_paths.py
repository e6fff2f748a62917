"""Whether a log file can be written: a check before the first line."""

from __future__ import annotations

import errno
import os
import stat
import tempfile

# This path of a log stands for standard output.
STDOUT = "-"


def why_not_writable(path: str) -> str | None:
    """Return the reason why no line can ever be written to the path; None if none is known.

    A full disk and a FIFO without a reader are no such reason: both may change, and the writer
    waits for that. The check itself never waits. It leaves no file, which could be root's.
    """
    if path in ("", STDOUT):
        return None
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISFIFO(mode):
            # Not opened: a close would end the stream for the reader.
            return None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            return "not a file"
        flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        os.close(os.open(path, flags))
    except FileNotFoundError:
        return _why_not_made(os.path.dirname(os.path.realpath(path)))
    except OSError as exc:
        return exc.strerror
    return None


def _why_not_made(folder: str) -> str | None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as exc:
        return None if exc.errno in (errno.ENOSPC, errno.EDQUOT) else exc.strerror
    return None
