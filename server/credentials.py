"""Who may connect: the credentials file, kept as digests only.

The file is `{"clients": {"client-name": "SECRET"}, "proxy_users": ["TOKEN"]}`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import stat
from typing import Any

from server.config import CREDENTIALS_FILE_VARIABLE
from server.errors import ConfigError
from server.wire import NAME_PATTERN, is_secret, matches

_log = logging.getLogger("http_network_relay.server.credentials")

_FORM = '{"clients": {"client-name": "SECRET"}, "proxy_users": ["TOKEN"]}'


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


class Credentials:
    """The names and secrets that are accepted. Immutable; any thread may ask."""

    def __init__(self, clients: dict[str, str], proxy_users: list[str]) -> None:
        self._clients = {name: _digest(secret) for name, secret in clients.items()}
        self._users = [_digest(token) for token in proxy_users]

    def __repr__(self) -> str:
        return f"<Credentials clients={len(self._clients)} proxy_users={len(self._users)}>"

    def has_client(self, name: str) -> bool:
        """Whether a client of this name could ever connect."""
        return name in self._clients

    def check_client(self, name: str, secret: str) -> bool:
        """Whether `secret` is that client's; an unknown name takes the same time."""
        expected = self._clients.get(name, b"\0" * 32)
        return hmac.compare_digest(_digest(secret), expected)

    def check_user(self, token: str) -> str | None:
        """Return the proxy user's name, which tells nothing of the token, or None."""
        digest = _digest(token)
        matches = [hmac.compare_digest(digest, known) for known in self._users]
        return f"token-{digest.hex()[:8]}" if any(matches) else None


def load_credentials(path: str, *, warn: bool = True) -> Credentials:
    """Read the file. Raises ConfigError that names it and the mend, never a secret.

    `warn`: log what an operator may want to change (one of several readers does).
    """
    clients, users = _check_form(path, _parse(path, _read(path)))
    for name, secret in clients.items():
        if not isinstance(name, str) or not matches(NAME_PATTERN, name):
            raise ConfigError(
                f"{path}: the client name {name!r} must be 1 to 128 printable ASCII characters "
                "without spaces and colons; rename it"
            )
        _check_secret(path, f"the secret of client {name}", secret)
    for number, token in enumerate(users, 1):
        _check_secret(path, f"proxy user token number {number}", token)
        first = users.index(token) + 1
        if first != number:
            raise ConfigError(
                f"{path}: proxy user tokens number {first} and {number} are equal; "
                "give each proxy user a token of their own"
            )
    if warn:
        _warn(path, clients)
    return Credentials(clients, users)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; create it as {_FORM}, or name another file with "
            f"--credentials-file or {CREDENTIALS_FILE_VARIABLE}"
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"{path}: cannot be read ({exc.strerror}); make it readable for the server's "
            f"user, or name another file with {CREDENTIALS_FILE_VARIABLE}"
        ) from exc


def _parse(path: str, content: bytes) -> Any:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: the name {key!r} stands twice; remove one")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=no_twins)
    except json.JSONDecodeError as exc:
        # Not str(exc.doc): that is the file.
        where = f"line {exc.lineno} column {exc.colno}"
        raise ConfigError(f"{path}: not JSON ({exc.msg}, {where}); write {_FORM}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path}: not JSON in UTF-8; write {_FORM}") from None


def _check_form(path: str, content: Any) -> tuple[dict[str, Any], list[Any]]:
    if not isinstance(content, dict) or set(content) != {"clients", "proxy_users"}:
        raise ConfigError(
            f'{path}: must be an object with exactly "clients" and "proxy_users"; write {_FORM}'
        )
    clients, users = content["clients"], content["proxy_users"]
    if not isinstance(clients, dict):
        raise ConfigError(f'{path}: "clients" must map names to secrets; write {_FORM}')
    if not isinstance(users, list):
        raise ConfigError(f'{path}: "proxy_users" must be a list of tokens; write {_FORM}')
    return clients, users


def _check_secret(path: str, what: str, secret: Any) -> None:
    if not isinstance(secret, str) or not secret:
        raise ConfigError(f"{path}: {what} is empty or not a string; set a long random one")
    if not is_secret(secret):
        raise ConfigError(
            f"{path}: {what} must be printable ASCII without spaces, at most 4096 characters; "
            "set a long random one"
        )


def _warn(path: str, clients: dict[str, str]) -> None:
    by_secret: dict[str, list[str]] = {}
    for name, secret in clients.items():
        by_secret.setdefault(secret, []).append(name)
    for names in by_secret.values():
        if len(names) > 1:
            _log.warning("clients share a secret file=%s clients=%s", path, ",".join(names))
    if os.name == "posix" and os.stat(path).st_mode & stat.S_IROTH:
        _log.warning("credentials file is readable by others file=%s mend=chmod-600", path)
