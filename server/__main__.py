"""The command `server`: sets the environment from its flags, and runs gunicorn.

`server credentials ...` is a command of its own, which edits the credentials file.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from gunicorn.app.wsgiapp import WSGIApplication

from http_network_relay.wire.constants import DEFAULT_MAX_WINDOW_BYTES, DEFAULT_PING_INTERVAL_S
from server.access.command.main import main as credentials_main
from server.addresses import DEFAULT_TRUSTED_PROXIES
from server.config import (
    AUDIT_LOG_VARIABLE,
    CREDENTIALS_FILE_VARIABLE,
    DEFAULT_CREDENTIALS_FILE,
    LIMITS,
    MAX_WINDOW_VARIABLE,
    PING_INTERVAL_VARIABLE,
    TRUSTED_PROXIES_VARIABLE,
)


class _Gunicorn(WSGIApplication):  # type: ignore[misc]
    """gunicorn with our settings and no command line of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        super().__init__(prog="server")

    def load_config(self) -> None:
        self.chdir()
        self.load_config_from_module_name_or_filename("python:server.gunicorn_conf")
        for name, value in self._settings.items():
            self.cfg.set(name, value)
        self.app_uri = self.cfg.wsgi_app


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="server",
        description="Run the relay that clients and proxy users connect to.",
        epilog="`server credentials` is a command of its own: it says who may connect.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    add("--threads", type=int, default=64, help="WebSockets served at once (default: %(default)s)")
    add(
        "--credentials-file",
        metavar="FILE",
        help=f"who may connect (${CREDENTIALS_FILE_VARIABLE}, default: {DEFAULT_CREDENTIALS_FILE})",
    )
    add(
        "--ping-interval",
        metavar="SECONDS",
        help=f"between pings on each leg (${PING_INTERVAL_VARIABLE}, "
        f"default: {DEFAULT_PING_INTERVAL_S:g})",
    )
    add(
        "--max-window",
        metavar="BYTES",
        help="unacknowledged bytes per tunnel and direction, at most "
        f"(${MAX_WINDOW_VARIABLE}, default: {DEFAULT_MAX_WINDOW_BYTES})",
    )
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """The settings of docs/limits.md."""
    add = parser.add_argument
    add(
        "--trusted-proxies",
        metavar="LIST",
        help="whose X-Forwarded-For counts: addresses, networks, unix "
        f"(${TRUSTED_PROXIES_VARIABLE}, default: {DEFAULT_TRUSTED_PROXIES})",
    )
    add(
        "--audit-log",
        metavar="FILE",
        help=f"write who did what as JSON lines; - is stdout (${AUDIT_LOG_VARIABLE}, default: off)",
    )
    for limit in LIMITS:
        off = "; 0: no limit" if limit.can_be_off else ""
        add(
            limit.flag,
            metavar="NUMBER",
            dest=limit.field,
            help=f"{limit.help}, {limit.unit}{off} (${limit.variable}, default: {limit.default:g})",
        )


def main(argv: list[str] | None = None) -> None:
    """Run until a signal ends it."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["credentials"]:
        raise SystemExit(credentials_main(argv[1:]))
    args = _parser().parse_args(argv)
    if not 0 <= args.port <= 65535:
        _parser().error("--port must be from 0 to 65535")
    for variable, value in (
        (CREDENTIALS_FILE_VARIABLE, args.credentials_file),
        (PING_INTERVAL_VARIABLE, args.ping_interval),
        (MAX_WINDOW_VARIABLE, args.max_window),
        (TRUSTED_PROXIES_VARIABLE, args.trusted_proxies),
        (AUDIT_LOG_VARIABLE, args.audit_log),
        *((limit.variable, getattr(args, limit.field)) for limit in LIMITS),
    ):
        if value is not None:
            os.environ[variable] = value
    host = f"[{args.host}]" if ":" in args.host else args.host
    _Gunicorn({"bind": f"{host}:{args.port}", "threads": args.threads}).run()


if __name__ == "__main__":
    main()
