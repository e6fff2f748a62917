"""Every code that a peer, a person or an operator may see, and what follows from each.

The codes are those of docs/protocol.md, "Codes"; the local ones stand last.
"""

from __future__ import annotations

from typing import NamedTuple

CLOSE_NORMAL = 1000
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_NOT_UTF8 = 1007
CLOSE_REVOKED = 1008
CLOSE_TOO_BIG = 1009
CLOSE_INTERNAL_ERROR = 1011
CLOSE_RESTART = 1012
CLOSE_REPLACED_BY_SELF = 4408
CLOSE_REPLACED_BY_OTHER = 4409

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


class HttpAnswer(NamedTuple):
    status: int
    retry_after_s: int | None = None


# code -> how it is answered before the upgrade.
HTTP_ANSWERS: dict[str, HttpAnswer] = {
    "bad_request": HttpAnswer(400),
    "unauthorized": HttpAnswer(401),
    "forbidden": HttpAnswer(403),
    "not_found": HttpAnswer(404),
    "version_unsupported": HttpAnswer(426),
    "head_timeout": HttpAnswer(408),
    # As long as a client waits anyway whose secret is wrong.
    "too_many": HttpAnswer(429, 30),
    "head_too_large": HttpAnswer(431),
    "internal_error": HttpAnswer(500),
    "wrong_worker": HttpAnswer(500),
    # Legs last for hours, but a failing peer gives its slot back within seconds.
    "busy": HttpAnswer(503, 5),
    # A rolling restart has the next worker listening already.
    "server_restart": HttpAnswer(503, 1),
}

# These ends take their turn behind the channel's data (docs/protocol.md, "Order").
ENDS_IN_TURN = frozenset({"user_gone", "target_reset"})
