"""Slow things that the end-to-end tests begin early."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import (
    CLIENT_NAME,
    CLIENT_SECRET,
    Pipes,
    Proc,
)

OFFLINE = "switched-off"
CLIENTS = {CLIENT_NAME: CLIENT_SECRET, OFFLINE: "cs-of-a-device-that-is-switched-off"}


@dataclass(frozen=True)
class Slow:
    """Proxy commands whose end takes many seconds."""

    target_is_silent: Pipes
    client_is_silent: Pipes


@dataclass(frozen=True)
class Installation:
    """`pip install .` into an empty environment, on its way."""

    process: Proc
    bin_folder: Path
