"""Every code that a peer, a person or an operator may read, and what follows from the code.

One table for all three programs. docs/protocol.md, "Codes", says when each code is sent.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, NamedTuple


class CloseCode(IntEnum):
    """Close codes (docs/protocol.md, "Close codes")."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    NOT_UTF8 = 1007
    REVOKED = 1008
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    RESTART = 1012
    REPLACED_BY_SELF = 4408
    REPLACED_BY_OTHER = 4409


# Exit codes of the proxy command.
EXIT_CLEAN = 0
EXIT_TUNNEL_LOST = 1
EXIT_USAGE = 2
EXIT_UNAUTHORIZED = 3
EXIT_CLIENT_OFFLINE = 4
EXIT_TARGET = 5
EXIT_SERVER = 6
EXIT_DENIED = 7
EXIT_SIGNAL_BASE = 128
# EPIPE on stdout counts as 128 + SIGPIPE on every system.
EXIT_SIGPIPE = 141

# Which programs may say a code on the wire: server, client, proxy command.
_S, _C, _SC = ("server",), ("client",), ("server", "client")
_SP, _CP = ("server", "proxy command"), ("client", "proxy command")
_ALL = ("server", "client", "proxy command")
_AGAIN = "try again in a moment"
_CONNECT = "connect again"


class _Row(NamedTuple):
    """The properties of a code, as the class Code explains them."""

    text: str
    exit_code: int
    said_by: tuple[str, ...] = ()
    hint: str = ""
    is_retryable: bool = False
    http_status: int = 0
    retry_after_s: int = 0
    takes_turn: bool = False


