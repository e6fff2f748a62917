"""What may stand in the credentials file (docs/access.md). No I/O.

A content is in force as it stands, or is refused whole, with the line and the fix. An entry
without effect is an error, and never ignored. No message quotes a secret, nor a name whose value
has the wrong shape: the secret may stand in the place of the name. The line tells the name.
`credentials.schema.json` beside this file says the same of the form, for editors.
"""

from __future__ import annotations

import logging
from datetime import date

from http_network_relay.rules.target import AccessRule
from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import ConfigError
from server.access.client_names import ClientNames
from server.access.credentials import Credentials, Entry, Kind, users_of_tokens, utc_today
from server.access.form_rules import read_rules
from server.access.form_secrets import NEW_SECRET, FileSecrets, SecretOwner
from server.access.json_lines import JsonError, LineError, Node, parse_json

_log = logging.getLogger("http_network_relay.server.credentials")

SHORT_FORM = '{"clients": {"client-name": "SECRET"}, "proxy_users": ["TOKEN"]}'


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
    except LineError as exc:
        raise CredentialsError(path, exc.line, exc.message) from None
    if warn:
        for level, doubt in form.doubts:
            _log.log(level, "%s", doubt)
    return credentials


class _Form:
    """One reading of one file, top down; the first fault ends it with a LineError."""

    def __init__(self, path: str, today: date) -> None:
        self._path = path
        self._today = today
        self._secrets = FileSecrets()
        self._client_names = ClientNames(())
        self._name_rules: list[str] = []
        # Level and line of what is in force as it stands, but perhaps not meant.
        self.doubts: list[tuple[int, str]] = []

    def read(self, root: Node) -> Credentials:
        clients, users = self._sections(root)
        read_clients = [
            self._client(name, clients.keys[name], node) for name, node in clients.value.items()
        ]
        self._client_names = ClientNames(clients.value)
        read_users = self._users(users)
        self._doubt_shared_secrets()
        if self._name_rules:
            self._doubt(
                logging.INFO,
                "rules by name trust the clients' resolvers",
                f"rules={len(self._name_rules)} first={self._name_rules[0]}",
            )
        return Credentials(read_clients, read_users)

    def _sections(self, root: Node) -> tuple[Node, Node]:
        keys = root.keys if isinstance(root.value, dict) else {}
        if set(keys) != {"clients", "proxy_users"}:
            unknown = [line for key, line in keys.items() if key not in ("clients", "proxy_users")]
            raise LineError(
                f'must be an object with exactly "clients" and "proxy_users"; write {SHORT_FORM}',
                unknown[0] if unknown else root.line,
            )
        clients, users = root.value["clients"], root.value["proxy_users"]
        if not isinstance(clients.value, dict):
            raise LineError(
                f'"clients" must map names to secrets; write {SHORT_FORM}', clients.line
            )
        return clients, users

    def _client(self, name: str, line: int, node: Node) -> Entry:
        _check_name("client", name, line)
        if isinstance(node.value, dict):
            return self._entry("client", name, node, ("secrets", "expires"))
        if not isinstance(node.value, str):
            raise LineError(f"the secret of this client is not a string; {NEW_SECRET}", node.line)
        owner = SecretOwner("client", name, f"the secret of client {name}", is_short=True)
        return Entry(name, (self._secrets.add(owner, node),))

    def _users(self, users: Node) -> list[Entry]:
        if isinstance(users.value, list):
            for number, node in enumerate(users.value, 1):
                place = f"proxy user token number {number}"
                self._secrets.add(SecretOwner("user", "", place, is_short=True), node)
            return users_of_tokens(node.value for node in users.value)
        if not isinstance(users.value, dict):
            raise LineError(
                '"proxy_users" must be a list of tokens, or map names to objects with "secrets" '
                f'and "allow"; write {SHORT_FORM}',
                users.line,
            )
        entries = []
        for name, node in users.value.items():
            _check_name("proxy user", name, users.keys[name])
            if not isinstance(node.value, dict):
                raise LineError(
                    "a proxy user must be an object behind a name; write "
                    '"NAME": {"secrets": ["TOKEN"], "allow": ["*:*:*"]}',
                    node.line,
                )
            entries.append(self._entry("user", name, node, ("secrets", "allow", "expires")))
        return entries

    def _entry(self, kind: Kind, name: str, node: Node, known: tuple[str, ...]) -> Entry:
        what = "client" if kind == "client" else "proxy user"
        about, nameless = f"{what} {name}", f"this {what}"
        for key, line in node.keys.items():
            if key not in known:
                # Not quoted: it may be a secret in the wrong place.
                listed = ", ".join(f'"{each}"' for each in known)
                raise LineError(f"{nameless} has an unknown key; it may have {listed}", line)
        fix = "list at least one, or remove the entry: nobody could log in"
        digests = []
        for number, each in enumerate(_list(nameless, node, "secrets", fix), 1):
            place = f"secret number {number} of {about}"
            owner = SecretOwner(kind, name, place, is_short=False)
            digests.append(self._secrets.add(owner, each))
        rules = self._rules(about, node) if "allow" in known else None
        return Entry(name, tuple(digests), rules, self._expires(about, node))

    def _rules(self, about: str, node: Node) -> tuple[AccessRule, ...]:
        fix = 'list what it may open, such as "lab-*:127.0.0.1:22", or "*:*:*" for everything'
        rules = read_rules(about, _list(about, node, "allow", fix), self._client_names)
        self._name_rules += [rule.text for rule in rules if rule.target.is_name]
        return rules

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
            raise LineError(
                f'{about} has an "expires" that is no date; write its last day (UTC) as '
                '"2027-01-31", or leave it out',
                found.line,
            ) from None
        if day < self._today:
            self._doubt(logging.WARNING, f"{about} is expired and refused", f"expires={day}")
        return day

    def _doubt_shared_secrets(self) -> None:
        for owners in self._secrets.shared():
            clients = ",".join(owner.name for owner in owners if owner.kind == "client")
            users = "" if all(owner.kind == "client" for owner in owners) else " and a user"
            self._doubt(logging.WARNING, f"clients{users} share a secret", f"clients={clients}")

    def _doubt(self, level: int, event: str, fields: str) -> None:
        self.doubts.append((level, f"{event} file={self._path} {fields}"))


def _check_name(what: str, name: str, line: int) -> None:
    if not matches(NAME_PATTERN, name):
        raise LineError(
            f"the name of this {what} must be 1 to 128 printable ASCII characters without "
            "spaces and colons; rename it",
            line,
        )


def _list(about: str, node: Node, key: str, fix: str) -> list[Node]:
    found = node.value.get(key, Node([], node.line))
    if not isinstance(found.value, list) or not found.value:
        raise LineError(f'{about} has no list "{key}"; {fix}', found.line)
    nodes: list[Node] = found.value
    return nodes
