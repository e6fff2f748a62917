"""Settings that the client and the proxy command read alike: flag > environment > default."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from http_network_relay.wire.constants import (
    DEFAULT_MAX_WINDOW_BYTES,
    DEFAULT_PING_INTERVAL_S,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
)
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import RelayError

# Enough for a laptop that changes its network, and a server that is deployed slowly.
DEFAULT_GRACE_S = 120
_LONGEST_GRACE_S = 24 * 3600


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage above it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_help_formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise RelayError("usage", f"{message}; --help lists all arguments")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """As wide as the terminal. argparse's own way to know that takes a start 3 ms of imports."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (AttributeError, ValueError, OSError):  # closed, or no terminal
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


def read_secret_file(flag: str, path: str) -> str:
    """Return a file's content without the line end; raises RelayError (usage)."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(64 * 1024).strip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "not a text file"
        raise RelayError("usage", f"{flag} {path} cannot be read: {reason}") from exc


def ping_interval(flag: str | None, environ: Mapping[str, str]) -> float:
    """Return the ping interval in seconds, 0.05 to 3600."""
    text = flag or environ.get("HTTP_NETWORK_RELAY_PING_INTERVAL") or str(DEFAULT_PING_INTERVAL_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise RelayError(
            "usage",
            "--ping-interval (HTTP_NETWORK_RELAY_PING_INTERVAL) must be 0.05 to 3600 seconds,"
            f" not {text!r}",
        )
    return seconds


def max_window(flag: str | None, environ: Mapping[str, str]) -> int:
    """Return the largest window of a tunnel and direction, in bytes."""
    text = flag or environ.get("HTTP_NETWORK_RELAY_MAX_WINDOW") or str(DEFAULT_MAX_WINDOW_BYTES)
    # The length first: int() raises for thousands of digits.
    if (
        not text.isdecimal()
        or len(text) > 10
        or not MIN_WINDOW_BYTES <= int(text) <= MAX_WINDOW_BYTES
    ):
        raise RelayError(
            "usage",
            f"--max-window (HTTP_NETWORK_RELAY_MAX_WINDOW) must be {MIN_WINDOW_BYTES} to"
            f" {MAX_WINDOW_BYTES} bytes, not {text!r}",
        )
    return int(text)


def resume_timeout(flag: str | None, environ: Mapping[str, str]) -> int:
    """Return for how many seconds a tunnel is kept without a leg; 0: not at all."""
    text = flag or environ.get("HTTP_NETWORK_RELAY_RESUME_TIMEOUT") or str(DEFAULT_GRACE_S)
    if not matches(r"[0-9]{1,6}", text) or int(text) > _LONGEST_GRACE_S:
        raise RelayError(
            "usage",
            "--resume-timeout (HTTP_NETWORK_RELAY_RESUME_TIMEOUT) must be 0 to"
            f" {_LONGEST_GRACE_S} whole seconds, not {text!r}",
        )
    return int(text)
