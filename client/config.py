"""The client's settings: flag > environment > default."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from http_network_relay.dial.connect import make_context
from http_network_relay.dial.endpoint import Endpoint, parse_server_url
from http_network_relay.rules.shadowed import find_shadowed
from http_network_relay.rules.target import AccessRule, RuleError, TargetRule
from http_network_relay.settings import (
    MAX_WINDOW,
    PING_INTERVAL,
    RESUME_TIMEOUT,
    SERVER_URL,
    OneLineParser,
    Setting,
    add_settings,
    merge_flags,
    read_secret,
)
from http_network_relay.wire.constants import CLIENTS_PATH, NAME_PATTERN
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import ConfigError

CLIENT_NAME = Setting("--client-name", "name", "its name in the server's credentials")
CLIENT_SECRET = Setting(
    "--client-secret", "secret", "its secret; `ps` shows it: prefer the file", is_secret=True
)
ALLOW = Setting(
    "--allow",
    "target",
    "dial this target and no other: 127.0.0.1:22, 10.0.0.0/8:5432, *.lan:443. May stand several"
    " times; in the variable, separated by spaces",
)
SETTINGS = (SERVER_URL, CLIENT_NAME, CLIENT_SECRET, PING_INTERVAL, MAX_WINDOW, RESUME_TIMEOUT)


@dataclass(frozen=True)
class ClientConfig:
    """What one client runs with. Checked; its repr has no secret."""

    endpoint: Endpoint
    name: str
    secret: str = field(repr=False)
    context: ssl.SSLContext | None = None
    ping_interval_s: float = PING_INTERVAL.number({})
    max_window_bytes: int = int(MAX_WINDOW.number({}))
    grace_s: int = int(RESUME_TIMEOUT.number({}))
    # Targets that may be dialled; empty: all.
    allow: tuple[TargetRule, ...] = ()
    is_verbose: bool = False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m client`."""
    parser = OneLineParser(
        prog="client",
        description="Keep a WebSocket open to the server and dial targets for its proxy users.",
    )
    add_settings(parser, SETTINGS)
    add_settings(parser, [ALLOW], action="append")
    parser.add_argument("--ca-file", metavar="FILE", help="a private CA to trust as well")
    parser.add_argument("--verbose", action="store_true", help="log debugging details")
    return parser


def read_config(argv: Sequence[str], environ: Mapping[str, str]) -> ClientConfig:
    """Return the checked settings; raises RelayError (usage) that names flag and variable."""
    args = make_parser().parse_args(argv)
    given = merge_flags(args, SETTINGS, environ)
    name = CLIENT_NAME.text(given)
    if not matches(NAME_PATTERN, name):
        raise ConfigError(
            "--client-name (HTTP_NETWORK_RELAY_CLIENT_NAME) must be 1 to 128 printable ASCII"
            " characters without spaces and colons"
        )
    endpoint = parse_server_url(SERVER_URL.text(given), CLIENTS_PATH)
    return ClientConfig(
        endpoint=endpoint,
        name=name,
        secret=read_secret(CLIENT_SECRET, args, given),
        context=make_context(args.ca_file) if endpoint.is_tls else None,
        ping_interval_s=PING_INTERVAL.number(given),
        max_window_bytes=int(MAX_WINDOW.number(given)),
        grace_s=int(RESUME_TIMEOUT.number(given)),
        allow=_allow(args.allow, environ.get(ALLOW.variable)),
        is_verbose=args.verbose,
    )


def _allow(flags: Sequence[str] | None, variable: str | None) -> tuple[TargetRule, ...]:
    texts = flags or (variable or "").split()
    if variable is not None and not texts:
        # The program that should fill the variable has failed. No rule at all would let the
        # client dial everything.
        raise ConfigError(
            "HTTP_NETWORK_RELAY_ALLOW (--allow) is set but empty; write targets such as"
            " 127.0.0.1:22 into it, or unset it to dial whatever the server asks for"
        )
    try:
        rules = tuple(TargetRule.parse(text) for text in texts)
        found = find_shadowed([AccessRule("*", rule, rule.text) for rule in rules])
        if found is not None:
            shadowed, other = (rules[index].text for index in found)
            raise RuleError(f"{shadowed} has no effect beside {other}; remove one of them")
    except RuleError as exc:
        raise ConfigError(f"--allow (HTTP_NETWORK_RELAY_ALLOW): {exc}") from exc
    return rules
