"""Who may connect, and what proxy users may open. Secrets are kept as digests only. No I/O.

server/access/form.py makes a Credentials of the file. A changed file makes a new one, and
is_valid() tells which logins of the old one are still valid.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import Literal

from http_network_relay.rules.target import AccessRule, Host, RuleError, canonical_host
from http_network_relay.wire.controls import is_secret

_log = logging.getLogger("http_network_relay.server.credentials")

Kind = Literal["client", "user"]
HASH_PREFIX = "sha256:"
_HASHED = re.compile(HASH_PREFIX + "([0-9a-f]{64})")
# Answer of may_open() for a user of the short form, whom no rule limits.
EVERYTHING = "*"
_ID_DIGITS = 8
# No secret has this digest. Fills up the digests of a name that has fewer than another one.
_NO_DIGEST = b"\0" * 32


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 of a secret as it is presented."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def digest_in_file(text: str) -> bytes:
    """Return the digest of a secret as it stands in the file: plain, or `sha256:<hex>`."""
    hashed = _HASHED.fullmatch(text)
    return bytes.fromhex(hashed[1]) if hashed else digest_of(text)


def id_of(digest: bytes) -> str:
    """Return the secret's id for logs and commands: eight digits of its SHA-256."""
    return digest.hex()[:_ID_DIGITS]


def user_name_of(token: str) -> str:
    """Return the name of a proxy user of the short form (docs/protocol.md)."""
    return f"token-{id_of(digest_in_file(token))}"


@dataclass(frozen=True)
class Entry:
    """One client or proxy user of the file. `allow` None: no rule limits it (short form)."""

    name: str
    digests: tuple[bytes, ...] = field(repr=False)
    allow: tuple[AccessRule, ...] | None = None
    expires: date | None = None

    def is_expired(self, today: date) -> bool:
        """Whether its last day is over."""
        return self.expires is not None and today > self.expires


@dataclass(frozen=True)
class Login:
    """A successful login, and the digest of its secret."""

    kind: Kind
    name: str
    digest: bytes = field(repr=False)

    @property
    def secret_id(self) -> str:
        """The secret's id, as logs and `credentials revoke` have it."""
        return id_of(self.digest)


def users_of_tokens(tokens: Iterable[str]) -> list[Entry]:
    """Return the proxy users of the short form. Tokens of one id, if ever, are one user."""
    by_name: dict[str, list[bytes]] = {}
    for token in tokens:
        by_name.setdefault(user_name_of(token), []).append(digest_in_file(token))
    return [Entry(name, tuple(digests)) for name, digests in by_name.items()]


def utc_today() -> date:
    """Return the date that `expires` is compared with."""
    return datetime.now(timezone.utc).date()


class Credentials:
    """The names and secrets that are accepted. Immutable; any thread may ask.

    A login costs as many comparisons for an unknown name as for a wrong secret, each in constant
    time. `today` gives the date in UTC.
    """

    def __init__(
        self,
        clients: Iterable[Entry],
        users: Iterable[Entry],
        today: Callable[[], date] = utc_today,
    ) -> None:
        self._clients = {entry.name: entry for entry in clients}
        self._users = {entry.name: entry for entry in users}
        self._today = today
        self._most = max((len(entry.digests) for entry in self._clients.values()), default=1)

    @classmethod
    def plain(cls, clients: Mapping[str, str], tokens: Iterable[str]) -> Credentials:
        """Return those of a file in the short form."""
        return cls(
            [Entry(name, (digest_in_file(secret),)) for name, secret in clients.items()],
            users_of_tokens(tokens),
        )

    def __repr__(self) -> str:
        return f"<Credentials {self.summary}>"

    @property
    def summary(self) -> str:
        """How many there are, for a log line."""
        return f"clients={len(self._clients)} proxy_users={len(self._users)}"

    def has_client(self, name: str) -> bool:
        """Whether a client of this name could ever connect."""
        return name in self._clients

    def login_client(self, name: str, secret: str) -> Login | None:
        """Return the login if `secret` is one of that client's, and the name not expired."""
        entry = self._clients.get(name)
        known = entry.digests if entry is not None else ()
        # As many for each name: the time tells neither that a name exists nor its count of secrets.
        candidates = (*known, *[_NO_DIGEST] * (self._most - len(known)))
        found = _find(secret, candidates)
        return self._let_in("client", entry, found) if entry is not None else None

    def login_user(self, token: str) -> Login | None:
        """Return the login if `token` is one of a proxy user's, who is not expired."""
        entries = [(entry, digest) for entry in self._users.values() for digest in entry.digests]
        found = _find(token, [digest for _, digest in entries])
        owners = [entry for entry, digest in entries if digest == found]
        return self._let_in("user", owners[0], found) if owners else None

    def check_client(self, name: str, secret: str) -> bool:
        """Whether login_client() returns a login."""
        return self.login_client(name, secret) is not None

    def check_user(self, token: str) -> str | None:
        """Return the name of the login of login_user()."""
        login = self.login_user(token)
        return login.name if login is not None else None

    def is_valid(self, login: Login) -> bool:
        """Whether the login would succeed now: not revoked, rotated away or expired."""
        entry = self._of_kind(login.kind).get(login.name)
        if entry is None or entry.is_expired(self._today()):
            return False
        return any(hmac.compare_digest(login.digest, digest) for digest in entry.digests)

    def may_open(self, user: str, client: str, host: Host, port: int) -> str | None:
        """Return the text of the rule that allows the target as it was asked for, or None.

        None also if the host is no host (canonical_host() says why), and if the user is
        unknown or expired.
        """
        entry = self._users.get(user)
        if entry is None or entry.is_expired(self._today()):
            return None
        try:
            host = canonical_host(host) if isinstance(host, str) else host
        except RuleError:
            return None
        if entry.allow is None:
            return EVERYTHING
        rules = (rule.text for rule in entry.allow if rule.matches(client, host, port))
        return next(rules, None)

    def _of_kind(self, kind: Kind) -> Mapping[str, Entry]:
        return self._clients if kind == "client" else self._users

    def _let_in(self, kind: Kind, entry: Entry, digest: bytes | None) -> Login | None:
        if digest is None:
            return None
        if entry.is_expired(self._today()):
            # Only for the log: the peer gets the same answer as for a wrong secret.
            _log.warning(
                "login refused reason=expired %s=%s secret=%s expired=%s "
                "fix='credentials rotate --expires'",
                *(kind, entry.name, id_of(digest), entry.expires),
            )
            return None
        return Login(kind, entry.name, digest)


def _find(presented: str, known: Iterable[bytes]) -> bytes | None:
    """Return the digest of the presented secret if `known` has it; compares with all of them."""
    if not is_secret(presented):
        return None
    digest = digest_of(presented)
    same = [hmac.compare_digest(digest, each) for each in known]
    # The text of a leaked file is never a password, not even if somebody set that text as one.
    return digest if any(same) and not presented.startswith(HASH_PREFIX) else None
