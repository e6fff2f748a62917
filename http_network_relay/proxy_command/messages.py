"""What the proxy command says on stderr: one line, with a hint."""

from __future__ import annotations

import contextlib
import os

from http_network_relay.wire.errors import RelayError

# What to try, for errors whose sentence does not say it already.
HINTS = {
    "unauthorized": "check the token (--secret-key-file) with the relay's operator",
    "client_unknown": "check the name with the relay's operator",
    "client_offline": "is the device switched on and its client running?",
    "denied": "ask the relay's operator for a rule that allows it",
    "denied_by_client": "ask the device's owner: its client was started with --allow",
    "revoked": "ask the relay's operator",
    "target_refused": "does the service run there, on that port?",
    "target_unreachable": "is the address right, as seen from the device?",
    "target_timeout": "is the address right, as seen from the device, and no firewall between?",
    "target_unknown": "is the name right, as seen from the device?",
    "open_timeout": "try again; the log of the client on the device says more",
    "server_unreachable": "check the network and --server-url",
    "busy": "try again in a moment",
    "server_restart": "try again in a moment",
    "proxy_failed": "check the proxy settings (https_proxy, no_proxy)",
    "not_found": "check --server-url",
    "leg_lost": "connect again",
    "client_lost": "connect again",
    "client_replaced": "connect again",
    "client_stopped": "connect again when the client runs again",
    "target_reset": "the target's own log may say why",
    "target_lost": "connect again when the target is back",
    "protocol_error": "upgrade the older one of the relay's programs",
}


def complain(error: RelayError) -> int:
    """Say in one line on stderr what failed and what to try; return the exit code."""
    hint = HINTS.get(error.code)
    warn(f"{error}; {hint}" if hint else str(error))
    return error.exit_code


def warn(message: str) -> None:
    """Write one line to stderr, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"ssh_proxy_command.py: {message}\n".encode("utf-8", "replace"))