class Code(str, Enum):
    """A code: a `str` on the wire and in logs, with its properties.

    Attributes:
        exit_code: How the proxy command exits.
        said_by: The programs that may say the code on the wire; empty for a local code.
        hint: What a proxy user can try; empty if the sentence says enough.
        is_retryable: Whether a new try may help.
        http_status: The HTTP status before the upgrade; 0 if there is none.
        retry_after_s: The value of Retry-After; 0 if there is none.
        takes_turn: Whether the end waits behind the channel's data (docs/protocol.md, "Order").
    """

    exit_code: int
    said_by: tuple[str, ...]
    hint: str
    is_retryable: bool
    http_status: int
    retry_after_s: int
    takes_turn: bool

    def __new__(cls, *row: Any) -> Code:
        """Make a member from its row, which Enum passes field by field."""
        self = str.__new__(cls, row[0])
        self._value_ = row[0]
        for name, value in _Row(*row)._asdict().items():
            if name != "text":
                setattr(self, name, value)
        return self

    # Enum's own would show the member's name in log lines.
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]

    # fmt: off
    # HTTP answers before the upgrade.
    BAD_REQUEST = _Row("bad_request", EXIT_SERVER, _S, http_status=400)
    UNAUTHORIZED = _Row("unauthorized", EXIT_UNAUTHORIZED, _S,
        "check the token (--secret-key-file) with the relay's operator", http_status=401)
    FORBIDDEN = _Row("forbidden", EXIT_UNAUTHORIZED, _S, http_status=403)
    NOT_FOUND = _Row("not_found", EXIT_SERVER, _S, "check --server-url", http_status=404)
    VERSION_UNSUPPORTED = _Row("version_unsupported", EXIT_SERVER, _S, http_status=426)
    HEAD_TIMEOUT = _Row("head_timeout", EXIT_SERVER, _S, is_retryable=True, http_status=408)
    # A client whose secret is wrong waits as long anyway.
    TOO_MANY = _Row("too_many", EXIT_SERVER, _S, is_retryable=True, http_status=429,
        retry_after_s=30)
    HEAD_TOO_LARGE = _Row("head_too_large", EXIT_SERVER, _S, http_status=431)
    WRONG_WORKER = _Row("wrong_worker", EXIT_SERVER, _S, http_status=500)
    # Legs last for hours, but a failing peer gives its slot back within seconds.
    BUSY = _Row("busy", EXIT_SERVER, _SC, _AGAIN, is_retryable=True, http_status=503,
        retry_after_s=5)
    # A rolling restart has the next worker listening already.
    SERVER_RESTART = _Row("server_restart", EXIT_SERVER, _S, _AGAIN, is_retryable=True,
        http_status=503, retry_after_s=1)
    # `refused`
    CLIENT_UNKNOWN = _Row("client_unknown", EXIT_CLIENT_OFFLINE, _S,
        "check the name with the relay's operator")
    CLIENT_OFFLINE = _Row("client_offline", EXIT_CLIENT_OFFLINE, _S,
        "is the device switched on and its client running?", is_retryable=True)
    USER_FULL = _Row("user_full", EXIT_SERVER, _S, is_retryable=True)
    CLIENT_FULL = _Row("client_full", EXIT_SERVER, _S, is_retryable=True)
    TOO_MANY_OPENS = _Row("too_many_opens", EXIT_SERVER, _S, is_retryable=True)
    NO_OPEN = _Row("no_open", EXIT_SERVER, _S, is_retryable=True)
    UNKNOWN_TUNNEL = _Row("unknown_tunnel", EXIT_TUNNEL_LOST, _C)
    DENIED = _Row("denied", EXIT_DENIED, _S, "ask the relay's operator for a rule that allows it")
    DENIED_BY_CLIENT = _Row("denied_by_client", EXIT_DENIED, _C,
        "ask the device's owner: its client was started with --allow")
    PROTOCOL_UNSUPPORTED = _Row("protocol_unsupported", EXIT_USAGE, _C)
    TARGET_INVALID = _Row("target_invalid", EXIT_USAGE, _SC)
    TARGET_REFUSED = _Row("target_refused", EXIT_TARGET, _C,
        "does the service run there, on that port?")
    TARGET_UNREACHABLE = _Row("target_unreachable", EXIT_TARGET, _C,
        "is the address right, as seen from the device?")
    TARGET_TIMEOUT = _Row("target_timeout", EXIT_TARGET, _C,
        "is the address right, as seen from the device, and no firewall between?")
    TARGET_UNKNOWN = _Row("target_unknown", EXIT_TARGET, _C,
        "is the name right, as seen from the device?")
    # `reset` and `detached`
    PROTOCOL_ERROR = _Row("protocol_error", EXIT_TUNNEL_LOST, _ALL,
        "upgrade the older one of the relay's programs")
    USER_GONE = _Row("user_gone", EXIT_TUNNEL_LOST, _SP, takes_turn=True)
    TARGET_RESET = _Row("target_reset", EXIT_TUNNEL_LOST, _C, "the target's own log may say why",
        takes_turn=True)
    TARGET_LOST = _Row("target_lost", EXIT_TUNNEL_LOST, _C, "connect again when the target is back")
    CLIENT_STOPPED = _Row("client_stopped", EXIT_TUNNEL_LOST, _C,
        "connect again when the client runs again")
    SUPERSEDED = _Row("superseded", EXIT_TUNNEL_LOST, _C)
    REVOKED = _Row("revoked", EXIT_UNAUTHORIZED, _S, "ask the relay's operator")
    IDLE_TIMEOUT = _Row("idle_timeout", EXIT_TUNNEL_LOST, _S)
    MAX_AGE = _Row("max_age", EXIT_TUNNEL_LOST, _S)
    USER_LOST = _Row("user_lost", EXIT_TUNNEL_LOST, _S)
    CLIENT_LOST = _Row("client_lost", EXIT_TUNNEL_LOST, _S, _CONNECT, is_retryable=True)
    CLIENT_REPLACED = _Row("client_replaced", EXIT_TUNNEL_LOST, _S, _CONNECT, is_retryable=True)
    # A bug of the program that says so; in an HTTP answer, of the server.
    INTERNAL_ERROR = _Row("internal_error", EXIT_TUNNEL_LOST, _CP, http_status=500)
    # Local codes, never on the wire.
    USAGE = _Row("usage", EXIT_USAGE)
    SERVER_UNREACHABLE = _Row("server_unreachable", EXIT_SERVER,
        hint="check the network and --server-url", is_retryable=True)
    TLS_FAILED = _Row("tls_failed", EXIT_SERVER, is_retryable=True)
    PROXY_FAILED = _Row("proxy_failed", EXIT_SERVER,
        hint="check the proxy settings (https_proxy, no_proxy)", is_retryable=True)
    NOT_A_RELAY = _Row("not_a_relay", EXIT_SERVER, is_retryable=True)
    SERVER_FAILED = _Row("server_failed", EXIT_SERVER, is_retryable=True)
    LEG_LOST = _Row("leg_lost", EXIT_TUNNEL_LOST, hint=_CONNECT, is_retryable=True)
    OPEN_TIMEOUT = _Row("open_timeout", EXIT_TARGET,
        hint="try again; the log of the client on the device says more", is_retryable=True)
    # fmt: on


def takes_turn(text: str) -> bool:
    """Whether an end of this code waits behind the channel's data."""
    row = find_code(text)
    return row is not None and row.takes_turn


def find_code(text: str) -> Code | None:
    """Return the row of a code; None for a code of a newer peer."""
    # Not Code(text): an error costs more than a look-up.
    return Code._value2member_map_.get(text)  # type: ignore[return-value]
