"""The proxy command's settings: flag > environment > default."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from http_network_relay.dial.connect import make_context
from http_network_relay.dial.endpoint import Endpoint, parse_server_url
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
from http_network_relay.wire.constants import HOST_PATTERN, NAME_PATTERN, USERS_PATH
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import ConfigError

SECRET_KEY = Setting(
    "--secret-key", "token", "the token; `ps` shows it: prefer the file", is_secret=True
)
SETTINGS = (SERVER_URL, SECRET_KEY, PING_INTERVAL, MAX_WINDOW, RESUME_TIMEOUT)


class Settings(NamedTuple):
    """What one run needs. Never printed: it holds the token."""

    client: str
    host: str
    port: int
    endpoint: Endpoint
    token: str
    context: ssl.SSLContext | None
    ping_interval_s: float
    max_window_bytes: int
    grace_s: int

    @property
    def target(self) -> str:
        """The target, as messages name it."""
        return f"{self.host}:{self.port} at {self.client}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog="ssh_proxy_command.py",
        description="Carry stdin and stdout to a TCP port behind a relay's client.",
        epilog="Exit codes: 0 clean, 1 tunnel lost, 2 usage, 3 secret refused, 4 client unknown or"
        " offline, 5 target refused, 6 server unreachable or busy, 7 denied by a rule, 128+n ended"
        " by signal n.",
    )
    parser.add_argument("target_host_identifier", help="the client's name")
    parser.add_argument("target_ip", help="address or name of the target, as the client sees it")
    parser.add_argument("target_port", help="1 to 65535")
    parser.add_argument("protocol", nargs="?", default="tcp", help="tcp; may be left out")
    parser.add_argument("--ca-file", metavar="FILE", help="a private CA to trust as well")
    add_settings(parser, SETTINGS)
    return parser


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the checked settings; raises RelayError (usage)."""
    args = make_parser().parse_args(argv)
    # Five digits: int() raises for thousands of them.
    port = int(args.target_port) if matches(r"[0-9]{1,5}", args.target_port) else 0
    if not 1 <= port <= 65535:
        raise ConfigError(f"target_port must be 1 to 65535, not {args.target_port!r}")
    if args.protocol == "udp":
        raise ConfigError("the protocol udp is not supported yet, only tcp is")
    if args.protocol != "tcp":
        raise ConfigError(f"protocol must be tcp, not {args.protocol!r}")
    if not matches(NAME_PATTERN, args.target_host_identifier):
        raise ConfigError("target_host_identifier is not a client's name")
    if not matches(HOST_PATTERN, args.target_ip):
        raise ConfigError("target_ip is not an address or a name")
    given = merge_flags(args, SETTINGS, environ)
    endpoint = parse_server_url(SERVER_URL.text(given), USERS_PATH)
    return Settings(
        client=args.target_host_identifier,
        host=args.target_ip,
        port=port,
        endpoint=endpoint,
        token=read_secret(SECRET_KEY, args, given),
        context=make_context(args.ca_file) if endpoint.is_tls else None,
        ping_interval_s=PING_INTERVAL.number(given),
        max_window_bytes=int(MAX_WINDOW.number(given)),
        grace_s=int(RESUME_TIMEOUT.number(given)),
    )
