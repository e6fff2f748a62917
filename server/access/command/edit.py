"""What `server credentials` changes in the credentials file's content. No I/O.

The content is the file's JSON as plain dicts and lists, so that an edit keeps all other parts as
they were written. An edit changes the content in place. After EditError the caller MUST NOT write
the content: a part of it may have changed.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import date
from typing import Any

from http_network_relay.rules.target import AccessRule
from http_network_relay.wire.errors import ConfigError
from server.access.client_names import ClientNames
from server.access.credentials import (
    HASH_PREFIX,
    Kind,
    digest_in_file,
    id_of,
    user_name_of,
    utc_today,
)

EVERYTHING_RULE = "*:*:*"
# 256 bits: one hash of such a secret is enough, since nobody can try all secrets.
_SECRET_BYTES = 32

Data = dict[str, Any]


class EditError(ConfigError):
    """The file does not allow this change; the message says what to do instead."""


def add_client(data: Data, name: str, expires: date | None) -> str:
    """Add a client; return its secret."""
    if name in data["clients"]:
        raise EditError(f"there is a client {name}: `rotate {name}` gives it a new secret")
    secret, hashed = _new_secret()
    data["clients"][name] = _entry({"secrets": [hashed]}, expires)
    return secret


def add_user(data: Data, name: str, allow: list[str], expires: date | None) -> str:
    """Add a proxy user with rules; return their token."""
    users = _named_users(data)
    if name in users:
        raise EditError(f"there is a proxy user {name}: `rotate {name}` gives them a new token")
    secret, hashed = _new_secret()
    users[name] = _entry({"secrets": [hashed], "allow": allow}, expires)
    return secret


def rotate(
    data: Data, name: str, kind: Kind | None, expires: date | str | None, *, drop_old: bool
) -> tuple[Kind, str, list[str]]:
    """Add a secret; return the kind, the secret, and the ids of those that stay valid.

    `expires` is a new last day, "never", or None for no change.
    """
    kind = kind_of(data, name, kind)
    entries = data["clients"] if kind == "client" else _named_users(data)
    entry = entries[name]
    if isinstance(entry, str):
        # The secret stays plain, since its strength is unknown: a hash would hide a weak secret.
        entry = entries[name] = {"secrets": [entry]}
    secret, hashed = _new_secret()
    old = [] if drop_old else entry["secrets"]
    entry["secrets"] = [*old, hashed]
    if expires == "never":
        entry.pop("expires", None)
    elif expires is not None:
        entry["expires"] = str(expires)
    if date.fromisoformat(entry.get("expires", "9999-12-31")) < utc_today():
        raise EditError(f"{kind} {name} is expired: add --expires DATE, or --expires never")
    return kind, secret, [id_of(digest_in_file(each)) for each in old]


def revoke(data: Data, names: list[str], kind: Kind | None) -> list[str]:
    """Remove entries, and the rules that match no client any more; return one line each."""
    done = []
    for name in names:
        found = kind_of(data, name, kind)
        if found == "client":
            del data["clients"][name]
        elif isinstance(data["proxy_users"], list):
            tokens = data["proxy_users"]
            data["proxy_users"] = [each for each in tokens if user_name_of(each) != name]
        else:
            del data["proxy_users"][name]
        done.append(f"revoked {found} {name}")
    return done + _drop_rules(data)


def revoke_secret(data: Data, name: str, kind: Kind | None, secret_id: str) -> list[str]:
    """Remove one secret of several; return a line about it."""
    kind = kind_of(data, name, kind)
    old = secrets_of(data, kind, name)
    kept = [each for each in old if not digest_in_file(each).hex().startswith(secret_id)]
    if len(kept) == len(old):
        ids = ", ".join(id_of(digest_in_file(each)) for each in old)
        raise EditError(f"{kind} {name} has no secret {secret_id}; it has {ids}")
    if not kept:
        raise EditError(
            f"{secret_id} is the only secret of {kind} {name}: `revoke {name}` removes them, "
            f"`rotate {name} --drop-old` replaces it"
        )
    entries = data["clients"] if kind == "client" else _named_users(data)
    entries[name]["secrets"] = kept
    return [f"revoked secret {secret_id} of {kind} {name}"]


def _drop_rules(data: Data) -> list[str]:
    """Remove rules that match no client any more: the file would not load with such a rule."""
    done = []
    users, clients = data["proxy_users"], ClientNames(data["clients"])
    for name, entry in users.items() if isinstance(users, dict) else ():
        kept = [rule for rule in entry["allow"] if _is_of_use(rule, clients)]
        if not kept:
            raise EditError(
                f"proxy user {name} would be left without a rule: name {name} too to revoke "
                "both, or keep the client and its rules with `rotate --drop-old`"
            )
        done += [
            f"removed rule {rule} of user {name}" for rule in entry["allow"] if rule not in kept
        ]
        entry["allow"] = kept
    return done


def _is_of_use(text: str, clients: ClientNames) -> bool:
    rule = AccessRule.parse(text)
    return rule.client == "*" or clients.has_match(rule)


def kind_of(data: Data, name: str, kind: Kind | None) -> Kind:
    """Return the kind of this name; raises EditError if no entry has the name, or two have."""
    found: list[Kind] = []
    if name in data["clients"]:
        found.append("client")
    if name in user_names(data):
        found.append("user")
    if kind is not None:
        found = [each for each in found if each == kind]
    if not found:
        raise EditError(f"there is no {kind or 'client or user'} {name}; `list` shows all names")
    if len(found) > 1:
        raise EditError(f"{name} is a client and a user: add --client or --user")
    return found[0]


def user_names(data: Data) -> list[str]:
    """Return the proxy users' names; those of the short form as logs have them."""
    users = data["proxy_users"]
    return list(dict.fromkeys(map(user_name_of, users))) if isinstance(users, list) else list(users)


def secrets_of(data: Data, kind: Kind, name: str) -> list[str]:
    """Return the secrets of an entry as they stand in the file."""
    users = data["proxy_users"]
    if kind == "user" and isinstance(users, list):
        return [token for token in users if user_name_of(token) == name]
    entry = data["clients"][name] if kind == "client" else users[name]
    return [entry] if isinstance(entry, str) else list(entry["secrets"])


def _named_users(data: Data) -> Data:
    """Return the proxy users by name; tokens of the short form become such, with their names.

    The users keep their rights, and their logins stay valid.
    """
    users = data["proxy_users"]
    if isinstance(users, list):
        data["proxy_users"] = {
            name: {"secrets": secrets_of(data, "user", name), "allow": [EVERYTHING_RULE]}
            for name in user_names(data)
        }
    named: Data = data["proxy_users"]
    return named


def _new_secret() -> tuple[str, str]:
    """Return a new secret, and its text in the file."""
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return secret, HASH_PREFIX + hashlib.sha256(secret.encode("ascii")).hexdigest()


def _entry(entry: Data, expires: date | None) -> Data:
    return entry if expires is None else {**entry, "expires": str(expires)}
