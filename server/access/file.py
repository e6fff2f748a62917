"""Reads the credentials file (docs/access.md)."""

from __future__ import annotations

import logging
import os
import stat

from http_network_relay.wire.errors import ConfigError
from server.access.credentials import Credentials
from server.access.form import SHORT_FORM, parse_credentials
from server.config import CREDENTIALS_FILE

_log = logging.getLogger("http_network_relay.server.credentials")

# Room for some 50,000 entries. More would delay every login and reload.
_MAX_FILE_BYTES = 16 * 1024 * 1024


class UnreadableError(ConfigError):
    """The content is unknown: the file does not exist, or cannot be read."""


def load_credentials(path: str, *, warn: bool = True) -> Credentials:
    """Read the file. Raises ConfigError that names it, the line and the fix, never a secret.

    `warn`: log what an operator may want to change. One of several readers sets it.
    """
    return parse_credentials(path, read_file(path, warn=warn), warn=warn)


def read_file(path: str, *, warn: bool = False) -> bytes:
    """Return the content; raises ConfigError, and UnreadableError for a file that is unreadable."""
    try:
        # Non-blocking: opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise OSError(0, "not a regular file")
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableError(
            f"{path}: no such file; create it as {SHORT_FORM}, or name another file with "
            f"--credentials-file or {CREDENTIALS_FILE.variable}"
        ) from None
    except OSError as exc:
        raise UnreadableError(
            f"{path}: cannot be read ({exc.strerror}); make it readable for the server's "
            f"user, or name another file with {CREDENTIALS_FILE.variable}"
        ) from exc
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {_MAX_FILE_BYTES} bytes; name the right file")
    if warn and mode & stat.S_IROTH:
        _log.warning("credentials file is readable by others file=%s fix=chmod-600", path)
    return content
