"""Replaces the credentials file: under a lock, checked, and in one step."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from http_network_relay.wire.errors import ConfigError
from server.access.file import read_file
from server.access.form import CredentialsError, parse_credentials
from server.access.json_lines import parse_json

_log = logging.getLogger("http_network_relay.server.credentials")

# Seconds. An edit takes milliseconds; a command that locks for longer is stopped or stuck.
_LOCK_TIMEOUT_S = 10.0
_LOCK_RETRY_S = 0.02


@contextmanager
def edited(path: str, *, create: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the file's content for a change, and write the content after the body.

    No other edit runs meanwhile. Raises ConfigError, and leaves the file unchanged then. With
    `create` a missing file counts as one without entries.
    """
    # A link stays a link: the file behind the link is locked and replaced.
    path = os.path.realpath(path)
    with _locked(path):
        is_new = create and not os.path.lexists(path)
        data: dict[str, Any] = {"clients": {}, "proxy_users": {}}
        if not is_new:
            content = read_file(path)
            parse_credentials(path, content)
            data = parse_json(content).plain()
        yield data
        text = json.dumps(data, indent=2) + "\n"
        try:
            parse_credentials(path, text.encode("ascii"))
        except CredentialsError as exc:
            # Without the line, which is not a line of the file on the disk.
            raise ConfigError(f"{path}: not changed: {exc.what}") from None
        try:
            _replace(path, text.encode("ascii"))
        except OSError as exc:
            raise ConfigError(
                f"{path}: cannot be written ({exc.strerror}); run this as the file's owner, who "
                "must be allowed to write to its folder (one that is mounted alone cannot be "
                "replaced)"
            ) from exc


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Lock the lock file beside the file. The lock file stays: to remove it would be a race."""
    lock = f"{path}.lock"
    try:
        descriptor = _open_lock(lock)
    except OSError as exc:
        raise ConfigError(
            f"{lock}: cannot be opened ({exc.strerror}); run this as the owner of the "
            "credentials file, who must be allowed to write to its folder"
        ) from exc
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        pause = threading.Event()
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(f"{lock}: held by another command for 10 s; see who, and retry")
            pause.wait(_LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _open_lock(lock: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(lock, flags)
    if os.geteuid() == 0:
        # Otherwise the folder's owner could not edit after root did. Only a new lock file: under
        # this name the owner may have linked another file of root's.
        owner = os.stat(os.path.dirname(lock))
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace(path: str, content: bytes) -> None:
    """Replace the file: a reader sees the old content or the new one, whole."""
    folder, name = os.path.split(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            _keep_owner(path, descriptor)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    folder_descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder_descriptor)
    finally:
        os.close(folder_descriptor)


def _keep_owner(path: str, descriptor: int) -> None:
    """Give the new file (0600) the old file's owner, and the group its old rights.

    A file of root that the server reads by its group must stay readable. Others lose their rights.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return
    new = os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    if old.st_mode & stat.S_IROTH:
        _log.warning(
            "%s: was readable by everybody and is not any more; the server's user must own it "
            "or be in its group",
            path,
        )
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o060 | 0o600)
