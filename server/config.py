"""The server's settings: environment, then default; `python -m server` sets the environment.

A field of Config is a setting, and has its row as metadata. docs/limits.md tells what reaching
a limit looks like.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from http_network_relay.settings import MAX_WINDOW, PING_INTERVAL, Setting
from http_network_relay.wire.constants import MAX_WINDOW_BYTES
from http_network_relay.wire.errors import ConfigError
from server.addresses import DEFAULT_TRUSTED_PROXIES, parse_networks
from server.log_paths import why_not_writable

CREDENTIALS_FILE = Setting("--credentials-file", "file", "who may connect", "credentials.json")
TRUSTED_PROXIES = Setting(
    "--trusted-proxies",
    "addresses",
    "proxies whose X-Forwarded-For counts: addresses, networks, unix",
    DEFAULT_TRUSTED_PROXIES,
)
AUDIT_LOG = Setting("--audit-log", "file", "file for the audit log, JSON lines; -: stdout")
# A leg's whole budget: a larger window could never be granted.
LEG_BUDGET_BYTES = MAX_WINDOW_BYTES
# No limit needs to be larger.
_MOST = 1_000_000
_YEAR_S = 366 * 24 * 3600.0


def _text(row: Setting) -> str:
    return field(default=row.default, metadata={"row": row})


def _number(row: Setting) -> float:
    return field(default=row.number({}), metadata={"row": row})


def _whole(row: Setting) -> int:
    return field(default=int(row.number({})), metadata={"row": row})


def _limit(
    flag: str, unit: str, about: str, default: str, lowest: float = 1, highest: float = _MOST
) -> float:
    return _number(Setting(flag, unit, about, default, lowest, highest, False, "no limit"))


def _whole_limit(
    flag: str, unit: str, about: str, default: str, lowest: float = 1, highest: float = _MOST
) -> int:
    return _whole(Setting(flag, unit, about, default, lowest, highest, True, "no limit"))


@dataclass(frozen=True)
class Config:
    """All settings of one server; the caller MUST call validate() before use.

    A limit that only an operator can know is off by default. Each other limit has a default
    above what honest use needs.
    """

    credentials_file: str = _text(CREDENTIALS_FILE)
    ping_interval_s: float = _number(PING_INTERVAL)
    max_window_bytes: int = _whole(MAX_WINDOW)
    # Peers whose X-Forwarded-For counts: addresses, CIDRs, and `unix`.
    trusted_proxies: str = _text(TRUSTED_PROXIES)
    # The path of the audit log; `-`: stdout; empty: no audit log.
    audit_log: str = _text(AUDIT_LOG)
    # A person who mistypes, or a program with an old secret that comes every 30 s, stays below.
    failed_logins: int = _whole_limit(
        "--failed-logins",
        "logins a minute",
        "failed logins of one name from one address before 429",
        "10",
    )
    # An office behind one address may have several of them.
    failed_logins_by_address: int = _whole_limit(
        "--failed-logins-by-address",
        "logins a minute",
        "failed logins of all names from one address before 429",
        "50",
    )
    # --threads bounds all users together.
    tunnels_per_user: int = _whole_limit(
        "--tunnels-per-user", "tunnels", "open tunnels of a proxy user at most", "0"
    )
    # The budget of a leg's windows gives 256.
    tunnels_per_client: int = _whole_limit(
        "--tunnels-per-client", "tunnels", "open tunnels of a client at most", "0"
    )
    # Ten seconds' worth may come at once: a tool that fans out over a fleet opens dozens. A loop
    # that fails and tries again without a pause is slowed down to the rate.
    opens_per_s: float = _limit(
        "--opens-per-second",
        "tunnels a second",
        "new tunnels of a proxy user, who may resume as many again",
        "50",
        lowest=0.1,
    )
    bytes_per_s: int = _whole_limit(
        "--bytes-per-second",
        "bytes a second",
        "stream bytes of a proxy user, each way",
        "0",
        # Below, credit would come for a few bytes at a time, and a message with each few bytes.
        lowest=16 * 1024,
        highest=10**12,
    )
    # A shell that somebody left open over lunch is no fault.
    idle_timeout_s: float = _limit(
        "--idle-timeout", "seconds", "time without a byte until a tunnel ends", "0", 1, _YEAR_S
    )
    max_age_s: float = _limit("--max-age", "seconds", "age at which a tunnel ends", "0", 1, _YEAR_S)
    # Nobody holds a descriptor or a slot for longer without a word; a slow TLS link gets there.
    handshake_timeout_s: float = _number(
        Setting(
            "--handshake-timeout",
            "seconds",
            "from accept to a whole request head, and from a proxy user's upgrade to the first"
            " message",
            "10",
            lowest=0.5,
            highest=60,
            is_whole=False,
        )
    )
    # nginx allows for half of it by default.
    max_header_bytes: int = _whole(
        Setting("--max-header-bytes", "bytes", "largest request head", "16384", 1024, 65536)
    )
    # The error of a variable that from_env() could not read.
    problem: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the environment. Never raises: validate() tells of a variable that is wrong."""
        env = os.environ if environ is None else environ
        values: dict[str, str | float] = {}
        for name, row in SETTINGS.items():
            try:
                number = row.number(env) if row.highest else 0.0
            except ConfigError as exc:
                values.setdefault("problem", exc.message)
                continue
            whole = int(number) if row.is_whole else number
            values[name] = whole if row.highest else row.text(env)
        # Each value is of its field's type, as the field's default is.
        return cls(**values)  # type: ignore[arg-type]

    def validate(self) -> None:
        """Raise ConfigError that names the setting to change."""
        if self.problem:
            raise ConfigError(self.problem)
        try:
            parse_networks(self.trusted_proxies)
        except ValueError as exc:
            raise ConfigError(
                f"{TRUSTED_PROXIES.variable} (--trusted-proxies): {exc}; write addresses and "
                "networks in CIDR form, with commas, and `unix` for a socket file"
            ) from None
        problem = why_not_writable(self.audit_log)
        if problem is not None:
            raise ConfigError(
                f"{AUDIT_LOG.variable} (--audit-log): {self.audit_log} cannot be written "
                f"({problem}); name a file that the server's user may write, in a folder where it "
                "may make files, or - for stdout"
            )


# Config's field -> its row.
SETTINGS: dict[str, Setting] = {
    each.name: each.metadata["row"] for each in fields(Config) if each.metadata
}
