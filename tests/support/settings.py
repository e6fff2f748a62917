"""Settings of the soak tests."""

import os


def setting(name: str, default: int) -> int:
    """A size, count or duration from the environment: SOAK_<NAME>."""
    return int(os.environ.get(f"SOAK_{name}", default))
