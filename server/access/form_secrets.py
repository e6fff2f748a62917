"""The secrets of one credentials file: their form, and secrets that stand there twice. No I/O."""

from __future__ import annotations

from typing import NamedTuple

from http_network_relay.wire.controls import is_secret, matches
from server.access.credentials import HASH_PREFIX, Kind, digest_in_file
from server.access.json_lines import LineError, Node

NEW_SECRET = "set a long random one"
_HASHED = HASH_PREFIX + "[0-9a-f]{64}"


class SecretOwner(NamedTuple):
    """An entry of the file that has a secret."""

    kind: Kind
    name: str
    # Where the secret stands, in words.
    place: str
    is_short: bool


class FileSecrets:
    """All secrets of one file as digests, each with its owners."""

    def __init__(self) -> None:
        self._owners: dict[bytes, list[SecretOwner]] = {}

    def add(self, owner: SecretOwner, node: Node) -> bytes:
        """Return the digest of a secret; raises LineError, which never quotes the secret."""
        digest = _digest(owner.place, node)
        owners = self._owners.setdefault(digest, [])
        for other in owners:
            # Only what the short form always allowed: clients that share a secret.
            is_allowed = other.is_short and owner.is_short and "client" in (other.kind, owner.kind)
            if not is_allowed:
                raise LineError(
                    f"{other.place} and {owner.place} are equal; give each its own, or remove one",
                    node.line,
                )
        owners.append(owner)
        return digest

    def shared(self) -> list[list[SecretOwner]]:
        """Return the owners of each secret that has more than one."""
        return [owners for owners in self._owners.values() if len(owners) > 1]


def _digest(place: str, node: Node) -> bytes:
    text = node.value
    if not isinstance(text, str) or not text:
        raise LineError(f"{place} is empty or not a string; {NEW_SECRET}", node.line)
    if not is_secret(text):
        raise LineError(
            f"{place} must be printable ASCII without spaces, at most 4096 characters; "
            f"{NEW_SECRET}",
            node.line,
        )
    if text.startswith(HASH_PREFIX) and not matches(_HASHED, text):
        raise LineError(
            f"{place} is not whole: 64 hex digits in lower case follow {HASH_PREFIX}; let "
            "`server credentials` write it",
            node.line,
        )
    return digest_in_file(text)
