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
    DEFAULT_GRACE_S,
    OneLineParser,
    max_window,
    ping_interval,
    read_secret_file,
    resume_timeout,
)
from http_network_relay.wire.constants import (
    CLIENTS_PATH,
    DEFAULT_MAX_WINDOW_BYTES,
    DEFAULT_PING_INTERVAL_S,
    NAME_PATTERN,
)
from http_network_relay.wire.controls import is_secret, matches
from http_network_relay.wire.errors import RelayError

DEFAULT_SERVER_URL = "ws://127.0.0.1:8000" + CLIENTS_PATH


@dataclass(frozen=True)
class ClientConfig:
    """What one client runs with. Checked; its repr has no secret."""

    endpoint: Endpoint
    name: str
    secret: str = field(repr=False)
    context: ssl.SSLContext | None = None
    ping_interval_s: float = DEFAULT_PING_INTERVAL_S
    max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES
    grace_s: int = DEFAULT_GRACE_S
    # What may be dialled; empty: anything.
    allow: tuple[TargetRule, ...] = ()
    is_verbose: bool = False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m client`."""
    parser = OneLineParser(
        prog="client",
        description="Keep a WebSocket open to the server and dial targets for its proxy users.",
    )
    parser.add_argument(
        "--server_url",
        "--server-url",
        dest="server_url",
        metavar="URL",
        help="[HTTP_NETWORK_RELAY_SERVER_URL] such as https://relay.example",
    )
    parser.add_argument("--client-name", metavar="NAME", help="[HTTP_NETWORK_RELAY_CLIENT_NAME]")
    parser.add_argument(
        "--client-secret",
        metavar="SECRET",
        help="[HTTP_NETWORK_RELAY_CLIENT_SECRET] `ps` shows it to other users: prefer the file",
    )
    parser.add_argument(
        "--client-secret-file", metavar="FILE", help="a file that holds the secret and nothing else"
    )
    parser.add_argument("--ca-file", metavar="FILE", help="trust this private CA as well")
    parser.add_argument(
        "--ping-interval",
        metavar="SECONDS",
        help="[HTTP_NETWORK_RELAY_PING_INTERVAL] default 20",
    )
    parser.add_argument(
        "--max-window",
        metavar="BYTES",
        help="[HTTP_NETWORK_RELAY_MAX_WINDOW] per tunnel and direction, default 4194304",
    )
    parser.add_argument(
        "--resume-timeout",
        metavar="SECONDS",
        help="[HTTP_NETWORK_RELAY_RESUME_TIMEOUT] keep a tunnel so long when its connection is"
        " lost, default 120, 0: not at all",
    )
    parser.add_argument(
        "--allow",
        action="append",
        metavar="TARGET",
        help="[HTTP_NETWORK_RELAY_ALLOW, separated by spaces] dial this and no other: an address,"
        " a network or a name, and a port, such as 127.0.0.1:22; may stand several times",
    )
    parser.add_argument("--verbose", action="store_true", help="log debugging details")
    return parser


def read_config(argv: Sequence[str], environ: Mapping[str, str]) -> ClientConfig:
    """Return the checked settings; raises RelayError (usage) that names flag and variable."""
    args = make_parser().parse_args(argv)
    name = args.client_name or environ.get("HTTP_NETWORK_RELAY_CLIENT_NAME", "")
    if not matches(NAME_PATTERN, name):
        raise RelayError(
            "usage",
            "--client-name (HTTP_NETWORK_RELAY_CLIENT_NAME) must be 1 to 128 printable ASCII"
            " characters without spaces and colons",
        )
    url = args.server_url or environ.get("HTTP_NETWORK_RELAY_SERVER_URL") or DEFAULT_SERVER_URL
    endpoint = parse_server_url(url, CLIENTS_PATH)
    return ClientConfig(
        endpoint=endpoint,
        name=name,
        secret=_secret(args, environ),
        context=make_context(args.ca_file) if endpoint.is_tls else None,
        ping_interval_s=ping_interval(args.ping_interval, environ),
        max_window_bytes=max_window(args.max_window, environ),
        grace_s=resume_timeout(args.resume_timeout, environ),
        allow=_allow(args.allow, environ),
        is_verbose=args.verbose,
    )


def _allow(flags: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[TargetRule, ...]:
    given = environ.get("HTTP_NETWORK_RELAY_ALLOW")
    texts = flags or (given or "").split()
    if given is not None and not texts:
        # What was to fill it in has failed: that must not mean that everything may be dialled.
        raise RelayError(
            "usage",
            "HTTP_NETWORK_RELAY_ALLOW (--allow) is set but empty; write targets such as"
            " 127.0.0.1:22 into it, or unset it to dial whatever the server asks for",
        )
    try:
        rules = tuple(TargetRule.parse(text) for text in texts)
        found = find_shadowed([AccessRule("*", rule, rule.text) for rule in rules])
        if found is not None:
            covered, other = (rules[place].text for place in found)
            raise RuleError(f"{covered} has no effect beside {other}; remove one of them")
    except RuleError as exc:
        raise RelayError("usage", f"--allow (HTTP_NETWORK_RELAY_ALLOW): {exc}") from exc
    return rules


def _secret(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    if args.client_secret_file is not None and args.client_secret is None:
        secret = read_secret_file("--client-secret-file", args.client_secret_file)
    else:
        secret = args.client_secret or environ.get("HTTP_NETWORK_RELAY_CLIENT_SECRET", "")
    if not is_secret(secret):
        raise RelayError(
            "usage",
            "--client-secret-file, --client-secret or HTTP_NETWORK_RELAY_CLIENT_SECRET must give"
            " a secret of printable ASCII without spaces",
        )
    return secret
