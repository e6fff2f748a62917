"""What may stand in the credentials file (docs/access.md). No I/O.

A content is in force as it stands or is refused whole, with the line and the fix: what
would have no effect is an error, never ignored. No message quotes a secret, nor a name whose value
has the wrong shape: the secret may stand in the place of the name. The line tells which it is.
`credentials.schema.json` beside this file says the same of the form, for editors.
"""

from __future__ import annotations

import logging
from datetime import date
from typing import NamedTuple, NoReturn

from http_network_relay.rules.shadowed import find_shadowed
from http_network_relay.rules.target import AccessRule, RuleError
from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import is_secret, matches
from http_network_relay.wire.errors import ConfigError
from server.access.client_names import ClientNames
from server.access.credentials import (
    HASH_PREFIX,
    Credentials,
    Entry,
    Kind,
    digest_in_file,
    users_of_tokens,
    utc_today,
)
from server.access.json_lines import JsonError, Node, parse_json

_log = logging.getLogger("http_network_relay.server.credentials")

SHORT_FORM = '{"clients": {"client-name": "SECRET"}, "proxy_users": ["TOKEN"]}'
_NEW_SECRET = "set a long random one"
_HASHED = HASH_PREFIX + "[0-9a-f]{64}"


class CredentialsError(ConfigError):
    """The file is wrong: `what` says it without file and line."""

    def __init__(self, path: str, line: int, what: str) -> None:
        super().__init__(f"{path}: line {line}: {what}")
        self.what = what


def parse_credentials(
    path: str, content: bytes, *, warn: bool = False, today: date | None = None
) -> Credentials:
    """Return what the content says; raises CredentialsError. `path` is for messages only."""
    form = _Form(path, utc_today() if today is None else today)
    try:
        credentials = form.read(parse_json(content))
    except JsonError as exc:
        raise CredentialsError(path, exc.line, f"{exc.message}; write {SHORT_FORM}") from None
    if warn:
        for level, doubt in form.doubts:
            _log.log(level, "%s", doubt)
    return credentials


class _Owner(NamedTuple):
    kind: Kind
    name: str
    # Where the secret stands, in words.
    place: str
    is_short: bool


