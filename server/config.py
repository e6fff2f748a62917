"""The server's settings: environment, then default; `python -m server` sets the environment.

A limit is one row of LIMITS: variable, flag, unit, range, and a default with its reason.
docs/limits.md tells what reaching it looks like.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from http_network_relay.wire.constants import (
    DEFAULT_MAX_WINDOW_BYTES,
    DEFAULT_PING_INTERVAL_S,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
)
from http_network_relay.wire.errors import ConfigError
from server.addresses import DEFAULT_TRUSTED_PROXIES, parse_networks
from server.log_paths import why_not_writable

CREDENTIALS_FILE_VARIABLE = "HTTP_NETWORK_RELAY_CREDENTIALS_FILE"
PING_INTERVAL_VARIABLE = "HTTP_NETWORK_RELAY_PING_INTERVAL"
MAX_WINDOW_VARIABLE = "HTTP_NETWORK_RELAY_MAX_WINDOW"
TRUSTED_PROXIES_VARIABLE = "HTTP_NETWORK_RELAY_TRUSTED_PROXIES"
AUDIT_LOG_VARIABLE = "HTTP_NETWORK_RELAY_AUDIT_LOG"
DEFAULT_CREDENTIALS_FILE = "credentials.json"

# Below this a loaded machine would take its own delays for silence.
_SHORTEST_PING_INTERVAL_S = 0.05
# Longer than any proxy or NAT keeps an idle connection.
_LONGEST_PING_INTERVAL_S = 3600.0
# A leg's whole budget: a larger window could never be granted.
LEG_BUDGET_BYTES = MAX_WINDOW_BYTES
# "Never" for whoever counts: no limit needs to be larger.
_MOST = 1_000_000
_YEAR_S = 366 * 24 * 3600.0
# Below it the credit would come in crumbs: a message for a few bytes.
_SLOWEST_BYTES_PER_S = 16 * 1024


class Limit(NamedTuple):
    """One setting that is a number. 0 turns it off, where `can_be_off`."""

    field: str
    variable: str
    flag: str
    unit: str
    lowest: float
    highest: float
    default: float
    is_whole: bool
    can_be_off: bool
    help: str


# A limit that is on by default has its default from what honest use needs; one that only an
# operator can know is off.
LIMITS = (
    # A person who mistypes, or a program with an old secret that comes every 30 s, stays below.
    Limit(
        "failed_logins",
        "HTTP_NETWORK_RELAY_FAILED_LOGINS",
        "--failed-logins",
        "a minute",
        1,
        _MOST,
        10,
        True,
        True,
        "failed logins of one name from one address before 429",
    ),
    # An office behind one address may have several of them.
    Limit(
        "failed_logins_by_address",
        "HTTP_NETWORK_RELAY_FAILED_LOGINS_BY_ADDRESS",
        "--failed-logins-by-address",
        "a minute",
        1,
        _MOST,
        50,
        True,
        True,
        "failed logins of all names from one address before 429",
    ),
    # --threads bounds all users together.
    Limit(
        "tunnels_per_user",
        "HTTP_NETWORK_RELAY_TUNNELS_PER_USER",
        "--tunnels-per-user",
        "tunnels",
        1,
        _MOST,
        0,
        True,
        True,
        "open tunnels of a proxy user at most",
    ),
    # The budget of a leg's windows gives 256.
    Limit(
        "tunnels_per_client",
        "HTTP_NETWORK_RELAY_TUNNELS_PER_CLIENT",
        "--tunnels-per-client",
        "tunnels",
        1,
        _MOST,
        0,
        True,
        True,
        "open tunnels of a client at most",
    ),
    # Ten seconds' worth may come at once: a tool that fans out over a fleet opens dozens. A loop
    # that fails and tries again without a pause is cut down to it.
    Limit(
        "opens_per_s",
        "HTTP_NETWORK_RELAY_OPENS_PER_SECOND",
        "--opens-per-second",
        "a second",
        0.1,
        _MOST,
        50,
        False,
        True,
        "tunnels that a proxy user may open; as many again may be resumed",
    ),
    Limit(
        "bytes_per_s",
        "HTTP_NETWORK_RELAY_BYTES_PER_SECOND",
        "--bytes-per-second",
        "bytes a second",
        _SLOWEST_BYTES_PER_S,
        10**12,
        0,
        True,
        True,
        "stream bytes of a proxy user, each way",
    ),
    # A shell that somebody left open over lunch is no fault.
    Limit(
        "idle_timeout_s",
        "HTTP_NETWORK_RELAY_IDLE_TIMEOUT",
        "--idle-timeout",
        "seconds",
        1,
        _YEAR_S,
        0,
        False,
        True,
        "end a tunnel that carried no byte for so long",
    ),
    Limit(
        "max_age_s",
        "HTTP_NETWORK_RELAY_MAX_AGE",
        "--max-age",
        "seconds",
        1,
        _YEAR_S,
        0,
        False,
        True,
        "end a tunnel that is so old",
    ),
    # Nobody holds a descriptor or a slot for longer without a word; a slow TLS link gets there.
    Limit(
        "handshake_timeout_s",
        "HTTP_NETWORK_RELAY_HANDSHAKE_TIMEOUT",
        "--handshake-timeout",
        "seconds",
        0.5,
        60,
        10,
        False,
        False,
        "from accept to a whole request head, and from a proxy user's upgrade to its first message",
    ),
    # nginx allows for half of it by default.
    Limit(
        "max_header_bytes",
        "HTTP_NETWORK_RELAY_MAX_HEADER_BYTES",
        "--max-header-bytes",
        "bytes",
        1024,
        65536,
        16384,
        True,
        False,
        "the largest request head",
    ),
)


@dataclass(frozen=True)
class Config:
    """All settings of one server; call validate() before use."""

    credentials_file: str = DEFAULT_CREDENTIALS_FILE
    ping_interval_s: float = DEFAULT_PING_INTERVAL_S
    max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES
    # Who may say by X-Forwarded-For whom it speaks for: addresses, CIDRs, and `unix`.
    trusted_proxies: str = DEFAULT_TRUSTED_PROXIES
    # Where the audit lines go: a path, `-` for stdout, nowhere if empty.
    audit_log: str = ""
    # The rest as in LIMITS.
    failed_logins: int = 10
    failed_logins_by_address: int = 50
    tunnels_per_user: int = 0
    tunnels_per_client: int = 0
    opens_per_s: float = 50.0
    bytes_per_s: int = 0
    idle_timeout_s: float = 0.0
    max_age_s: float = 0.0
    handshake_timeout_s: float = 10.0
    max_header_bytes: int = 16384

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the environment. Never raises: what is not a number fails in validate()."""
        env = os.environ if environ is None else environ
        limits: dict[str, Any] = {}
        for limit in LIMITS:
            read: Callable[[str | None, Any], Any] = _whole if limit.is_whole else _number
            limits[limit.field] = read(env.get(limit.variable), limit.default)
        return cls(
            env.get(CREDENTIALS_FILE_VARIABLE) or DEFAULT_CREDENTIALS_FILE,
            _number(env.get(PING_INTERVAL_VARIABLE), DEFAULT_PING_INTERVAL_S),
            _whole(env.get(MAX_WINDOW_VARIABLE), DEFAULT_MAX_WINDOW_BYTES),
            env.get(TRUSTED_PROXIES_VARIABLE) or DEFAULT_TRUSTED_PROXIES,
            env.get(AUDIT_LOG_VARIABLE) or "",
            **limits,
        )

    def validate(self) -> None:
        """Raise ConfigError that names the setting to change."""
        if not _SHORTEST_PING_INTERVAL_S <= self.ping_interval_s <= _LONGEST_PING_INTERVAL_S:
            raise ConfigError(
                f"{PING_INTERVAL_VARIABLE} (--ping-interval) must be a number of seconds from "
                f"{_SHORTEST_PING_INTERVAL_S:g} to {_LONGEST_PING_INTERVAL_S:g}; "
                f"leave it out for {DEFAULT_PING_INTERVAL_S:g}"
            )
        if not MIN_WINDOW_BYTES <= self.max_window_bytes <= LEG_BUDGET_BYTES:
            raise ConfigError(
                f"{MAX_WINDOW_VARIABLE} (--max-window) must be a whole number of bytes from "
                f"{MIN_WINDOW_BYTES} to {LEG_BUDGET_BYTES}; "
                f"leave it out for {DEFAULT_MAX_WINDOW_BYTES}"
            )
        for limit in LIMITS:
            _check(limit, getattr(self, limit.field))
        try:
            parse_networks(self.trusted_proxies)
        except ValueError as exc:
            raise ConfigError(
                f"{TRUSTED_PROXIES_VARIABLE} (--trusted-proxies): {exc}; write addresses and "
                "networks in CIDR form, with commas, and `unix` for a socket file"
            ) from None
        problem = why_not_writable(self.audit_log)
        if problem is not None:
            raise ConfigError(
                f"{AUDIT_LOG_VARIABLE} (--audit-log): {self.audit_log} cannot be written "
                f"({problem}); name a file that the server's user may write, in a folder where it "
                "may make files, or - for stdout"
            )


def _check(limit: Limit, value: float) -> None:
    if (value == 0 and limit.can_be_off) or limit.lowest <= value <= limit.highest:
        return
    kind = "a whole number" if limit.is_whole else "a number"
    off = ", or 0 for no limit" if limit.can_be_off else ""
    raise ConfigError(
        f"{limit.variable} ({limit.flag}) must be {kind} ({limit.unit}) from {limit.lowest:g} to "
        f"{limit.highest:.15g}{off}; leave it out for {limit.default:g}"
    )


def _number(text: str | None, default: float) -> float:
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        return math.nan  # Fails every comparison in validate().


def _whole(text: str | None, default: float) -> int:
    if not text:
        return int(default)
    try:
        return int(text)
    except ValueError:
        return -1
