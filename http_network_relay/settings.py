"""Tables of settings: one row has the flag, variable, default, range and help of a setting.

The command line, the reading, the errors and docs/reference.md follow the rows. A flag has
precedence over its variable, and the variable over the default.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from http_network_relay.wire.constants import (
    DEFAULT_MAX_WINDOW_BYTES,
    DEFAULT_PING_INTERVAL_S,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
)
from http_network_relay.wire.controls import is_secret, matches
from http_network_relay.wire.errors import ConfigError, RelayError


class Setting(NamedTuple):
    """One setting: a number if `highest` is not 0, else a text."""

    # Both spellings, if there are two. The flag also names the variable.
    flag: str
    # The unit of a number; the word for a text.
    kind: str
    help: str
    default: str = ""
    lowest: float = 0
    highest: float = 0
    is_whole: bool = True
    # The meaning of 0, if 0 is allowed below `lowest`.
    zero: str = ""
    # May also stand in a file, which the flag with "-file" behind it names.
    is_secret: bool = False

    @property
    def name(self) -> str:
        """The attribute of argparse's result."""
        return self.flag.split()[0][2:].replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"HTTP_NETWORK_RELAY_{self.name.upper()}"

    @property
    def range(self) -> str:
        """The numbers that are allowed."""
        zero = f", or 0 for {self.zero}" if self.zero else ""
        return f"{self.lowest:g} to {self.highest:.15g} {self.kind}{zero}"

    def text(self, given: Mapping[str, str]) -> str:
        """Return the variable's value, or the default; an empty variable counts as unset."""
        return given.get(self.variable) or self.default

    def number(self, given: Mapping[str, str]) -> float:
        """Return the number; raises ConfigError that names flag and variable."""
        text = self.text(given)
        try:
            number = float(text if not self.is_whole or matches("[0-9]{1,15}", text) else "nan")
        except ValueError:
            number = float("nan")  # Outside of every range.
        if not self.lowest <= number <= self.highest and (number or not self.zero):
            kind = "a whole number" if self.is_whole else "a number"
            kind = f"must be {kind}, {self.range}, not {text!r}"
            raise ConfigError(f"{self.flag} ({self.variable}) {kind}")
        return number


SERVER_URL = Setting(
    "--server_url --server-url", "URL", "such as https://relay.example", "ws://127.0.0.1:8000"
)
# Below 0.05 s, the delays of a loaded machine would count as silence. No proxy and no NAT keeps
# an idle connection for longer than an hour.
PING_INTERVAL = Setting(
    "--ping-interval", "seconds", "between pings", f"{DEFAULT_PING_INTERVAL_S:g}", 0.05, 3600, False
)
MAX_WINDOW = Setting(
    "--max-window",
    "bytes",
    "largest window of a tunnel and direction",
    str(DEFAULT_MAX_WINDOW_BYTES),
    MIN_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
)
# 120 s: enough for a laptop that changes its network, and a server that is deployed slowly.
RESUME_TIMEOUT = Setting(
    "--resume-timeout", "seconds", "a tunnel waits so long for a new leg", "120", 0, 24 * 3600
)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage above it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_help_formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise RelayError("usage", f"{message}; --help lists all arguments")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """As wide as the terminal. argparse's own way to know that takes a start 3 ms of imports."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (AttributeError, ValueError, OSError):  # closed, or no terminal
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


def add_settings(
    parser: argparse.ArgumentParser, rows: Iterable[Setting], action: str = "store"
) -> None:
    """Add the flags of the rows; a secret gets one more flag, for its file."""
    for row in rows:
        about = f"{row.help}, {row.range}" if row.highest else row.help
        about += f" ({row.variable}, default: {row.default or 'none'})"
        word = row.kind.upper().split()[0]
        parser.add_argument(*row.flag.split(), metavar=word, action=action, help=about)
        if row.is_secret:
            about = f"a file that holds the {row.kind} and nothing else"
            parser.add_argument(f"{row.flag}-file", metavar="FILE", help=about)


def merge_flags(
    args: argparse.Namespace, rows: Iterable[Setting], environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment with the flags in the place of their variables."""
    flags = {row.variable: getattr(args, row.name) for row in rows}
    return {**environ, **{variable: text for variable, text in flags.items() if text}}


def read_secret(row: Setting, args: argparse.Namespace, given: Mapping[str, str]) -> str:
    """Return a secret: flag > file > variable. Raises ConfigError, which quotes none."""
    path, secret = getattr(args, f"{row.name}_file"), row.text(given)
    if path is not None and getattr(args, row.name) is None:
        try:
            with open(path, encoding="utf-8") as file:
                secret = file.read(64 * 1024).strip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "not a text file"
            raise ConfigError(f"{row.flag}-file {path} cannot be read: {reason}") from exc
    if not is_secret(secret):
        raise ConfigError(
            f"{row.flag}-file, {row.flag} or {row.variable} must give a {row.kind} of printable"
            " ASCII without spaces"
        )
    return secret
