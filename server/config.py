"""The server's settings: environment, then default; `python -m server` sets the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from server.errors import ConfigError
from server.wire import (
    DEFAULT_MAX_WINDOW_BYTES,
    DEFAULT_PING_INTERVAL_S,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
)

CREDENTIALS_FILE_VARIABLE = "HTTP_NETWORK_RELAY_CREDENTIALS_FILE"
PING_INTERVAL_VARIABLE = "HTTP_NETWORK_RELAY_PING_INTERVAL"
MAX_WINDOW_VARIABLE = "HTTP_NETWORK_RELAY_MAX_WINDOW"
DEFAULT_CREDENTIALS_FILE = "credentials.json"

# Below this a loaded machine would take its own delays for silence.
_SHORTEST_PING_INTERVAL_S = 0.05
# Longer than any proxy or NAT keeps an idle connection.
_LONGEST_PING_INTERVAL_S = 3600.0
# A leg's whole budget: a larger window could never be granted.
LEG_BUDGET_BYTES = MAX_WINDOW_BYTES


@dataclass(frozen=True)
class Config:
    """All settings of one server; call validate() before use."""

    credentials_file: str = DEFAULT_CREDENTIALS_FILE
    ping_interval_s: float = DEFAULT_PING_INTERVAL_S
    max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the environment. Never raises: what is not a number fails in validate()."""
        env = os.environ if environ is None else environ
        return cls(
            env.get(CREDENTIALS_FILE_VARIABLE) or DEFAULT_CREDENTIALS_FILE,
            _number(env.get(PING_INTERVAL_VARIABLE), DEFAULT_PING_INTERVAL_S),
            _whole(env.get(MAX_WINDOW_VARIABLE), DEFAULT_MAX_WINDOW_BYTES),
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


def _number(text: str | None, default: float) -> float:
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        return math.nan  # Fails every comparison in validate().


def _whole(text: str | None, default: int) -> int:
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        return -1
