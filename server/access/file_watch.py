"""Notices that the credentials file has changed. No thread of its own: somebody polls."""

from __future__ import annotations

import hashlib
import os

from http_network_relay.wire.errors import ConfigError
from server.access.credentials import Credentials
from server.access.file import UnreadableError, read_file
from server.access.form import parse_credentials

# Device, inode, size, and the times of content and of owner or mode; None: not there.
_Version = tuple[int, int, int, int, int] | None


class FileWatch:
    """One file, looked at by its name each time: it may be replaced, or a link turned.

    Between two polls everything may happen to it. A new version that cannot be loaded is
    looked at again by the next poll, and only then an error: a file that is half written,
    or gone for a moment, is nobody's concern. One that cannot be read is tried at each poll,
    since what stands in it may revoke somebody. Not thread-safe; one thread polls.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._version: _Version = None
        self._digest = b""
        # The version was read by the last poll only. A change within one tick of the file
        # system's clock keeps it, so the next poll reads again.
        self._is_fresh = True
        # How many polls in a row could not read the version, or were broken off.
        self._vain_looks = 0
        # What was raised, and for which version.
        self._failure: tuple[_Version, str] | None = None

    def load(self, *, warn: bool = True) -> Credentials:
        """Read the file now, for the start; raises ConfigError. poll() tells later changes."""
        version = self._look()
        content = read_file(self._path, warn=warn)
        credentials = parse_credentials(self._path, content, warn=warn)
        self._version, self._digest = version, hashlib.sha256(content).digest()
        self._is_fresh, self._vain_looks, self._failure = True, 0, None
        return credentials

    def poll(self) -> Credentials | None:
        """Return what is in force from now on, or None if nothing changed.

        Raises ConfigError, once for each version that stays wrong or unread; what was in
        force before stays so. After such an error, a good file is always returned.
        """
        version = self._look()
        is_same = version == self._version
        if is_same and not self._is_fresh and not self._vain_looks:
            return None
        # Before the reading: a change during it shows as another version at the next poll.
        self._version, self._is_fresh = version, not is_same
        # Until the content is judged: no descriptor left, or a server of files that is away,
        # is no answer to what the file says, however often it is asked.
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
            # Whatever the reason, reading the file says it.
            return None
        return (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )
