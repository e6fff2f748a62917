"""The command `server`: sets the environment from its flags, and runs gunicorn.

`server credentials ...` is a command of its own, which edits the credentials file.
"""

from __future__ import annotations

import argparse
import os
import sys

from gunicorn.app.wsgiapp import WSGIApplication

from http_network_relay.settings import add_settings
from server.access.command.main import main as credentials_main
from server.config import SETTINGS


class _Gunicorn(WSGIApplication):  # type: ignore[misc]
    """gunicorn with our settings and no command line of its own."""

    def __init__(self, settings: dict[str, str | int]) -> None:
        self._settings = settings
        super().__init__(prog="server")

    def load_config(self) -> None:
        self.chdir()
        self.load_config_from_module_name_or_filename("python:server.worker.gunicorn_settings")
        for name, value in self._settings.items():
            self.cfg.set(name, value)
        self.app_uri = self.cfg.wsgi_app


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m server`."""
    parser = argparse.ArgumentParser(
        prog="server",
        description="Run the relay that clients and proxy users connect to.",
        epilog="`server credentials` is a command of its own: it says who may connect.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    add("--threads", type=int, default=64, help="WebSockets served at once (default: %(default)s)")
    add_settings(parser, SETTINGS.values())
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run until a signal ends it."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["credentials"]:
        raise SystemExit(credentials_main(argv[1:]))
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error("--port must be from 0 to 65535")
    for row in SETTINGS.values():
        text = getattr(args, row.name)
        # An empty flag too: the variable of the flag counts as unset then.
        if text is not None:
            os.environ[row.variable] = text
    host = f"[{args.host}]" if ":" in args.host else args.host
    _Gunicorn({"bind": f"{host}:{args.port}", "threads": args.threads}).run()


if __name__ == "__main__":
    main()
