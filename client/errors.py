"""Every error that a person or an operator may see: its code, and what follows from it.

One table: code -> exit code of the proxy command, and whether a new try may help.
The codes are those of docs/protocol.md, "Codes"; the local ones stand last.
"""

from __future__ import annotations

EXIT_CLEAN = 0
EXIT_TUNNEL_LOST = 1
EXIT_USAGE = 2
EXIT_UNAUTHORIZED = 3
EXIT_CLIENT_OFFLINE = 4
EXIT_TARGET = 5
EXIT_SERVER = 6
EXIT_DENIED = 7
EXIT_SIGNAL_BASE = 128
# What EPIPE on stdout counts as, on every system: 128 + SIGPIPE.
EXIT_SIGPIPE = 141

# code -> (exit code, a new try may help)
ERRORS: dict[str, tuple[int, bool]] = {
    # HTTP answers before the upgrade.
    "bad_request": (EXIT_SERVER, False),
    "unauthorized": (EXIT_UNAUTHORIZED, False),
    "forbidden": (EXIT_UNAUTHORIZED, False),
    "not_found": (EXIT_SERVER, False),
    "version_unsupported": (EXIT_SERVER, False),
    "head_timeout": (EXIT_SERVER, True),
    "too_many": (EXIT_SERVER, True),
    "head_too_large": (EXIT_SERVER, False),
    "wrong_worker": (EXIT_SERVER, False),
    "busy": (EXIT_SERVER, True),
    "server_restart": (EXIT_SERVER, True),
    # `refused`
    "client_unknown": (EXIT_CLIENT_OFFLINE, False),
    "client_offline": (EXIT_CLIENT_OFFLINE, True),
    "user_full": (EXIT_SERVER, True),
    "client_full": (EXIT_SERVER, True),
    "too_many_opens": (EXIT_SERVER, True),
    "no_open": (EXIT_SERVER, True),
    "unknown_tunnel": (EXIT_TUNNEL_LOST, False),
    "denied": (EXIT_DENIED, False),
    "denied_by_client": (EXIT_DENIED, False),
    "protocol_unsupported": (EXIT_USAGE, False),
    "target_invalid": (EXIT_USAGE, False),
    "target_refused": (EXIT_TARGET, False),
    "target_unreachable": (EXIT_TARGET, False),
    "target_timeout": (EXIT_TARGET, False),
    "target_unknown": (EXIT_TARGET, False),
    # `reset` and `detached`
    "protocol_error": (EXIT_TUNNEL_LOST, False),
    "user_gone": (EXIT_TUNNEL_LOST, False),
    "target_reset": (EXIT_TUNNEL_LOST, False),
    "target_lost": (EXIT_TUNNEL_LOST, False),
    "client_stopped": (EXIT_TUNNEL_LOST, False),
    "superseded": (EXIT_TUNNEL_LOST, False),
    "revoked": (EXIT_UNAUTHORIZED, False),
    "idle_timeout": (EXIT_TUNNEL_LOST, False),
    "max_age": (EXIT_TUNNEL_LOST, False),
    "user_lost": (EXIT_TUNNEL_LOST, False),
    "client_lost": (EXIT_TUNNEL_LOST, True),
    "client_replaced": (EXIT_TUNNEL_LOST, True),
    # Local: seen by this end alone.
    "usage": (EXIT_USAGE, False),
    "server_unreachable": (EXIT_SERVER, True),
    "tls_failed": (EXIT_SERVER, True),
    "proxy_failed": (EXIT_SERVER, True),
    "not_a_relay": (EXIT_SERVER, True),
    "server_failed": (EXIT_SERVER, True),
    "leg_lost": (EXIT_TUNNEL_LOST, True),
    "open_timeout": (EXIT_TARGET, True),
    "internal_error": (EXIT_TUNNEL_LOST, False),
}


class RelayError(Exception):
    """Something failed that has a code; `str()` is a sentence for a person."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def exit_code(self) -> int:
        """The proxy command's exit code; an unknown code of a newer peer counts as a loss."""
        return ERRORS.get(self.code, (EXIT_TUNNEL_LOST, False))[0]

    @property
    def is_retryable(self) -> bool:
        """Whether a new try may help."""
        return ERRORS.get(self.code, (EXIT_TUNNEL_LOST, False))[1]


class DialError(Exception):
    """A TCP dial failed: `kind` is refused, unreachable, timeout, unknown, denied or cancelled."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
