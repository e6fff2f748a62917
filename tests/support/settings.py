"""Settings of the soak tests."""

from __future__ import annotations

import os

import pytest


def setting(name: str, default: int) -> int:
    """A size, count or duration from the environment: SOAK_<NAME>."""
    return int(os.environ.get(f"SOAK_{name}", default))


# The time limit of a soak test: hours, since the sizes above are free to choose.
LONG = pytest.mark.timeout(setting("TIMEOUT_S", 4 * 3600))
