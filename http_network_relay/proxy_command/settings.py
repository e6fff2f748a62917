"""The proxy command's settings: flag > environment > default."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from http_network_relay.dial.connect import make_context
from http_network_relay.dial.endpoint import Endpoint, parse_server_url
from http_network_relay.settings import (
    OneLineParser,
    max_window,
    ping_interval,
    read_secret_file,
    resume_timeout,
)
from http_network_relay.wire.constants import HOST_PATTERN, NAME_PATTERN, USERS_PATH
from http_network_relay.wire.controls import is_secret, matches
from http_network_relay.wire.errors import RelayError

DEFAULT_SERVER_URL = "ws://127.0.0.1:8000" + USERS_PATH


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
    parser.add_argument("target_ip", help="address or name, as seen from the client")
    parser.add_argument("target_port", help="1 to 65535")
    parser.add_argument("protocol", nargs="?", default="tcp", help="tcp (the default)")
    parser.add_argument(
        "--server_url",
        "--server-url",
        dest="server_url",
        metavar="URL",
        help="[HTTP_NETWORK_RELAY_SERVER_URL] such as https://relay.example",
    )
    parser.add_argument(
        "--secret-key",
        metavar="TOKEN",
        help="[HTTP_NETWORK_RELAY_SECRET_KEY] `ps` shows it to other users: prefer the file",
    )
    parser.add_argument(
        "--secret-key-file", metavar="FILE", help="a file that holds the token and nothing else"
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
        help="[HTTP_NETWORK_RELAY_MAX_WINDOW] per direction, default 4194304",
    )
    parser.add_argument(
        "--resume-timeout",
        metavar="SECONDS",
        help="[HTTP_NETWORK_RELAY_RESUME_TIMEOUT] try so long to come back when the connection is"
        " lost, default 120, 0: not at all",
    )
    return parser


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the checked settings: flag > environment > default."""
    args = make_parser().parse_args(argv)
    # Five digits: int() raises for thousands of them.
    port = int(args.target_port) if matches(r"[0-9]{1,5}", args.target_port) else 0
    if not 1 <= port <= 65535:
        raise RelayError("usage", f"target_port must be 1 to 65535, not {args.target_port!r}")
    if args.protocol == "udp":
        raise RelayError("usage", "the protocol udp is not supported yet, only tcp is")
    if args.protocol != "tcp":
        raise RelayError("usage", f"protocol must be tcp, not {args.protocol!r}")
    if not matches(NAME_PATTERN, args.target_host_identifier):
        raise RelayError("usage", "target_host_identifier is not a client's name")
    if not matches(HOST_PATTERN, args.target_ip):
        raise RelayError("usage", "target_ip is not an address or a name")
    url = args.server_url or environ.get("HTTP_NETWORK_RELAY_SERVER_URL") or DEFAULT_SERVER_URL
    endpoint = parse_server_url(url, USERS_PATH)
    if args.secret_key_file is not None and args.secret_key is None:
        token = read_secret_file("--secret-key-file", args.secret_key_file)
    else:
        token = args.secret_key or environ.get("HTTP_NETWORK_RELAY_SECRET_KEY", "")
    if not is_secret(token):
        raise RelayError(
            "usage",
            "--secret-key-file, --secret-key or HTTP_NETWORK_RELAY_SECRET_KEY must give a token"
            " of printable ASCII without spaces",
        )
    return Settings(
        client=args.target_host_identifier,
        host=args.target_ip,
        port=port,
        endpoint=endpoint,
        token=token,
        context=make_context(args.ca_file) if endpoint.is_tls else None,
        ping_interval_s=ping_interval(args.ping_interval, environ),
        max_window_bytes=max_window(args.max_window, environ),
        grace_s=resume_timeout(args.resume_timeout, environ),
    )