class _Form:
    """One reading of one file, top down; the first fault ends it."""

    def __init__(self, path: str, today: date) -> None:
        self._path = path
        self._today = today
        self._owners: dict[bytes, list[_Owner]] = {}
        self._client_names = ClientNames(())
        self._name_rules: list[str] = []
        # Level and line of what is in force as it stands, but perhaps not meant.
        self.doubts: list[tuple[int, str]] = []

    def read(self, root: Node) -> Credentials:
        keys = root.keys if isinstance(root.value, dict) else {}
        if set(keys) != {"clients", "proxy_users"}:
            unknown = [line for key, line in keys.items() if key not in ("clients", "proxy_users")]
            self._fail(
                unknown[0] if unknown else root.line,
                f'must be an object with exactly "clients" and "proxy_users"; write {SHORT_FORM}',
            )
        clients, users = root.value["clients"], root.value["proxy_users"]
        if not isinstance(clients.value, dict):
            self._fail(clients.line, f'"clients" must map names to secrets; write {SHORT_FORM}')
        read_clients = [
            self._client(name, clients.keys[name], node) for name, node in clients.value.items()
        ]
        self._client_names = ClientNames(clients.value)
        read_users = self._users(users)
        self._doubt_secrets()
        if self._name_rules:
            self._doubt(
                logging.INFO,
                "rules by name trust the clients' resolvers",
                f"rules={len(self._name_rules)} first={self._name_rules[0]}",
            )
        return Credentials(read_clients, read_users)

    def _fail(self, line: int, what: str) -> NoReturn:
        raise CredentialsError(self._path, line, what)

    def _doubt(self, level: int, event: str, fields: str) -> None:
        self.doubts.append((level, f"{event} file={self._path} {fields}"))

    # Entries.

    def _client(self, name: str, line: int, node: Node) -> Entry:
        self._check_name("client", name, line)
        if isinstance(node.value, dict):
            return self._entry("client", name, node, ("secrets", "expires"))
        if not isinstance(node.value, str):
            self._fail(node.line, f"the secret of this client is not a string; {_NEW_SECRET}")
        owner = _Owner("client", name, f"the secret of client {name}", is_short=True)
        return Entry(name, (self._secret(owner, node),))

    def _users(self, users: Node) -> list[Entry]:
        if isinstance(users.value, list):
            for number, node in enumerate(users.value, 1):
                place = f"proxy user token number {number}"
                self._secret(_Owner("user", "", place, is_short=True), node)
            return users_of_tokens(node.value for node in users.value)
        if not isinstance(users.value, dict):
            self._fail(
                users.line,
                '"proxy_users" must be a list of tokens, or map names to objects with "secrets" '
                f'and "allow"; write {SHORT_FORM}',
            )
        entries = []
        for name, node in users.value.items():
            self._check_name("proxy user", name, users.keys[name])
            if not isinstance(node.value, dict):
                self._fail(
                    node.line,
                    "a proxy user must be an object behind a name; write "
                    '"NAME": {"secrets": ["TOKEN"], "allow": ["*:*:*"]}',
                )
            entries.append(self._entry("user", name, node, ("secrets", "allow", "expires")))
        return entries

    def _check_name(self, what: str, name: str, line: int) -> None:
        if not matches(NAME_PATTERN, name):
            self._fail(
                line,
                f"the name of this {what} must be 1 to 128 printable ASCII characters without "
                "spaces and colons; rename it",
            )

    def _entry(self, kind: Kind, name: str, node: Node, known: tuple[str, ...]) -> Entry:
        what = "client" if kind == "client" else "proxy user"
        about, nameless = f"{what} {name}", f"this {what}"
        for key, line in node.keys.items():
            if key not in known:
                # Not quoted: it may be a secret in the wrong place.
                listed = ", ".join(f'"{each}"' for each in known)
                self._fail(line, f"{nameless} has an unknown key; it may have {listed}")
        fix = "list at least one, or remove the entry: nobody could log in"
        secrets = self._list(nameless, node, "secrets", fix)
        digests = []
        for number, each in enumerate(secrets, 1):
            place = f"secret number {number} of {about}"
            digests.append(self._secret(_Owner(kind, name, place, is_short=False), each))
        rules = self._rules(about, node) if "allow" in known else None
        return Entry(name, tuple(digests), rules, self._expires(about, node))

    def _list(self, about: str, node: Node, key: str, fix: str) -> list[Node]:
        found = node.value.get(key, Node([], node.line))
        if not isinstance(found.value, list) or not found.value:
            self._fail(found.line, f'{about} has no list "{key}"; {fix}')
        nodes: list[Node] = found.value
        return nodes

    def _expires(self, about: str, node: Node) -> date | None:
        found = node.value.get("expires")
        if found is None:
            return None
        try:
            # The pattern, as fromisoformat() knows other forms since Python 3.11.
            if not matches(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", found.value):
                raise ValueError
            day = date.fromisoformat(found.value)
        except (TypeError, ValueError):
            self._fail(
                found.line,
                f'{about} has an "expires" that is no date; write its last day (UTC) as '
                '"2027-01-31", or leave it out',
            )
        if day < self._today:
            self._doubt(logging.WARNING, f"{about} is expired and refused", f"expires={day}")
        return day

    # Secrets.

    def _secret(self, owner: _Owner, node: Node) -> bytes:
        text, place = node.value, owner.place
        if not isinstance(text, str) or not text:
            self._fail(node.line, f"{place} is empty or not a string; {_NEW_SECRET}")
        if not is_secret(text):
            self._fail(
                node.line,
                f"{place} must be printable ASCII without spaces, at most 4096 characters; "
                f"{_NEW_SECRET}",
            )
        if text.startswith(HASH_PREFIX) and not matches(_HASHED, text):
            self._fail(
                node.line,
                f"{place} is not whole: 64 hex digits in lower case follow {HASH_PREFIX}; let "
                "`server credentials` write it",
            )
        digest = digest_in_file(text)
        owners = self._owners.setdefault(digest, [])
        for other in owners:
            # Only what the short form always allowed: clients that share a secret.
            is_allowed = other.is_short and owner.is_short and "client" in (other.kind, owner.kind)
            if not is_allowed:
                self._fail(
                    node.line,
                    f"{other.place} and {place} are equal; give each its own, or remove one",
                )
        owners.append(owner)
        return digest

    def _doubt_secrets(self) -> None:
        for owners in self._owners.values():
            clients = ",".join(owner.name for owner in owners if owner.kind == "client")
            if len(owners) > 1:
                users = "" if all(owner.kind == "client" for owner in owners) else " and a user"
                self._doubt(logging.WARNING, f"clients{users} share a secret", f"clients={clients}")

    # Rules.

    def _rules(self, about: str, node: Node) -> tuple[AccessRule, ...]:
        nodes = self._list(
            about, node, "allow", 'list what it may open, such as "lab-*:127.0.0.1:22", or '
            '"*:*:*" for everything',
        )  # fmt: skip
        rules = [self._rule(about, each) for each in nodes]
        self._name_rules += [rule.text for rule in rules if rule.target.is_name]
        found = find_shadowed(rules)
        if found is not None:
            shadowed, other = found
            self._fail(
                nodes[shadowed].line,
                f"{about}: the rule {rules[shadowed].text} has no effect beside "
                f"{rules[other].text}; remove one of them",
            )
        return tuple(rules)

    def _rule(self, about: str, node: Node) -> AccessRule:
        try:
            if not isinstance(node.value, str):
                raise RuleError('a rule is a string such as "lab-*:127.0.0.1:22"')
            rule = AccessRule.parse(node.value)
        except RuleError as exc:
            self._fail(node.line, f"{about}: {exc}")
        # The star alone is no mistyped name, and may stand before the first client does.
        if rule.client != "*" and not self._client_names.has_match(rule):
            self._fail(
                node.line,
                f"{about}: no client is named {rule.client}, so the rule {rule.text} has no "
                "effect; add the client first, or remove the rule",
            )
        return rule
