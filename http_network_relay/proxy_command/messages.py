"""What the proxy command says on stderr: one line, with a hint."""

from __future__ import annotations

import contextlib
import os

from http_network_relay.wire.codes import find_code
from http_network_relay.wire.errors import RelayError


def complain(error: RelayError) -> int:
    """Say in one line on stderr what failed and what to try; return the exit code."""
    row = find_code(error.code)
    hint = f"; {row.hint}" if row is not None and row.hint else ""
    warn(f"{error}{hint}")
    return error.exit_code


def warn(message: str) -> None:
    """Write one line to stderr, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"ssh_proxy_command.py: {message}\n".encode("utf-8", "replace"))
