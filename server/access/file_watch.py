"""Detects a change of the credentials file. Has no thread: the caller MUST poll."""

from __future__ import annotations

import hashlib
import os

from http_network_relay.wire.errors import ConfigError
from server.access.credentials import Credentials
from server.access.file import UnreadableError, read_file
from server.access.form import parse_credentials

# Device, inode, size, mtime and ctime; None: the file does not exist.
_Version = tuple[int, int, int, int, int] | None


class FileWatch:
    """One file, opened by name at each poll, so that poll() detects a replaced file or link.

    A new version that fails to load is an error only at the next poll, since a file may be half
    written or briefly missing. Each poll tries an unreadable version again, since its content
    may revoke a login. Not thread-safe: only one thread may call the methods.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._version: _Version = None
        self._digest = b""
        # Only the last poll has read this version. The next poll MUST read again: a change within
        # one tick of the file system's clock leaves the version equal.
        self._is_fresh = True
        # Number of successive polls that could not read the version, or were interrupted.
        self._vain_looks = 0
        # The version and the message of the last raised error.
        self._failure: tuple[_Version, str] | None = None

    def load(self, *, warn: bool = True) -> Credentials:
        """Read the file at the start; raises ConfigError. poll() returns later changes."""
        version = self._look()
        content = read_file(self._path, warn=warn)
        credentials = parse_credentials(self._path, content, warn=warn)
        self._version, self._digest = version, hashlib.sha256(content).digest()
        self._is_fresh, self._vain_looks, self._failure = True, 0, None
        return credentials

    def poll(self) -> Credentials | None:
        """Return the credentials of a changed file, or None if nothing changed.

        Raises ConfigError, once for each version that stays wrong or unread. The caller MUST keep
        the older credentials then. After such an error, a good file is always returned.
        """
        version = self._look()
        is_same = version == self._version
        if is_same and not self._is_fresh and not self._vain_looks:
            return None
        # Before the read: a change during the read is another version at the next poll.
        self._version, self._is_fresh = version, not is_same
        # Counts until the content is checked. The content stays unknown without a free descriptor
        # or without the file server, so each poll MUST try again.
        self._vain_looks = self._vain_looks + 1 if is_same else 1
        try:
            content = read_file(self._path)
            digest = hashlib.sha256(content).digest()
            is_known = digest == self._digest and self._failure is None
            credentials = None if is_known else parse_credentials(self._path, content, warn=True)
        except UnreadableError as exc:
            if self._vain_looks == 2:
                self._failure = (version, str(exc))
                raise
            return None
        except ConfigError as exc:
            self._vain_looks = 0
            if is_same and self._failure != (version, str(exc)):
                self._failure = (version, str(exc))
                raise
            return None
        self._vain_looks = 0
        self._digest, self._failure = digest, None
        return credentials

    def _look(self) -> _Version:
        try:
            found = os.stat(self._path)
        except OSError:
            # The read that follows raises the error with its reason.
            return None
        return (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )
