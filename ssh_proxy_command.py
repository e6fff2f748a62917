#!/usr/bin/env python3
# Generated from http_network_relay/ by .ci/amalgamate.py: edit there, `make amalgamate`.
# /// script
# requires-python = ">=3.9"
# dependencies = ["websocket-client>=1.2.3"]
# ///
"""The proxy command: carries stdin and stdout to a TCP port behind a relay's client.

    ssh -o ProxyCommand='ssh_proxy_command.py device 127.0.0.1 22 tcp \
        --server-url https://relay.example --secret-key-file ~/.relay-token' device

One file: copy it anywhere; it needs Python >= 3.9 and websocket-client. Threads: main
reads the leg and never touches stdin or stdout; pump-up carries stdin to the leg and
watches for signals and a closed stdout; pump-down writes stdout and acknowledges; the
leg's writer; the timer.
"""

from __future__ import annotations

import gc
import signal

if __name__ == "__main__":
    # A Ctrl-C during the other imports ends it without a traceback; run() takes over later.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Imports make no garbage; to look for it among them costs a start 5 ms.
    gc.disable()

import argparse
import base64
import contextlib
import enum
import errno
import functools
import ipaddress
import json
import os
import re
import select
import selectors
import socket
import ssl
import stat
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any, Literal, NamedTuple, NoReturn, Union
from urllib.parse import unquote, urlsplit

# --- http_network_relay/wire/codes.py -------------------------------------------------------------
# Every code that a peer, a person or an operator may read, and what follows from the code.
# One table for all three programs. docs/protocol.md, "Codes", says when each code is sent.


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


# --- http_network_relay/wire/errors.py ------------------------------------------------------------
# The errors of all three programs: one root, few classes.
# str() of each is a sentence for a person. The code is for programs, logs and peers; a code
# of a newer peer need not be in the table of codes.py.

DialFailure = Literal["refused", "unreachable", "timeout", "unknown", "denied", "cancelled"]


class RelayError(Exception):
    """An error that has a code."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def exit_code(self) -> int:
        """The proxy command's exit code; an unknown code counts as a lost tunnel."""
        row = find_code(self.code)
        return EXIT_TUNNEL_LOST if row is None else row.exit_code

    @property
    def is_retryable(self) -> bool:
        """Whether a new try may help."""
        row = find_code(self.code)
        return row is not None and row.is_retryable


class DialError(RelayError):
    """A dial failed. The code is that of the way to the server; the client maps `kind`."""

    def __init__(self, kind: DialFailure, message: str) -> None:
        super().__init__(Code.SERVER_UNREACHABLE, message)
        self.kind = kind


class LegError(RelayError):
    """The peer broke the leg's rules; the leg ends with `close_code`."""

    def __init__(self, message: str, close_code: int = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(Code.PROTOCOL_ERROR, message)
        self.close_code = close_code


class TunnelError(RelayError):
    """The peer broke one tunnel's rules; that tunnel is reset, the leg goes on."""

    def __init__(self, message: str, channel: int = 0, code: str = Code.PROTOCOL_ERROR) -> None:
        super().__init__(code, message)
        self.channel = channel


class ConfigError(RelayError):
    """A setting or a file is wrong; the message names the setting and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.USAGE, message)


class Refused(RelayError):
    """The server admits no leg or opens no tunnel: an HTTP answer, or `refused`."""


# --- http_network_relay/wire/constants.py ---------------------------------------------------------
# Names and numbers of the wire, version 1 (docs/protocol.md, normative), each with its reason.

SUBPROTOCOL = "http-network-relay.v1"
CLIENTS_PATH = "/ws_for_clients"
USERS_PATH = "/ws_for_ssh_proxy_command"
# Every HTTP answer of the relay has this header; the answer of a proxy does not.
RELAY_HEADER = "HTTP-Network-Relay"
RELAY_HEADER_VALUE = "v1"
INSTANCE_HEADER = "HTTP-Network-Relay-Instance"
# A user leg that will resume a tunnel names the tunnel in its request.
TUNNEL_HEADER = "HTTP-Network-Relay-Tunnel"
# A client or proxy command asks to send frames with a masking key of zero; the server agrees.
MASK_HEADER = "HTTP-Network-Relay-Mask"
MASK_ZERO = "zero"

OP_CONTINUATION = 0x0
OP_TEXT = 0x1
OP_BINARY = 0x2
OP_CLOSE = 0x8
OP_PING = 0x9
OP_PONG = 0xA
# Of a ping or pong (RFC 6455, 5.5).
MAX_PING_BYTES = 125

# A data message: large enough to spread the cost of a frame, and small enough that a
# keystroke of another tunnel waits only some milliseconds for one message.
MAX_DATA_BYTES = 64 * 1024
# Senders put this much into one message. With its header the message crosses loopback as one
# segment of 65,483 bytes, so the receiver wakes up once; the size is whole pages of a pipe.
MESSAGE_BYTES = 60 * 1024
# A control: the longest legal `open` is under 2 KiB.
MAX_CONTROL_BYTES = 4 * 1024
CHANNEL_BYTES = 4
MAX_CHANNEL = 2**32 - 1
# The longest binary message of either leg.
MAX_MESSAGE_BYTES = CHANNEL_BYTES + MAX_DATA_BYTES
# Counts travel as JSON numbers, exact up to here in every language.
MAX_COUNT = 2**53
# The first window: enough for a fast LAN. The server grants no less.
MIN_WINDOW_BYTES = 256 * 1024
# The smallest window of a receiver on a thin link: 130 ms at 1 Mbit/s.
LEAST_WINDOW_BYTES = 16 * 1024
# 4 MiB carry 320 Mbit/s over 100 ms.
DEFAULT_MAX_WINDOW_BYTES = 4 * 1024 * 1024
# The largest window that may be set, and the sum of all windows of a client leg.
MAX_WINDOW_BYTES = 64 * 1024 * 1024
# nginx cuts an idle connection after 60 s, mobile NAT after 30 s.
DEFAULT_PING_INTERVAL_S = 20.0
# A leg is given up after a silence of this many of the own ping intervals.
SILENCE_INTERVALS = 2.5
# Frames that are sent after an end (a flush, bytes before a reset) have this long.
FLUSH_S = 1.0
# A control's sentence for a person.
MAX_MESSAGE_CHARS = 500
NAME_PATTERN = r"[!-9;-~]{1,128}"  # printable ASCII without space and colon (HTTP Basic)
HOST_PATTERN = r"[!-~]{1,255}"


# --- http_network_relay/wire/frames.py ------------------------------------------------------------
# WebSocket frames made by hand (RFC 6455, 5.2 and 5.3). No I/O.

# A frame that says it is masked, but changes nothing: see docs/protocol.md, "Masking".
ZERO_KEY = bytes(4)
FIN = 0x80
MASK_BIT = 0x80


@functools.lru_cache(maxsize=256)
def _xor_table(key: int) -> bytes:
    return bytes(value ^ key for value in range(256))


def mask(data: bytearray, key: bytes) -> None:
    """Mask or unmask in place (RFC 6455, 5.3), 3-4 times as fast as the library."""
    for index, byte in enumerate(key):
        data[index::4] = data[index::4].translate(_xor_table(byte))


def frame_header(opcode: int, size: int, key: bytes | None = None) -> bytes:
    """Return the header of one whole frame, a masked one if there is a `key`."""
    bit, tail = (0, b"") if key is None else (MASK_BIT, key)
    if size < 126:
        return struct.pack("!BB", FIN | opcode, bit | size) + tail
    if size < 2**16:
        return struct.pack("!BBH", FIN | opcode, bit | 126, size) + tail
    return struct.pack("!BBQ", FIN | opcode, bit | 127, size) + tail


# --- http_network_relay/wire/controls.py ----------------------------------------------------------
# The controls of the wire (docs/protocol.md, "Controls"): parsed, checked and encoded.
# No socket, clock, thread or log here. Every control that arrives is checked field by field
# against one table and copied; unknown fields are dropped.


def _count(value: Any) -> int | None:
    # type(), since a bool is an int in Python but not on the wire.
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _whole(lowest: int, highest: int) -> Callable[[Any], int | None]:
    def check(value: Any) -> int | None:
        return value if type(value) is int and lowest <= value <= highest else None

    return check


def _flag(value: Any) -> bool | None:
    return value if type(value) is bool else None


def _matching(pattern: str) -> Callable[[Any], str | None]:
    regex = re.compile(pattern)

    def check(value: Any) -> str | None:
        return value if isinstance(value, str) and regex.fullmatch(value) else None

    return check


def _prose(value: Any) -> str | None:
    """Shorten a sentence for a person, without characters that move a terminal's cursor."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else "?" for c in value[:MAX_MESSAGE_CHARS])


class Open(NamedTuple):
    """The proxy user asks for a tunnel; the server adds `user` on the way to the client."""

    client: str
    host: str
    port: int
    protocol: str
    tunnel_id: str
    resume_token: str
    limit: int
    grace_s: int
    user: str = ""
    channel: int = 0


class Resume(NamedTuple):
    """The proxy user asks to go on with a tunnel: the fields of its Open, and the counts."""

    client: str
    host: str
    port: int
    protocol: str
    tunnel_id: str
    resume_token: str
    limit: int
    grace_s: int
    attempt: int
    received: int
    delivered: int
    user: str = ""
    channel: int = 0


class Opened(NamedTuple):
    """The client has opened the tunnel."""

    limit: int
    grace_s: int
    channel: int = 0


class Resumed(NamedTuple):
    """The client goes on with the tunnel."""

    received: int
    delivered: int
    limit: int
    channel: int = 0


class OpenRefused(NamedTuple):
    """An `open` or `resume` makes no tunnel; on the wire the type is `refused`."""

    code: str
    message: str
    channel: int = 0


class Ack(NamedTuple):
    """The receiver has delivered bytes, and its eof perhaps; the sender's new limit."""

    delivered: int
    limit: int
    eof: bool
    channel: int = 0


class Eof(NamedTuple):
    """The sender's stream has ended after `count` bytes."""

    count: int  # type: ignore[assignment]  # The wire's name hides tuple.count().
    channel: int = 0


class Reset(NamedTuple):
    """One end has ended the tunnel with an error."""

    code: str
    message: str
    channel: int = 0


class Detached(NamedTuple):
    """The other end's leg is lost; the tunnel may be resumed."""

    code: str
    channel: int = 0


class GoingAway(NamedTuple):
    """The server stops soon: peers return within `spread_ms`. Concerns the leg, no channel."""

    spread_ms: int
    channel: int = 0


Opening = Union[Open, Resume]
Control = Union[Open, Resume, Opened, Resumed, OpenRefused, Ack, Eof, Reset, Detached, GoingAway]

_Check = Callable[[Any], Any]
# A field has the same check in each type. A check returns the value, or None for a bad one.
_CHECKS: dict[str, _Check] = {
    "client": _matching(NAME_PATTERN),
    "host": _matching(HOST_PATTERN),
    "port": _whole(1, 65535),
    "protocol": _matching(r"[a-z]{1,16}"),
    "tunnel_id": _matching(r"[0-9a-f]{32}"),
    "resume_token": _matching(r"[0-9a-f]{64}"),
    "limit": _count,
    "grace_s": _whole(0, 10**6),
    "attempt": _count,
    "received": _count,
    "delivered": _count,
    "eof": _flag,
    "count": _count,
    "code": _matching(r"[a-z][a-z_]{0,63}"),
    "message": _prose,
    "spread_ms": _whole(0, 10**6),
}
# The server adds this field on the way to a client.
_user = _matching(r"[!-~]{1,128}")
TYPES: dict[str, type[Any]] = {
    "open": Open,
    "opened": Opened,
    "refused": OpenRefused,
    "ack": Ack,
    "eof": Eof,
    "reset": Reset,
    "detached": Detached,
    "going_away": GoingAway,
    "resume": Resume,
    "resumed": Resumed,
}
# One row a type: its fields on every leg, in the order of its class, with their checks.
FIELDS: dict[str, dict[str, _Check]] = {
    kind: {name: _CHECKS[name] for name in made._fields if name in _CHECKS}
    for kind, made in TYPES.items()
}
_NAMES: dict[type[Any], str] = {made: kind for kind, made in TYPES.items()}

FROM_USER: frozenset[str] = frozenset({"open", "resume", "ack", "eof", "reset"})
FROM_CLIENT: frozenset[str] = frozenset({"opened", "resumed", "refused", "ack", "eof", "reset"})
TO_CLIENT: frozenset[str] = FROM_USER | {"detached", "going_away"}
TO_USER: frozenset[str] = FROM_CLIENT | {"detached", "going_away"}
# These concern the leg and have no channel.
LEG_TYPES: frozenset[str] = frozenset({"going_away"})
_channel = _whole(1, MAX_CHANNEL)


def type_of(control: Control) -> str:
    """Return the control's type, as the wire names it."""
    return _NAMES[type(control)]


def parse_control(text: str, legal: frozenset[str], *, has_channel: bool) -> Control:
    """Return the control that a text message is.

    Args:
        text: The message; fields that are not known are ignored.
        legal: The types that may come from this side.
        has_channel: Whether the message came on a client leg.

    Raises:
        LegError: The leg ends (docs/protocol.md, "Errors").
        TunnelError: The tunnel of `channel` ends.
    """
    if len(text) > MAX_CONTROL_BYTES or len(text.encode("utf-8", "replace")) > MAX_CONTROL_BYTES:
        raise LegError(f"a control is longer than {MAX_CONTROL_BYTES} bytes", CloseCode.TOO_BIG)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise LegError("a text message is not JSON") from exc
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise LegError("a control has no known type")
    channel = 0
    if has_channel and kind not in LEG_TYPES:
        found = _channel(raw.get("channel"))
        if found is None:
            raise LegError(f"{kind} has no valid channel")
        channel = found
    if kind not in legal:
        raise TunnelError(f"{kind} does not come from this side", channel)
    checks = FIELDS[kind]
    if has_channel and "client" in checks:
        checks = {**checks, "user": _user}
    values: list[Any] = []
    for name, check in checks.items():
        value = check(raw.get(name))
        if value is None:
            raise TunnelError(f"{kind} has a missing or bad field {name}", channel)
        values.append(value)
    control: Control = TYPES[kind](*values, channel=channel)
    return control


def decode_text(payload: bytes | bytearray) -> str:
    """Return a text message as text; raises LegError if it is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise LegError("a text message is not UTF-8", CloseCode.NOT_UTF8) from exc


def encode_control(control: Control) -> bytes:
    """Return a control's JSON. Channel 0 (a user leg) and an empty user are left out."""
    fields: dict[str, Any] = {"type": type_of(control)}
    if control.channel:
        fields["channel"] = control.channel
    fields.update(control._asdict())
    if not control.channel:
        del fields["channel"]
    if not fields.get("user", True):
        del fields["user"]
    if "message" in fields:
        fields["message"] = _prose(fields["message"])
    # No \uXXXX escapes: a message of 500 characters must fit into MAX_CONTROL_BYTES.
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def encode_channel(channel: int) -> bytes:
    """Return the 4 bytes before the stream bytes of a message on a client leg."""
    return channel.to_bytes(CHANNEL_BYTES, "big")


def split_channel(message: bytes | bytearray | memoryview) -> int:
    """Return the channel of a binary message on a client leg; the stream bytes begin at 4."""
    if len(message) < CHANNEL_BYTES:
        raise LegError("a binary message is shorter than its channel")
    channel = int.from_bytes(message[:CHANNEL_BYTES], "big")
    if len(message) == CHANNEL_BYTES or len(message) > CHANNEL_BYTES + MAX_DATA_BYTES:
        raise TunnelError("a data message has not 1 to 65536 bytes", channel)
    return channel


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text."""
    return re.fullmatch(pattern, text) is not None


def is_secret(text: str) -> bool:
    """Whether a secret can travel in a header: printable ASCII without spaces."""
    return matches(r"[!-~]{1,4096}", text)


# --- http_network_relay/leg/duplex_socket.py ------------------------------------------------------
# One socket, TLS or plain, for one reading and one sending thread at once.
# FrameSender decides which thread sends. This class keeps two threads out of OpenSSL's object,
# which CPython does not: `_tls_lock` is held for one non-blocking read or write, and never across
# a wait. A race inside OpenSSL shows in no error.

# The largest TLS record: a longer write would hold `_tls_lock` for several of them.
_TLS_WRITE_BYTES = 16 * 1024
# Linux and macOS: one call without waiting, whatever the socket's mode. 0: not available.
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
# OpenSSL may wait for the other direction (a key update). The other thread may take
# that event, so such a wait is short, and the call is tried again.
_CROSS_WAIT_S = 0.05
# Without a byte for this long, a stream has paused.
PAUSE_S = 0.002


def wait_ready(sock: socket.socket, *, write: bool, timeout_s: float | None) -> bool:
    """Wait until the socket can be read or written, or has failed; False: timed out."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if write else select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
    both = ([], [sock], [sock]) if write else ([sock], [], [sock])
    return any(select.select(*both, timeout_s))


class DuplexSocket:
    """Owns `sock` (connected, TLS handshake done) until close()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        # Plain sockets block in the kernel, where two threads are safe.
        sock.settimeout(0.0 if self._is_tls else None)
        self._tls_lock = threading.Lock()  # Guards the OpenSSL object.
        # Whether the last read emptied the kernel's buffer. The reader's own.
        self._is_drained = True
        # Whether OpenSSL has to read before the rest of send_now() can be written.
        self.wants_read = False
        # When any byte last came, monotonic. Written by the reader, read by the timer.
        self.heard_at = time.monotonic()

    def recv(self, size: int, on_pause: Callable[[], None] | None = None) -> bytes:
        """Return 1 to `size` bytes, b"" at the end of the stream. Raises OSError.

        Calls `on_pause`, if given, once nothing has come for PAUSE_S, and waits on.
        """
        if self._is_tls:
            data = self._recv_tls(size, on_pause)
        else:
            # Before the buffer of `size` is made: an idle leg has none.
            if on_pause is not None or self._is_drained:
                self._wait_readable(on_pause)
            data = self._sock.recv(size)
            self._is_drained = len(data) < size
        self.heard_at = time.monotonic()
        return data  # type: ignore[no-any-return]

    def _wait_readable(self, on_pause: Callable[[], None] | None) -> None:
        if on_pause is not None:
            if wait_ready(self._sock, write=False, timeout_s=PAUSE_S):
                return
            on_pause()
        wait_ready(self._sock, write=False, timeout_s=None)

    def recv_into(self, view: memoryview) -> int:
        """As recv(), into `view`; returns how many bytes, 0 at the end of the stream."""
        count = self._recv_tls(view) if self._is_tls else self._sock.recv_into(view)
        self.heard_at = time.monotonic()
        return int(count)

    def _recv_tls(self, where: Any, on_pause: Callable[[], None] | None = None) -> Any:
        while True:
            # Read before the wait: poll does not see bytes that OpenSSL has decrypted.
            try:
                with self._tls_lock:
                    if isinstance(where, int):
                        return self._sock.recv(where)
                    return self._sock.recv_into(where)
            except ssl.SSLWantReadError:
                self._wait_readable(on_pause)
                on_pause = None
            except ssl.SSLWantWriteError:
                wait_ready(self._sock, write=True, timeout_s=_CROSS_WAIT_S)

    def send_now(self, header: bytes, payload: Any) -> memoryview | None:
        """Write as much as the socket takes without waiting; return the rest, None if none.

        The rest must be written before anything else. Raises OSError.
        """
        if self._is_tls:
            whole = memoryview(header + payload if header else payload)
            return self._send_tls(whole, waits=False)
        if not DONT_WAIT:
            return memoryview(header + payload)
        try:
            # In two parts: to join them would copy the payload.
            sent = self._sock.sendmsg((header, payload), (), DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent >= len(header):
            rest = memoryview(payload)[sent - len(header) :]
            return rest if rest else None
        return memoryview(header + payload)[sent:]

    def send(self, data: memoryview) -> None:
        """Write all of it, however long that takes. Raises OSError; woken by abort()."""
        if self._is_tls:
            self._send_tls(data, waits=True)
        else:
            self._sock.sendall(data)

    def _send_tls(self, view: memoryview, *, waits: bool) -> memoryview | None:
        while view:
            try:
                # The same slice again after a Want*: OpenSSL requires it.
                with self._tls_lock:
                    sent = self._sock.send(view[:_TLS_WRITE_BYTES])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError) as exc:
                is_write = isinstance(exc, ssl.SSLWantWriteError)
                if not waits:
                    self.wants_read = not is_write
                    return view
                timeout_s = None if is_write else _CROSS_WAIT_S
                wait_ready(self._sock, write=is_write, timeout_s=timeout_s)
            else:
                view = view[sent:]
        return None

    def finish_sending(self) -> None:
        """Tell the peer that nothing follows; reading goes on."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def abort(self) -> None:
        """Wake both threads: their present call and all later ones end or fail. Any thread."""
        with contextlib.suppress(OSError):  # Not connected any more: nothing waits.
            # Not SSLSocket.shutdown(), which sets its object to None under the threads.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor. Both threads MUST have ended."""
        with contextlib.suppress(OSError):
            self._sock.close()


# --- http_network_relay/leg/frame_reader.py -------------------------------------------------------
# Whole messages, pings and pongs of a leg, read without a library (RFC 6455, 5.2).
# All other frames are left to the library, byte for byte: closes, fragments, and bad frames.

# One read takes many small frames, or one large frame. The rest of a larger frame is read into
# its own buffer. From 128 KiB on, glibc maps memory for each read anew.
_READ_BYTES = 64 * 1024
_LARGE_BYTES = _READ_BYTES // 2
# First byte of a frame that is read here -> its opcode and largest size.
_TAKEN = {
    FIN | OP_TEXT: (OP_TEXT, MAX_MESSAGE_BYTES),
    FIN | OP_BINARY: (OP_BINARY, MAX_MESSAGE_BYTES),
    FIN | OP_PING: (OP_PING, MAX_PING_BYTES),
    FIN | OP_PONG: (OP_PONG, MAX_PING_BYTES),
}
# Mark of a longer size -> the least size that needs the mark, and the bytes of the size.
_LONG_SIZES = {126: (126, 2), 127: (2**16, 8)}
# First bytes of frames that are whole messages, without an extension's bits.
_WHOLE = frozenset(FIN | opcode for opcode in (OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG))


class FrameReader:
    """Reads the frames of one leg. The leg's reader alone uses it."""

    def __init__(self, duplex: DuplexSocket, begun: bytes = b"", *, is_masked: bool) -> None:
        self._duplex = duplex
        self._is_masked = is_masked
        # Bytes that were read; those before `_at` were taken.
        self._ahead = begun
        self._at = 0
        # Size of the next read: after a large frame that frame's size, so that one read takes
        # another frame of this size whole, and nothing behind it.
        self._read_bytes = _READ_BYTES
        # Bytes of an odd frame that the library has still to read; None: all that comes.
        self._odd_bytes: int | None = 0

    def read_message(
        self, on_pause: Callable[[], None] | None = None
    ) -> tuple[int, bytearray | memoryview] | None:
        """Wait for a frame, and take it if it is a whole message, a ping or a pong.

        Returns: The opcode and the payload, for a large message a view. None: the caller MUST
            read() this frame for the library, or the stream has ended.
        Raises OSError. `on_pause`: as in DuplexSocket.recv.
        """
        # One long method: it runs for each message of each leg.
        if self._odd_bytes != 0:
            return None
        if len(self._ahead) - self._at < 2 and not self._fill(2, on_pause):
            self._odd_bytes = None
            return None
        first, size = self._ahead[self._at], self._ahead[self._at + 1]
        if first not in _WHOLE or (size >= MASK_BIT) != self._is_masked:
            # From what is not a whole message on, the stream is the library's.
            self._odd_bytes = None
            return None
        size &= ~MASK_BIT
        least, count_bytes = _LONG_SIZES.get(size, (0, 0))
        header_bytes = 2 + count_bytes + (4 if self._is_masked else 0)
        if len(self._ahead) - self._at < header_bytes and not self._fill(header_bytes):
            self._odd_bytes = None
            return None
        if count_bytes:
            size = int.from_bytes(self._ahead[self._at + 2 : self._at + 2 + count_bytes], "big")
            if size < least:  # A shorter form has room for the size: an error.
                self._odd_bytes = None
                return None
        opcode, most = _TAKEN.get(first, (0, -1))
        if size > most:
            self._odd_bytes = header_bytes + size
            return None
        self._at += header_bytes
        self._read_bytes = header_bytes + size if size >= _LARGE_BYTES else _READ_BYTES
        key = self._ahead[self._at - 4 : self._at] if self._is_masked else ZERO_KEY
        is_large = size >= _LARGE_BYTES and opcode == OP_BINARY
        if is_large and key == ZERO_KEY and len(self._ahead) - self._at >= size:
            # Without a copy: the view keeps alive at most as many other bytes.
            self._at += size
            return opcode, memoryview(self._ahead)[self._at - size : self._at]
        data = self._take(size)
        if data is None:
            self._odd_bytes = None
            return None
        if key != ZERO_KEY:
            mask(data, key)
        return opcode, data

    def read(self, size: int) -> bytes:
        """Return bytes that read_message() left to the library; b"" at the end of the stream."""
        if not self._fill(1):
            return b""
        left = self._odd_bytes
        data = self._ahead[self._at : self._at + (size if left is None else min(size, left))]
        self._at += len(data)
        if left is not None:
            self._odd_bytes = left - len(data)
        return data

    def _fill(self, size: int, on_pause: Callable[[], None] | None = None) -> bool:
        """Have `size` bytes ahead; False if the stream ends before."""
        while len(self._ahead) - self._at < size:
            # Before the wait: a leg that becomes idle keeps no bytes that were taken.
            self._ahead, self._at = self._ahead[self._at :], 0
            data = self._duplex.recv(self._read_bytes, on_pause)
            if not data:
                return False
            self._ahead += data
        return True

    def _take(self, size: int) -> bytearray | None:
        """Return the next `size` bytes; None if the stream ends before."""
        begun = min(size, len(self._ahead) - self._at)
        begin = memoryview(self._ahead)[self._at : self._at + begun]
        self._at += begun
        if begun == size:
            return bytearray(begin)
        data = bytearray(size)
        data[:begun] = begin
        with memoryview(data) as view:
            while begun < size:
                count = self._duplex.recv_into(view[begun:])
                if not count:
                    return None
                begun += count
        return data


# --- http_network_relay/leg/send_queue.py ---------------------------------------------------------
# The frames that wait on one leg: FrameSender's private part. No I/O, calls nobody.
# The fast lane is bounded by its slots, the data by the windows of the tunnels.


class Frame(NamedTuple):
    """One WebSocket message: opcode, and payload in two parts (channel, bytes)."""

    opcode: int
    head: bytes
    payload: Any  # bytes, bytearray or memoryview


def append_merged(queue: deque[Any], data: Any, max_bytes: int = MAX_DATA_BYTES) -> None:
    """Append bytes, merged into a small last piece, of `max_bytes` at most.

    Otherwise a peer that sends single bytes would cost a queue entry, some hundred bytes, for
    each byte of its window.
    """
    if queue and len(queue[-1]) + len(data) <= max_bytes:
        last = queue[-1]
        if not isinstance(last, bytearray):
            last = bytearray(last)
            queue[-1] = last
        last += data
    else:
        queue.append(data)


class _Channel:
    """Data and the end of one channel, which wait for their turn."""

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.data: deque[Any] = deque()
        self.last: list[Frame] = []  # eof, then an end that takes its turn
        self.overtakes_at: float | None = None


class SendQueue:
    """A fast lane of fixed slots, then channels by turns, then the close. Any thread.

    FrameSender documents the methods of the same names.
    """

    def __init__(self) -> None:
        # Guards everything below. A leaf: nothing is called under it.
        self._lock = threading.Lock()
        self._fast: dict[Hashable, Frame] = {}
        self._cancellable: dict[int, Hashable] = {}
        self._channels: dict[int, _Channel] = {}
        self._turns: deque[int] = deque()
        self._close: Frame | None = None
        self._is_over = False

    # Fast lane.

    def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
        with self._lock:
            key = ("first", channel)
            if cancellable:
                self._cancellable[channel] = key
            self._put_fast_locked(key, frame)

    def cancel_first(self, channel: int) -> None:
        with self._lock:
            self._fast.pop(self._cancellable.pop(channel, None), None)

    def put_ack(self, channel: int, frame: Frame) -> None:
        with self._lock:
            self._put_fast_locked(("ack", channel), frame)

    def put_leg(self, kind: str, frame: Frame) -> None:
        with self._lock:
            self._put_fast_locked(kind, frame)

    def try_put_leg(self, kind: str, frame: Frame) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._put_fast_locked(kind, frame)
        finally:
            self._lock.release()
        return True

    # Data, by turns.

    def put_data(self, channel: int, head: bytes, data: Any) -> None:
        """Queue stream bytes. The window MUST allow them."""
        with self._lock:
            entry = self._channel_locked(channel, head)
            if entry is not None and not entry.last:
                append_merged(entry.data, data)

    def put_eof(self, channel: int, frame: Frame) -> None:
        with self._lock:
            entry = self._channel_locked(channel, b"")
            if entry is not None and not entry.last:
                entry.last.append(frame)

    def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
        with self._lock:
            if self._close is not None or self._is_over:
                return  # What was queued before the close is still flushed.
            if self._fast.pop(self._cancellable.pop(channel, None), None) is not None:
                self._drop_locked(channel)
                return
            if in_turn:
                entry = self._channel_locked(channel, b"")
                if entry is not None and entry.overtakes_at is None:
                    entry.last.append(frame)
                    entry.overtakes_at = time.monotonic() + FLUSH_S
            else:
                self._drop_locked(channel)
                self._put_fast_locked(("end", channel), frame)

    def drop(self, channel: int) -> None:
        with self._lock:
            self._cancellable.pop(channel, None)
            self._fast.pop(("first", channel), None)
            self._drop_locked(channel)

    # The leg's end.

    def close(self, frame: Frame, *, flush: bool = True) -> None:
        with self._lock:
            if self._close is None:
                self._close = frame
                if not flush:
                    self._clear_locked()

    def stop(self) -> None:
        with self._lock:
            self._is_over = True
            self._clear_locked()

    # What is taken. The properties need no lock.

    @property
    def has_frames(self) -> bool:
        return bool(self._fast or self._turns)

    @property
    def is_closing(self) -> bool:
        return self._close is not None

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def is_clear(self) -> bool:
        """Whether nothing waits, and data may still be put."""
        return not (self._fast or self._turns or self._close is not None or self._is_over)

    def take(self, *, with_close: bool = False) -> Frame | None:
        """Return the next frame; None: nothing waits. Only the writer takes the close."""
        with self._lock:
            if self._is_over:
                return None
            frame = self._next_locked()
            if frame is None and with_close and self._close is not None:
                self._is_over = True
                return self._close
            return frame

    def _next_locked(self) -> Frame | None:
        assert self._lock.locked()
        if self._fast:
            key = next(iter(self._fast))
            frame = self._fast.pop(key)
            if isinstance(key, tuple) and key[0] == "first":
                self._cancellable.pop(key[1], None)
            return frame
        if not self._turns:
            return None
        channel = self._turns.popleft()
        entry = self._channels[channel]
        if entry.overtakes_at is not None and time.monotonic() >= entry.overtakes_at:
            del self._channels[channel]
            return entry.last[-1]
        if entry.data:
            data = entry.data.popleft()
            frame = Frame(OP_BINARY, entry.head, data)
        else:
            frame = entry.last.pop(0)
        if entry.data or entry.last:
            self._turns.append(channel)
        else:
            del self._channels[channel]
        return frame

    def _put_fast_locked(self, key: Hashable, frame: Frame) -> None:
        assert self._lock.locked()
        if self._close is None and not self._is_over:
            self._fast[key] = frame

    def _channel_locked(self, channel: int, head: bytes) -> _Channel | None:
        assert self._lock.locked()
        if self._close is not None or self._is_over:
            return None
        entry = self._channels.get(channel)
        if entry is None:
            entry = self._channels[channel] = _Channel(head)
            self._turns.append(channel)
        elif not entry.head:
            entry.head = head
        return entry

    def _drop_locked(self, channel: int) -> None:
        assert self._lock.locked()
        self._fast.pop(("ack", channel), None)
        if self._channels.pop(channel, None) is not None:
            self._turns.remove(channel)

    def _clear_locked(self) -> None:
        assert self._lock.locked()
        self._fast.clear()
        self._cancellable.clear()
        self._channels.clear()
        self._turns.clear()


# --- http_network_relay/leg/frame_sender.py -------------------------------------------------------
# Sends the frames of one leg, in the order of docs/protocol.md, "Order".
# To give each message to another thread costs more than to send it. So push() sends at once what
# the socket takes without waiting; what the socket does not take is left to the leg's writer.

# Most that one push() sends: the calling thread has its own work, and the writer goes on.
_PUSH_BYTES = 256 * 1024


class FrameSender:
    """The only object that others put a leg's frames into. Any thread; a put never waits.

    put_first, put_eof, put_end, try_put_leg and close call the writer, since their callers may
    hold locks. After put_data, put_ack and put_leg the caller MUST call push(), holding no
    lock. Before start() frames are only queued.

    Args:
        make_key: Returns the masking key of each frame; None for a frame that is not masked.
        call: Called when the writer has work, by any thread, with locks held: it must not wait,
            and have run() or push_all() called. None: run() waits for the call by itself.
    """

    def __init__(
        self,
        make_key: Callable[[], bytes | None] = lambda: None,
        call: Callable[[], None] | None = None,
    ) -> None:
        self._queue = SendQueue()
        self._make_key = make_key
        self._call = call
        # Set while the writer has a call that it has not begun to serve.
        self._called = threading.Event()
        # Guards the next two. Held from a frame's taking to its last byte, by the writer across
        # waits; push() only tries it, and never holds it across a wait.
        self._send_lock = threading.Lock()
        # Bytes of a frame that the socket did not take: they go out before anything else.
        self._rest: memoryview | None = None
        # None before start() and after stop().
        self._duplex: DuplexSocket | None = None

    def start(self, duplex: DuplexSocket) -> None:
        """Send on `duplex` from now on, first what was queued before."""
        with self._send_lock:
            self._duplex = duplex
        self._called.clear()
        self.call_writer()

    def stop(self) -> None:
        """Drop what is queued, and end the writer; after it nobody is inside the socket.

        The caller MUST abort the socket first, or be the writer: this waits for who sends.
        """
        self._queue.stop()
        self.call_writer()
        with self._send_lock:
            self._duplex = None

    # What is put.

    def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
        """Queue a channel's first message; `cancellable` if an end may take it back."""
        self._queue.put_first(channel, frame, cancellable=cancellable)
        self.call_writer()

    def cancel_first(self, channel: int) -> None:
        """Take an unsent first message back; nothing if it was sent."""
        self._queue.cancel_first(channel)

    def put_ack(self, channel: int, frame: Frame) -> None:
        """Queue an ack; it replaces an unsent one of the same channel."""
        self._queue.put_ack(channel, frame)

    def put_leg(self, kind: str, frame: Frame) -> None:
        """Queue a message of the leg itself (pong, going_away): one slot a kind."""
        self._queue.put_leg(kind, frame)

    def try_put_leg(self, kind: str, frame: Frame) -> bool:
        """As put_leg, but without waiting even for the queue's lock; False: try later."""
        is_put = self._queue.try_put_leg(kind, frame)
        if is_put:
            self.call_writer()
        return is_put

    def put_data(self, channel: int, head: bytes, data: Any) -> None:
        """Send stream bytes at once if nothing waits, else queue them. The window allows them."""
        queue = self._queue
        if not queue.is_clear or not self._send_lock.acquire(blocking=False):
            queue.put_data(channel, head, data)
            return
        try:
            duplex = self._duplex
            if duplex is None or self._rest is not None or not queue.is_clear:
                queue.put_data(channel, head, data)
                return
            self._rest = self._send_now_locked(duplex, *self._encode(OP_BINARY, head, data))
        finally:
            self._send_lock.release()
        if self._rest is not None:
            self.call_writer()

    def put_eof(self, channel: int, frame: Frame) -> None:
        """Queue the eof behind the channel's data."""
        self._queue.put_eof(channel, frame)
        self.call_writer()

    def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
        """Queue a channel's reset or detached, and delete what waits of the channel.

        `in_turn` puts it behind the channel's data instead; after a second it overtakes.
        """
        self._queue.put_end(channel, frame, in_turn=in_turn)
        self.call_writer()

    def drop(self, channel: int) -> None:
        """Delete what waits of a channel that has ended: nobody would act on it."""
        self._queue.drop(channel)

    def close(self, frame: Frame, *, flush: bool = True) -> None:
        """Send `frame` (a close) last: behind all that is queued, or at once.

        What is put later is dropped. The first close wins.
        """
        self._queue.close(frame, flush=flush)
        self.call_writer()

    # Who sends.

    @property
    def has_frames(self) -> bool:
        """Whether a frame waits, the close not counted. Needs no lock."""
        return self._queue.has_frames

    @property
    def is_closing(self) -> bool:
        """Whether a close waits or was sent. Needs no lock."""
        return self._queue.is_closing

    @property
    def is_full(self) -> bool:
        """Whether a frame has begun that the socket did not take whole. Needs no lock."""
        return self._rest is not None

    @property
    def is_over(self) -> bool:
        """Whether the close was taken, or stop() called. Needs no lock."""
        return self._queue.is_over

    def call_writer(self) -> None:
        """Let the writer send what waits. Takes no lock that is held across a wait."""
        # Two threads may both call: the second call finds nothing to send.
        if not self._called.is_set():
            self._called.set()
            if self._call is not None:
                self._call()

    def push(self) -> None:
        """Send what waits, as far as the socket takes it now. The caller MUST hold no lock."""
        # The rest of a frame is the writer's, which was called.
        while self._queue.has_frames and self._rest is None:
            if not self._send_lock.acquire(blocking=False):
                return  # The thread inside looks again after its release.
            try:
                is_done = self._push_locked()
            finally:
                self._send_lock.release()
            if not is_done:
                self.call_writer()
                return

    def push_all(self) -> bool:
        """Serve a call in place of run(): send the rest, all frames and the close, no waiting.

        Returns: Whether all was sent, or the leg is lost; else this MUST be called again, when
        the socket can be written if is_full, or at once.
        """
        # Before the look at the queue: what is put behind it calls again.
        self._called.clear()
        with self._send_lock:
            if self._duplex is None:
                return True
            if self._rest is not None:
                self._rest = self._send_now_locked(self._duplex, b"", self._rest)
            is_done = self._push_locked(with_close=True)
            if is_done and self._queue.is_over:
                # Under the lock: after stop() the descriptor may be another's.
                self._duplex.finish_sending()
            return is_done

    def _push_locked(self, *, with_close: bool = False) -> bool:
        """Return whether all was sent; the rest, if any, is the writer's."""
        assert self._send_lock.locked()
        sent = 0
        while self._rest is None and self._duplex is not None:
            if sent >= _PUSH_BYTES:
                return False
            frame = self._queue.take(with_close=with_close)
            if frame is None:
                return True
            sent += len(frame.payload)
            self._rest = self._send_now_locked(self._duplex, *self._encode(*frame))
        return False

    def _send_now_locked(self, duplex: DuplexSocket, *parts: Any) -> memoryview | None:
        """As DuplexSocket.send_now; a lost leg takes all, and its reader finds the loss."""
        assert self._send_lock.locked()
        try:
            return duplex.send_now(*parts)
        except OSError:
            duplex.abort()
            return None

    def run(self) -> None:
        """Be the writer: send what push() could not, to the close or stop(). Raises OSError."""
        while True:
            self._called.clear()
            with self._send_lock:
                self._send_rest_locked()
                while self._duplex and (frame := self._queue.take(with_close=True)) is not None:
                    self._rest = self._duplex.send_now(*self._encode(*frame))
                    self._send_rest_locked()
            if self._queue.is_over:
                return
            if not self._queue.has_frames:
                self._called.wait()

    def _send_rest_locked(self) -> None:
        assert self._send_lock.locked()
        if self._rest is not None and self._duplex is not None:
            self._duplex.send(self._rest)
            self._rest = None

    def _encode(self, opcode: int, head: bytes, payload: Any) -> tuple[bytes, Any]:
        size = len(head) + len(payload)
        key = self._make_key()
        header = frame_header(opcode, size, key)
        if key is None or key == ZERO_KEY:
            return header + head, payload
        data = bytearray(head)
        data += payload
        mask(data, key)
        return header, data


# --- http_network_relay/leg/message_reader.py -----------------------------------------------------
# The messages that come in on one leg; pings and closes are answered on the way.

# RFC 6455, 7.4.1: codes that stand in no close frame.
NO_STATUS = 1005
ABNORMAL_CLOSURE = 1006


class MessageReader:
    """Reads whole messages by `frames`, all other frames by a WebSocket library.

    The leg's reader alone uses it. It never writes: pongs and close replies go through `sender`.

    Args:
        read_odd: Returns the next frame that `frames` leaves: opcode, payload, and whether it is
            the last of its message. Raises LegError for a bad one, EOFError at the stream's end.
    """

    def __init__(
        self,
        frames: FrameReader,
        sender: FrameSender,
        read_odd: Callable[[], tuple[int, Any, bool]],
    ) -> None:
        self._frames = frames
        self._sender = sender
        self._read_odd = read_odd
        # A message in fragments, which some proxies make; opcode 0: there is none.
        self._parts = bytearray()
        self._parts_opcode = 0

    def receive(self, on_pause: Callable[[], None] | None = None) -> tuple[int, Any]:
        """Wait for the next message: (OP_TEXT or OP_BINARY, payload), or (OP_CLOSE, code).

        A lost connection is a close with ABNORMAL_CLOSURE. Calls `on_pause`, if given, when nothing
        comes for PAUSE_S. Raises LegError.
        """
        while True:
            try:
                taken = self._frames.read_message(on_pause)
                opcode, payload, is_last = (*taken, True) if taken else self._read_odd()
            except (OSError, EOFError):
                return OP_CLOSE, ABNORMAL_CLOSURE
            if opcode == OP_PING:
                if len(payload) > MAX_PING_BYTES:
                    raise LegError("a ping is too long")
                self._sender.put_leg("pong", Frame(OP_PONG, b"", payload))
                self._sender.push()
            elif opcode == OP_CLOSE:
                code = payload[:2]
                self._sender.close(Frame(OP_CLOSE, b"", code), flush=False)
                return OP_CLOSE, int.from_bytes(code, "big") if code else NO_STATUS
            elif opcode != OP_PONG:
                message = self._assemble(opcode, payload, is_last=is_last)
                if message is not None:
                    return message

    def _assemble(self, opcode: int, payload: Any, *, is_last: bool) -> tuple[int, Any] | None:
        if (opcode == OP_CONTINUATION) != bool(self._parts_opcode):
            raise LegError("a fragment out of place")
        if opcode != OP_CONTINUATION:
            if is_last:
                return opcode, payload
            self._parts_opcode = opcode
        self._parts += payload
        if len(self._parts) > MAX_MESSAGE_BYTES:
            raise LegError("a message is too long", CloseCode.TOO_BIG)
        if not is_last:
            return None
        message = (self._parts_opcode, bytes(self._parts))
        self._parts, self._parts_opcode = bytearray(), 0
        return message


# --- http_network_relay/settings.py ---------------------------------------------------------------
# Tables of settings: one row has the flag, variable, default, range and help of a setting.
# The command line, the reading, the errors and docs/reference.md follow the rows. A flag has
# precedence over its variable, and the variable over the default.


class Setting(NamedTuple):
    """One setting: a number if `highest` is not 0, else a text."""

    # Both spellings, if there are two. The flag also names the variable.
    flag: str
    # The unit of a number; the word for a text.
    kind: str
    help: str
    default: str = ""
    lowest: float = 0
    highest: float = 0
    is_whole: bool = True
    # The meaning of 0, if 0 is allowed below `lowest`.
    zero: str = ""
    # May also stand in a file, which the flag with "-file" behind it names.
    is_secret: bool = False

    @property
    def name(self) -> str:
        """The attribute of argparse's result."""
        return self.flag.split()[0][2:].replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"HTTP_NETWORK_RELAY_{self.name.upper()}"

    @property
    def range(self) -> str:
        """The numbers that are allowed."""
        zero = f", or 0 for {self.zero}" if self.zero else ""
        return f"{self.lowest:g} to {self.highest:.15g} {self.kind}{zero}"

    def text(self, given: Mapping[str, str]) -> str:
        """Return the variable's value, or the default; an empty variable counts as unset."""
        return given.get(self.variable) or self.default

    def number(self, given: Mapping[str, str]) -> float:
        """Return the number; raises ConfigError that names flag and variable."""
        text = self.text(given)
        try:
            number = float(text if not self.is_whole or matches("[0-9]{1,15}", text) else "nan")
        except ValueError:
            number = float("nan")  # Outside of every range.
        if not self.lowest <= number <= self.highest and (number or not self.zero):
            kind = "a whole number" if self.is_whole else "a number"
            kind = f"must be {kind}, {self.range}, not {text!r}"
            raise ConfigError(f"{self.flag} ({self.variable}) {kind}")
        return number


SERVER_URL = Setting(
    "--server_url --server-url", "URL", "such as https://relay.example", "ws://127.0.0.1:8000"
)
# Below 0.05 s, the delays of a loaded machine would count as silence. No proxy and no NAT keeps
# an idle connection for longer than an hour.
PING_INTERVAL = Setting(
    "--ping-interval", "seconds", "between pings", f"{DEFAULT_PING_INTERVAL_S:g}", 0.05, 3600, False
)
MAX_WINDOW = Setting(
    "--max-window",
    "bytes",
    "largest window of a tunnel and direction",
    str(DEFAULT_MAX_WINDOW_BYTES),
    MIN_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
)
# 120 s: enough for a laptop that changes its network, and a server that is deployed slowly.
RESUME_TIMEOUT = Setting(
    "--resume-timeout", "seconds", "a tunnel waits so long for a new leg", "120", 0, 24 * 3600
)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage above it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_help_formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise RelayError("usage", f"{message}; --help lists all arguments")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """As wide as the terminal. argparse's own way to know that takes a start 3 ms of imports."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (AttributeError, ValueError, OSError):  # closed, or no terminal
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


def add_settings(
    parser: argparse.ArgumentParser, rows: Iterable[Setting], action: str = "store"
) -> None:
    """Add the flags of the rows; a secret gets one more flag, for its file."""
    for row in rows:
        about = f"{row.help}, {row.range}" if row.highest else row.help
        about += f" ({row.variable}, default: {row.default or 'none'})"
        word = row.kind.upper().split()[0]
        parser.add_argument(*row.flag.split(), metavar=word, action=action, help=about)
        if row.is_secret:
            about = f"a file that holds the {row.kind} and nothing else"
            parser.add_argument(f"{row.flag}-file", metavar="FILE", help=about)


def merge_flags(
    args: argparse.Namespace, rows: Iterable[Setting], environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment with the flags in the place of their variables."""
    flags = {row.variable: getattr(args, row.name) for row in rows}
    return {**environ, **{variable: text for variable, text in flags.items() if text}}


def read_secret(row: Setting, args: argparse.Namespace, given: Mapping[str, str]) -> str:
    """Return a secret: flag > file > variable. Raises ConfigError, which quotes none."""
    path, secret = getattr(args, f"{row.name}_file"), row.text(given)
    if path is not None and getattr(args, row.name) is None:
        try:
            with open(path, encoding="utf-8") as file:
                secret = file.read(64 * 1024).strip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "not a text file"
            raise ConfigError(f"{row.flag}-file {path} cannot be read: {reason}") from exc
    if not is_secret(secret):
        raise ConfigError(
            f"{row.flag}-file, {row.flag} or {row.variable} must give a {row.kind} of printable"
            " ASCII without spaces"
        )
    return secret


# --- http_network_relay/timer.py ------------------------------------------------------------------
# The one timer thread of a process: pings, deadlines, and the signals.
# The timer polls a socket pair, into which the interpreter writes the number of each signal at
# once (signal.set_wakeup_fd). A Python handler would be too late: it runs when the main thread
# next runs, which may be inside recv() until the next byte.

# A wait that ends so much later than planned, by the wall clock, means that the machine slept
# or that the process was stopped.
_SLEPT_S = 5.0
# The longest wait, whatever is due: the monotonic clock stands still while the machine sleeps,
# and afterwards the rest of the wait is still to come.
_LONGEST_WAIT_S = 2.0
# Codes in the pair beside signal numbers, which lie between the two.
_WAKE = 0
_STOP = 255


class Timer:
    """Calls `tick(now, slept)` when it is due, and `on_signal(number)` for each signal.

    `tick` returns the time of its next call, monotonic. Both run in the timer's thread, and MUST
    neither write to a leg nor wait for a lock.
    """

    def __init__(
        self,
        tick: Callable[[float, bool], float],
        on_signal: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._tick = tick
        self._on_signal = on_signal
        # From start() to stop(): the side that the thread reads, and the side to write to.
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._thread = threading.Thread(target=self._run, name="timer")

    def start(self, signals: Iterable[int] = ()) -> None:
        """Start the thread and catch `signals` (main thread only); stop() ends both."""
        self._pair = socket.socketpair()
        for side in self._pair:
            side.setblocking(False)
        self._thread.start()
        numbers = tuple(signals)
        if numbers:
            # Before the handlers, which would lose a signal.
            signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
        for number in numbers:
            # Only replaces the default action: the number comes through the socket pair.
            signal.signal(number, lambda _number, _frame: None)

    def wake(self) -> None:
        """Call `tick` now, since something is due sooner than it said. Never waits."""
        self._post(_WAKE)

    def stop(self) -> None:
        """End the thread and join it. By the thread that called start()."""
        if self._pair is None:
            return
        self._post(_STOP)
        self._thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        for side in self._pair:
            side.close()
        self._pair = None

    def _post(self, code: int) -> None:
        pair = self._pair
        if pair is not None:
            # A full pair wakes the thread anyway; a closed one has no thread any more.
            with contextlib.suppress(OSError):
                pair[1].send(bytes((code,)))

    def _run(self) -> None:
        assert self._pair is not None  # Made by start().
        posted = self._pair[0]
        slept = False
        codes = b""
        while _STOP not in codes:
            for code in codes:
                if code != _WAKE:
                    self._on_signal(code)
            now = time.monotonic()
            wait_s = max(0.0, min(self._tick(now, slept) - now, _LONGEST_WAIT_S))
            planned = time.time() + wait_s
            is_posted = wait_ready(posted, write=False, timeout_s=wait_s)
            codes = posted.recv(4096) if is_posted else b""
            slept = time.time() - planned > _SLEPT_S


# --- http_network_relay/end/channel.py ------------------------------------------------------------
# A tunnel's handle on one leg.


class Channel:
    """One channel of one leg, as the end of a tunnel uses it. Compared by identity.

    A user leg has one channel, with `channel_id` 0. Any thread; every put_... only queues.
    """

    def __init__(self, frame_sender: FrameSender, channel_id: int = 0) -> None:
        self.frame_sender = frame_sender
        self.channel_id = channel_id
        self._head = encode_channel(channel_id) if channel_id else b""

    def put_first(self, control: Control) -> None:
        """Send the channel's first message."""
        self.frame_sender.put_first(self.channel_id, self._text(control))

    def put_data(self, data: Any) -> None:
        """Send stream bytes, with the next push()."""
        self.frame_sender.put_data(self.channel_id, self._head, data)

    def put_ack(self, ack: Ack) -> None:
        """Send an ack, with the next push()."""
        self.frame_sender.put_ack(self.channel_id, self._text(ack))

    def put_eof(self, count: int) -> None:
        """Send an eof, behind the data."""
        self.frame_sender.put_eof(self.channel_id, self._text(Eof(count)))

    def put_reset(self, error: RelayError) -> None:
        """Send a reset, behind the data where what came before it counts."""
        frame = self._text(Reset(error.code, str(error)))
        self.frame_sender.put_end(self.channel_id, frame, in_turn=takes_turn(error.code))

    def push(self) -> None:
        """Send data and acks that were put. Hold no lock."""
        self.frame_sender.push()

    def drop(self) -> None:
        """Delete what waits to be sent."""
        self.frame_sender.drop(self.channel_id)

    def _text(self, control: Control) -> Frame:
        return Frame(OP_TEXT, b"", encode_control(control._replace(channel=self.channel_id)))


# --- http_network_relay/end/window.py -------------------------------------------------------------
# How large the window of a stream is (docs/protocol.md, "The receiver's window").
# No I/O, no clock, no thread: the caller says what time it is.

# A round trip may be longer than the shortest by this queue: a busy link needs one.
_QUEUE_S = 0.020
# On a fast link the queue is no longer than a round trip; threads take this long to wake up.
_LEAST_QUEUE_S = 0.0015
# A probe takes the shortest of so many round trips, over so long at least: a standing queue makes
# every round trip longer, jitter only some. On a slow link the longer time ends a probe.
_ROUND_TRIPS = 3
_MEASURE_S = 0.005
_LONG_MEASURE_S = 1.0
# Growth per probe without a queue. On a busy machine some round trips are short by chance.
_GROWTH = 1.2
# More probes than these in a row without a queue double the window again: one may be chance.
_FREE_PROBES = 3
# Largest part of the window that may wait in our own buffer. More means that the consumer is the
# bottleneck: do not grow.
_UNDELIVERED = 1 / 3
# How often the queue on the link is drained. A drain costs a long link some 1 % of its speed.
_DRAIN_S = 10.0
# The longest round trip that a drain believes: of seconds, most are a queue, perhaps that of other
# tunnels, which drain at the same time.
_DRAIN_ROUND_TRIP_S = 0.1
# No round trip is shorter, whatever a coarse clock says.
_LEAST_ROUND_TRIP_S = 0.0001
# After such a pause nothing is queued on the link, and earlier measurements are old.
_IDLE_S = 1.0


class Window:
    """How many bytes a peer may have under way to us: what its link needs. Not thread-safe.

    The round trip of an ack ends with the first bytes that the ack allowed. The window doubles
    until round trips grow longer than the shortest. Then the window follows them, so that a short
    queue stands: a longer one would only delay the keystroke behind it. The window shrinks if
    much of it waits in our own buffer. Now and then a drain makes the window smaller than the
    link's capacity, and the shortest round trip is measured anew: a standing queue must not be
    taken for the link. All tunnels of a machine drain at the same time, since they may share
    that queue.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self.size = 0
        # A probe, since the last change: since when, how many round trips, the shortest of them.
        self._since: float | None = None
        self._round_trips = 0
        self._round_trip_s = 0.0
        # The fewest bytes that waited in our own buffer when one of them began.
        self._undelivered = 0
        self._heard_at = float("inf")  # not yet
        self._last_round_trip_s = 0.0
        self.begin()

    def begin(self) -> None:
        """Begin with the first window: nothing is known of the link."""
        self._is_doubling = True
        self._shortest_s = float("inf")
        # The limit before the ack that is timed, and when that was sent.
        self._timed: tuple[int, float] | None = None
        # Window and round trip: when round trips first were too long, and before a drain.
        self._too_long: tuple[int, float] | None = None
        self._before_drain: tuple[int, float] | None = None
        self._drained_in = -1  # which stretch of _DRAIN_S
        self._free_probes = 0  # in a row that found no queue
        self._resize(MIN_WINDOW_BYTES)

    def on_data(self, size: int, received: int, now: float) -> None:
        """Note that a message of `size` bytes came, now `received` in all."""
        if now - self._heard_at >= max(_IDLE_S, 4 * self._last_round_trip_s):
            self.begin()
        self._heard_at = now
        if self._timed is not None and received > self._timed[0]:
            self._last_round_trip_s = max(_LEAST_ROUND_TRIP_S, now - self._timed[1])
            self._timed = None
            self._on_round_trip(self._last_round_trip_s, size, now)

    def on_limit(self, before: int, undelivered: int, now: float) -> None:
        """Note that an ack raises the limit, which was `before`.

        `undelivered`: how many bytes have come and were not delivered yet.
        """
        if self._timed is None:
            self._timed = (before, now)
            self._undelivered = min(self._undelivered, undelivered)

    def _on_round_trip(self, round_trip_s: float, size: int, now: float) -> None:
        self._shortest_s = min(self._shortest_s, round_trip_s)
        if self._since is None:
            # The first round trip after a change belongs to the window before.
            self._since, self._undelivered = now, self.size
            return
        self._round_trips += 1
        # Without the time of the last message, which may be longer than the queue.
        self._round_trip_s = min(self._round_trip_s, round_trip_s * self.size / (self.size + size))
        probed_s = now - self._since
        is_enough = self._round_trips >= _ROUND_TRIPS and probed_s >= _MEASURE_S
        is_urgent = self._before_drain is None and (
            self._is_doubling or int(now / _DRAIN_S) != self._drained_in
        )
        if is_enough or is_urgent or probed_s >= _LONG_MEASURE_S:
            self._adapt(int(now / _DRAIN_S))

    def _adapt(self, stretch: int) -> None:
        if self._before_drain is not None:
            self._refill(*self._before_drain)
        elif stretch != self._drained_in:
            self._drained_in = stretch
            self._drain()
        elif self._round_trip_s > self._longest_s:
            self._shrink()
        elif self._undelivered > self.size * _UNDELIVERED:
            # More bytes would only come in one burst after the delivery, and delay a keystroke.
            self._free_probes = 0
            size = (self.size - self._undelivered) / (1 - _UNDELIVERED)
            self._resize(max(size, min(self.size, MIN_WINDOW_BYTES)))
        elif self._round_trip_s < self._longest_s - self._queue_s / 2:
            self._grow()
        else:
            self._too_long = None
            self._free_probes = 0
            self._resize(self.size)

    @property
    def _queue_s(self) -> float:
        if self.size < MIN_WINDOW_BYTES:
            return _QUEUE_S
        return min(_QUEUE_S, max(_LEAST_QUEUE_S, self._shortest_s))

    @property
    def _longest_s(self) -> float:
        return self._shortest_s + self._queue_s

    def _part(self, round_trip_s: float) -> float:
        """Return the part of the window whose round trips are as long as they should be."""
        return (self._longest_s - self._queue_s / 4) / round_trip_s

    def _grow(self) -> None:
        self._too_long = None
        self._free_probes += 1
        is_free = self._is_doubling or self._free_probes > _FREE_PROBES
        self._resize(self.size * (2 if is_free else min(_GROWTH, self._part(self._round_trip_s))))

    def _shrink(self) -> None:
        self._free_probes = 0
        size, round_trip_s = self._too_long or (self.size, self._round_trip_s)
        self._too_long = (size, round_trip_s)
        if self._is_doubling:
            self._is_doubling = False
            self._drain()
        elif self.size * 2 <= size and self._round_trip_s * 4 > round_trip_s * 3:
            # With half the window round trips are as long as before: the link is longer.
            self._shortest_s = self._round_trip_s
            self._too_long = None
            self._is_doubling = True
            self._resize(size)
        else:
            # The rule of large windows leads to no small one, which may have a longer queue.
            least = MIN_WINDOW_BYTES if self.size >= MIN_WINDOW_BYTES else LEAST_WINDOW_BYTES
            self._resize(max(least, self.size * self._part(self._round_trip_s)))

    def _drain(self) -> None:
        self._before_drain = (self.size, self._round_trip_s)
        way_s = min(_DRAIN_ROUND_TRIP_S, self._shortest_s)
        self._shortest_s = float("inf")
        # Half of the capacity of the link, which may have become shorter.
        self._resize(self.size * way_s / self._round_trip_s / 2)

    def _refill(self, size: int, round_trip_s: float) -> None:
        self._before_drain = self._too_long = None
        self._is_doubling = self._is_doubling and round_trip_s <= self._longest_s
        self._resize(size * min(1.0, self._part(round_trip_s)))

    def _resize(self, size: float) -> None:
        self.size = int(max(LEAST_WINDOW_BYTES, min(self._max, size)))
        self._since, self._round_trips, self._round_trip_s = None, 0, float("inf")


# --- http_network_relay/end/stream.py -------------------------------------------------------------
# The stream state of one end of a tunnel (docs/protocol.md, "Streams and credit", "Resume").
# No I/O, no clock, no thread. Both ends share this code, so none of it depends on the
# end. Offsets are counts of bytes from 0 in each direction.

# With an empty receive queue, an ack is due from this many unacknowledged bytes on: the
# receiver cannot know how far the server lowered the limit.
_DRAINED_ACK_BYTES = 64 * 1024
# On a thin link the receiver's window is smaller than the first. A message is 1/16 of the window:
# about 4 of 60 ms of the link. The lower bound limits the cost of frame headers.
_THIN_MESSAGES = 16
_LEAST_MESSAGE_BYTES = 4 * 1024
# Kept pieces are merged up to this size. A piece of one byte costs 100 bytes; merging
# large pieces would copy bytes without a gain.
_MERGED_BYTES = 4 * 1024


class Position(NamedTuple):
    """The counts in `resume` and `resumed` of the stream that the sender receives."""

    received: int
    delivered: int
    limit: int


class SendStream:
    """The bytes that this end sends, and those kept for a resume. Not thread-safe.

    `sent`, `limit`, `eof_sent` and `eof_acked` concern the present channel; a resume
    resets them.
    """

    def __init__(self) -> None:
        self.taken = 0  # from the source
        self.is_ended = False  # the source
        self.sent = 0
        self.limit = 0
        self.delivered = 0
        self._message_bytes = MESSAGE_BYTES
        self.eof_sent = False
        self.eof_acked = False
        # Bytes from `_kept_from`, at most `delivered`, to `taken`; `_unsent` waits for credit.
        self._kept: deque[Any] = deque()
        self._kept_from = 0
        self._unsent: deque[Any] = deque()

    @property
    def credit(self) -> int:
        """The number of bytes that may be taken from the source now."""
        return 0 if self.is_ended or self._unsent else max(0, self.limit - self.sent)

    @property
    def waits_for_credit(self) -> bool:
        """Whether taken bytes are still unsent on this channel."""
        return bool(self._unsent)

    @property
    def kept_bytes(self) -> int:
        """The number of bytes kept for a resume."""
        return self.taken - self._kept_from

    def take(self, data: Any) -> None:
        """Take bytes from the source; next_piece() returns them as credit allows.

        More than `credit` is accepted: a resume may have lowered the credit while the
        source was read.
        """
        append_merged(self._kept, data, _MERGED_BYTES)
        self._unsent.append(data)
        self.taken += len(data)

    def end(self) -> None:
        """Record that the source has ended."""
        self.is_ended = True

    def next_piece(self) -> Any:
        """Return the bytes of the next message to send; None if no bytes or no credit."""
        size = min(self.limit - self.sent, self._message_bytes)
        if size <= 0 or not self._unsent:
            return None
        piece = self._unsent.popleft()
        if len(piece) > size:
            view = memoryview(piece)
            self._unsent.appendleft(view[size:])
            piece = view[:size]
        self.sent += len(piece)
        return piece

    def next_eof(self) -> int | None:
        """Return the count of an eof to send now; None if not yet due or already sent."""
        if not self.is_ended or self.eof_sent or self._unsent:
            return None
        self.eof_sent = True
        return self.taken

    def on_ack(self, ack: Ack) -> None:
        """Apply the peer's ack; raises TunnelError if its counts are impossible."""
        if not self.delivered <= ack.delivered <= self.sent:
            raise TunnelError(f"ack of {ack.delivered} bytes, {self.sent} were sent")
        if ack.limit < self.limit:
            raise TunnelError(f"limit fell from {self.limit} to {ack.limit}")
        if ack.eof and not (self.eof_sent and ack.delivered == self.sent):
            raise TunnelError("ack of an eof that is not due")
        self._fit_messages(ack.limit - ack.delivered)
        self.limit = ack.limit
        self.eof_acked = self.eof_acked or ack.eof
        self._free(ack.delivered)

    def _fit_messages(self, window: int) -> None:
        """Send small messages on a thin link: a keystroke would wait behind a large one.

        A slow source has a small window too, but still has credit when an ack arrives.
        """
        is_thin = window < MIN_WINDOW_BYTES and self.sent >= self.limit
        size = window // _THIN_MESSAGES if is_thin else MESSAGE_BYTES
        self._message_bytes = max(_LEAST_MESSAGE_BYTES, size)

    def check_resume(self, peer: Position) -> None:
        """Raise TunnelError if the peer's counts are impossible."""
        if not self.delivered <= peer.delivered <= peer.received <= self.taken:
            raise TunnelError(
                f"resume at {peer.delivered}, {peer.received};"
                f" {self.delivered} were acked, {self.taken} sent"
            )

    def resume(self, peer: Position) -> None:
        """Send from the peer's position on a new channel. The caller MUST check_resume() first."""
        self._free(peer.delivered)
        self.sent, self.limit = peer.received, peer.limit
        self.eof_sent = self.eof_acked = False
        self._unsent.clear()
        at = self._kept_from
        for piece in self._kept:
            skipped = max(0, peer.received - at)
            if skipped < len(piece):
                # Copy a merged piece, which is small: a bytearray cannot grow under a view.
                # Copy no other piece: a view costs no memory while the piece is kept.
                whole = bytes(piece) if isinstance(piece, bytearray) else piece
                self._unsent.append(memoryview(whole)[skipped:])
            at += len(piece)

    def forget(self) -> None:
        """Free all kept bytes: no resume can follow."""
        self._kept.clear()
        self._unsent.clear()
        self._kept_from = self.taken

    def _free(self, delivered: int) -> None:
        self.delivered = delivered
        while self._kept and self._kept_from + len(self._kept[0]) <= delivered:
            self._kept_from += len(self._kept.popleft())


class ReceiveStream:
    """The bytes that this end receives and delivers. Not thread-safe."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self._window = Window(max_window_bytes)
        self.limit = self.window
        self.received = 0
        self.delivered = 0
        self.eof_at: int | None = None
        self.eof_delivered = False
        # On the present channel only, as are the two below.
        self.eof_acked = False
        self._eof_came = False
        self._acked = 0

    @property
    def window(self) -> int:
        """The most bytes that the limit may be beyond `delivered`."""
        return self._window.size

    def on_data(self, size: int, now: float) -> None:
        """Record `size` received bytes; raises TunnelError for an overrun."""
        if self.eof_at is not None:
            raise TunnelError("data after eof")
        if self.received + size > self.limit:
            raise TunnelError(f"window overrun: {self.received + size} over {self.limit}")
        self.received += size
        self._window.on_data(size, self.received, now)

    def on_eof(self, count: int) -> None:
        """Record the peer's eof, once a channel; raises TunnelError if the counts differ."""
        if count != self.received:
            raise TunnelError(f"eof after {count} bytes, {self.received} came")
        if self._eof_came:
            raise TunnelError("a second eof")
        self._eof_came = True
        self.eof_at = count

    def on_delivered(self, size: int, now: float, *, drained: bool) -> Ack | None:
        """Record that `size` bytes were delivered; return the ack, if one is due.

        The caller MUST have written the bytes: an ack on arrival would defeat the
        window. `drained`: the receive queue is empty.
        """
        self.delivered += size
        unacked = self.delivered - self._acked
        # A quarter of the granted window: the peer does not know of growth since the last ack.
        granted = min(self.window, self.limit - self._acked)
        if unacked * 4 < granted and not (drained and unacked >= _DRAINED_ACK_BYTES):
            return None
        return self._ack(now)

    def on_eof_delivered(self, now: float) -> Ack | None:
        """Record that the eof was delivered; return its ack, which is due at once.

        None if the peer has not yet sent the eof on this channel; the ack follows then. The
        caller MUST set `eof_acked` once the ack is queued.
        """
        self.eof_delivered = True
        return self._ack(now) if self._eof_came else None

    @property
    def owes_ack(self) -> bool:
        """Whether an ack is due as soon as no more data is ready."""
        return self.delivered - self._acked >= _DRAINED_ACK_BYTES

    def _ack(self, now: float) -> Ack:
        before = self.limit
        self.limit = min(MAX_COUNT, max(before, self.delivered + self.window))
        self._acked = self.delivered
        if self.limit > before:
            self._window.on_limit(before, self.received - self.delivered, now)
        return Ack(self.delivered, self.limit, self.eof_delivered and self._eof_came)

    def resume(self) -> Position:
        """Restart the counts for another channel; return the position for the peer.

        The caller MUST ignore all later messages on earlier channels.
        """
        self._window.begin()
        self.limit = max(self.received, self.delivered + self.window)
        self._acked = self.delivered
        self._eof_came = self.eof_acked = False
        return Position(self.received, self.delivered, self.limit)


class Stream:
    """Both directions of a tunnel at one end."""

    def __init__(self, max_window_bytes: int = DEFAULT_MAX_WINDOW_BYTES) -> None:
        self.out = SendStream()
        self.into = ReceiveStream(max_window_bytes)

    @property
    def is_finished(self) -> bool:
        """Whether both eofs were delivered and acknowledged on one channel."""
        return self.out.eof_acked and self.into.eof_acked


# --- http_network_relay/end/state.py --------------------------------------------------------------
# The states of one end of a tunnel, and the data shared by both directions.


class EndState(enum.Enum):
    """The states of one end of a tunnel (docs/architecture.md, "States")."""

    OPENING = "opening"
    OPEN = "open"
    # The leg is lost; a resume may follow.
    DETACHED = "detached"
    # Both eofs were delivered and acknowledged.
    FINISHED = "finished"
    # This end has reset the tunnel; the reason answers a resume.
    RESET = "reset"
    # The peer, the loss of the leg or this program has ended the tunnel; no reset is sent.
    ENDED = "ended"
    # No resume came within the grace period.
    EXPIRED = "expired"

    def __init__(self, word: str) -> None:
        self.has_error = word in ("reset", "ended", "expired")
        self.is_over = self.has_error or word == "finished"


# Any other transition is a bug.
END_TRANSITIONS: dict[EndState, tuple[EndState, ...]] = {
    EndState.OPENING: (EndState.OPEN, EndState.RESET, EndState.ENDED),
    # OPEN to OPEN: a newer attempt to resume replaces the channel.
    EndState.OPEN: (
        EndState.OPEN,
        EndState.DETACHED,
        EndState.FINISHED,
        EndState.RESET,
        EndState.ENDED,
    ),
    EndState.DETACHED: (EndState.OPEN, EndState.RESET, EndState.ENDED, EndState.EXPIRED),
    # A resume repeats a last ack that was lost with the user's leg.
    EndState.FINISHED: (EndState.OPEN,),
    EndState.RESET: (),
    EndState.ENDED: (),
    EndState.EXPIRED: (),
}


class EndCore:
    """The lock, the state, the streams and the present channel of one end.

    A single read of a field needs no lock. Only this class's methods change a field.
    """

    def __init__(
        self, channel: Channel, max_window_bytes: int, on_change: Callable[[], None]
    ) -> None:
        """`on_change`: called without the lock after credit, the leg's loss or the end."""
        self.on_change = on_change
        # Guards the whole end. Messages are queued under the lock, which keeps their order;
        # push() follows the release.
        self.lock = threading.Lock()
        # Notified of every event for which a thread of the tunnel waits.
        self.changed = threading.Condition(self.lock)
        self.stream = Stream(max_window_bytes)
        self.state = EndState.OPENING
        # None while no leg carries the tunnel.
        self.channel: Channel | None = channel
        # Seconds for which both ends keep a detached tunnel; 0 until the tunnel is open.
        self.grace_s = 0.0
        # The reason of an unclean end. The first reason counts.
        self.ended: RelayError | None = None
        # The deadline to deliver bytes received before the end.
        self.deliver_until = float("inf")
        # The time and the reason of the newest loss of a leg.
        self.detached_at = 0.0
        self._lost: RelayError | None = None

    @property
    def is_over(self) -> bool:
        """Whether the tunnel is finished or has ended."""
        return self.state.is_over

    def is_stale_locked(self, channel: Channel, message: str) -> bool:
        """Whether a message is too late to count; raises TunnelError for a message too early."""
        assert self.lock.locked()
        if channel is not self.channel or self.state.has_error:
            return True
        if self.state is EndState.OPENING:
            raise TunnelError(f"{message} before the tunnel was open", channel.channel_id)
        return False

    def open_locked(self, limit: int, grace_s: float) -> None:
        """Apply the peer's limit and the grace period from `open` or `opened`."""
        assert self.lock.locked()
        self.grace_s = grace_s
        self.stream.out.limit = limit
        self._change_locked(EndState.OPEN)

    def attach_locked(self, channel: Channel) -> None:
        """Make `channel` the present channel."""
        assert self.lock.locked()
        self.channel = channel
        self._change_locked(EndState.OPEN)

    def detach_locked(self, error: RelayError) -> bool:
        """Detach, or end if no resume can follow; return whether the end is detached."""
        assert self.lock.locked()
        if self.state is not EndState.OPEN or self.grace_s <= 0:
            self.end_locked(EndState.ENDED, error)
            return False
        self.channel = None
        self.detached_at, self._lost = time.monotonic(), error
        self._change_locked(EndState.DETACHED)
        return True

    def finish_locked(self) -> None:
        """Finish the tunnel if the eofs of both directions are acknowledged."""
        assert self.lock.locked()
        if self.stream.is_finished and self.state is EndState.OPEN:
            self._change_locked(EndState.FINISHED)

    def end_locked(self, state: EndState, error: RelayError, deliver_s: float = FLUSH_S) -> None:
        """End with `error`; earlier bytes may be delivered for another `deliver_s` seconds."""
        assert self.lock.locked()
        # Set before the state: a thread without the lock reads the state first.
        self.ended, self.deliver_until = error, time.monotonic() + deliver_s
        self.stream.out.forget()
        self._change_locked(state)

    def _change_locked(self, state: EndState) -> None:
        assert self.lock.locked()
        assert state in END_TRANSITIONS[self.state], (self.state, state)
        self.state = state
        self.changed.notify_all()

    def resume_left_locked(self) -> float | None:
        """Return the seconds left of the grace period; None if the tunnel is not detached."""
        assert self.lock.locked()
        if self.state is not EndState.DETACHED:
            return None
        return max(0.0, self.detached_at + self.grace_s - time.monotonic())

    def expire_locked(self) -> None:
        """End a detached tunnel whose grace period is over."""
        assert self.lock.locked()
        if self.resume_left_locked() == 0.0 and self._lost is not None:
            self.end_locked(EndState.EXPIRED, self._lost, 0.0)

    def wait_locked(self, is_due: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for `is_due`, at most `timeout_s`; expire a detached tunnel meanwhile."""
        assert self.lock.locked()
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not is_due() and (left_s := until - time.monotonic()) > 0:
            resume_left_s = self.resume_left_locked()
            waits = [s for s in (left_s, resume_left_s) if s is not None and s < float("inf")]
            self.changed.wait(min(waits, default=None))
            self.expire_locked()


# --- http_network_relay/end/inbound.py ------------------------------------------------------------
# The bytes that come in at one end of a tunnel: from the leg's reader to the consumer.


class Inbound:
    """Receives stream bytes and delivers them in order; one thread delivers at a time.

    The leg's reader calls the on_... methods, which never wait. It delivers at once what the
    consumer takes without a wait. The consumer's thread delivers the rest from a queue.
    """

    def __init__(self, core: EndCore) -> None:
        self._core = core
        self._into = core.stream.into
        # The core's lock guards all below. Bytes that wait for the consumer:
        self._queue: deque[Any] = deque()
        # Takes bytes without a wait and returns how many.
        self._deliver: Callable[[Any], int] | None = None
        self._reader_delivers = False
        self._consumer_delivers = False

    # The leg's reader. Raises TunnelError for what breaks the protocol.

    def on_data(self, channel: Channel, data: Any) -> bool:
        """Deliver stream bytes, or queue them for the consumer.

        Returns:
            Whether the caller MUST call on_pause() when nothing more comes.
        """
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "data"):
                return False
            self._into.on_data(len(data), time.monotonic())
            is_busy = self._consumer_delivers or self._reader_delivers or self._queue
            deliver = self._deliver
            if deliver is None or is_busy:
                append_merged(self._queue, data)
                core.changed.notify_all()
                return False
            self._reader_delivers = True
        # A hand-over to the consumer's thread costs more than the delivery.
        try:
            count = deliver(data)
        except OSError:
            count = 0  # The consumer's thread meets the same error, and reports it.
        with core.lock:
            self._reader_delivers = False
            if count < len(data):
                self._queue.appendleft(memoryview(data)[count:])
            if self.has_news_locked() or self._deliver is None:
                core.changed.notify_all()
            # More may be on its way, by this thread: only a pause means that all is drained.
            has_ack, newest = self._count_locked(count, drained=False), core.channel
            owes_ack = self._into.owes_ack
        if has_ack and newest is not None:
            newest.push()
        return owes_ack

    def on_pause(self, channel: Channel) -> None:
        """Send the ack that is due when nothing more comes for the moment."""
        with self._core.lock:
            is_newest = channel is self._core.channel
            if not is_newest or self._queue or not self._into.owes_ack:
                return
            has_ack = self._count_locked(0, drained=True)
        if has_ack:
            channel.push()

    def on_eof(self, channel: Channel, count: int) -> None:
        """Note that no byte follows."""
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "eof"):
                return
            self._into.on_eof(count)
            if self._into.eof_delivered:  # A resume made the peer repeat its eof.
                self._ack_eof_locked()
            core.changed.notify_all()
        channel.push()
        core.on_change()

    # The consumer's thread.

    def deliver_directly(self, deliver: Callable[[Any], int] | None) -> None:
        """Let the leg's reader deliver through `deliver`, which MUST NOT wait.

        `deliver` returns how many bytes were taken; the rest, and an OSError, are left to the
        consumer's thread. None ends this; after the return no thread is inside `deliver`.
        """
        with self._core.lock:
            self._deliver = deliver
            while deliver is None and self._reader_delivers:
                self._core.changed.wait()

    def next_chunk(self) -> Any:
        """Wait for bytes to deliver; b"" is the eof, None the end of the tunnel.

        The caller MUST call delivered() after each chunk, and delivered_eof() after the eof.
        """
        core = self._core
        with core.lock:
            self._consumer_delivers = False
            core.wait_locked(self.has_news_locked)
            if core.state.has_error and time.monotonic() >= core.deliver_until:
                return None
            if self._queue:
                self._consumer_delivers = True
                return self._queue.popleft()
            return b"" if self._eof_is_due_locked() else None

    def has_news_locked(self) -> bool:
        """Whether next_chunk() would not wait."""
        assert self._core.lock.locked()
        if self._reader_delivers:
            return False  # The next chunk would overtake the reader, who never waits.
        return bool(self._queue) or self._core.state.has_error or self._eof_is_due_locked()

    def _eof_is_due_locked(self) -> bool:
        assert self._core.lock.locked()
        into = self._into
        return into.eof_at is not None and not into.eof_delivered and not self._queue

    def delivered(self, size: int) -> None:
        """Count a chunk of `size` bytes as delivered; send the ack that is due."""
        with self._core.lock:
            self._consumer_delivers = False
            channel = self._core.channel
            has_ack = self._count_locked(size, drained=not self._queue)
        if has_ack and channel is not None:
            channel.push()

    def delivered_eof(self) -> None:
        """Count the eof as delivered; its ack goes at once, or on the next leg."""
        core = self._core
        with core.lock:
            self._ack_eof_locked()
            core.changed.notify_all()
            channel = core.channel
        if channel is not None:
            channel.push()
        core.on_change()

    # Any thread.

    def resumed_locked(self) -> None:
        """Acknowledge what was delivered since this end told the peer its position."""
        assert self._core.lock.locked()
        self._count_locked(0, drained=not self._queue)

    def clear(self) -> None:
        """Free the bytes that wait."""
        with self._core.lock:
            self._queue.clear()

    def _count_locked(self, size: int, *, drained: bool) -> bool:
        """Count delivered bytes; return whether the caller must push an ack."""
        assert self._core.lock.locked()
        channel = self._core.channel
        if channel is None:
            self._into.delivered += size  # The resume tells the peer, or the ack behind it.
            return False
        ack = self._into.on_delivered(size, time.monotonic(), drained=drained)
        if ack is None or self._core.state.has_error:
            return False
        channel.put_ack(ack)
        return True

    def _ack_eof_locked(self) -> None:
        assert self._core.lock.locked()
        core, channel = self._core, self._core.channel
        ack = self._into.on_eof_delivered(time.monotonic())
        if ack is not None and channel is not None and not core.state.has_error:
            channel.put_ack(ack)
            # After the ack: whoever sees the tunnel finished may close the leg behind that ack.
            self._into.eof_acked = True
            core.finish_locked()


# --- http_network_relay/end/outbound.py -----------------------------------------------------------
# The bytes that go out at one end of a tunnel: from the producer to the leg.


class Outbound:
    """Sends stream bytes as far as the credit allows, then the eof or the reset."""

    def __init__(self, core: EndCore) -> None:
        self._core = core
        self._out = core.stream.out
        # The core's lock guards both.
        self._consumer_failed = False
        # A reset that waits until the bytes before it have gone out.
        self._due_reset: RelayError | None = None

    def on_ack(self, channel: Channel, ack: Ack) -> None:
        """Take an ack in. The leg's reader; raises TunnelError for an impossible one."""
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "ack"):
                return
            was_out_of_credit = self._out.credit == 0
            self._out.on_ack(ack)
            self.flush_locked()
            if ack.eof:
                core.finish_locked()
            # A producer with credit has no need to be woken.
            is_news = was_out_of_credit or core.state.is_over
            if is_news:
                core.changed.notify_all()
        channel.push()
        if is_news:
            core.on_change()

    # The producer's thread.

    def credit(self) -> int:
        """Return how many bytes to take from the source now; 0: none, or there is no leg."""
        return self._out.credit if self._core.state is EndState.OPEN else 0

    def wait_credit(self) -> int:
        """Wait until bytes may be taken; return how many, 0 when the tunnel is over."""
        with self._core.lock:
            self._core.wait_locked(lambda: self._core.state.is_over or self.credit() > 0)
            return self.credit()

    def send(self, data: Any) -> None:
        """Send bytes, credit() at most. They are kept until the peer has delivered them."""
        with self._core.lock:
            if not self._core.state.has_error:
                self._out.take(data)
                self.flush_locked()
            channel = self._core.channel
        if channel is not None:
            channel.push()

    def send_eof(self) -> bool:
        """End our direction; False if the consumer failed before, so that a reset is due."""
        with self._core.lock:
            if not self._core.state.has_error:
                if self._consumer_failed:
                    return False
                self._out.end()
                self.flush_locked()
            return True

    def wait_sent(self, timeout_s: float) -> None:
        """Wait until no taken byte waits for credit, as some may after a resume."""
        with self._core.lock:
            self._core.wait_locked(
                lambda: self._core.state is not EndState.OPEN or not self._out.waits_for_credit,
                timeout_s,
            )

    # Any thread.

    def fail_consumer(self) -> bool:
        """Note that the consumer takes no more; return whether a reset is due at once."""
        with self._core.lock:
            self._consumer_failed = True
            return self._out.is_ended

    def flush_locked(self) -> None:
        """Queue what the credit allows, and the eof or the reset behind the last byte."""
        assert self._core.lock.locked()
        channel, out = self._core.channel, self._out
        if channel is None:
            return
        while (piece := out.next_piece()) is not None:
            channel.put_data(piece)
        if (count := out.next_eof()) is not None:
            channel.put_eof(count)
        if self._due_reset is not None:
            self.reset_locked(self._due_reset)

    def reset_locked(self, error: RelayError, deliver_s: float = FLUSH_S) -> None:
        """Queue a reset and end the tunnel.

        What the target said before its own reset goes out first, after a resume if need be.
        """
        assert self._core.lock.locked()
        channel = self._core.channel
        is_blocked = channel is None or self._out.waits_for_credit
        if error.code == "target_reset" and is_blocked:
            self._due_reset = error
            return
        if channel is not None:
            channel.put_reset(error)
        self._core.end_locked(EndState.RESET, error, deliver_s)


# --- http_network_relay/end/tunnel_end.py ---------------------------------------------------------
# One end of a tunnel, between its leg and its two threads: what client and proxy command share.
# The end outlives its legs: a detached end waits for a resume on another leg
# (docs/protocol.md, "Resume").


class TunnelEnd(EndCore):
    """The thread-safe state of one end, and its two directions.

    A method that takes a `channel` does nothing if that is not the newest: what comes late
    on another leg or channel must not count.
    """

    def __init__(
        self,
        channel: Channel,
        max_window_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(channel, max_window_bytes, on_change)
        self.inbound = Inbound(self)
        self.outbound = Outbound(self)

    # One read each; none needs the lock.

    @property
    def is_finished(self) -> bool:
        """Whether both directions ended cleanly and both ends know."""
        return self.state is EndState.FINISHED

    @property
    def is_detached(self) -> bool:
        """Whether the end has no leg, and may be resumed."""
        return self.state is EndState.DETACHED

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes taken for sending and bytes delivered, for the log."""
        return self.stream.out.taken, self.stream.into.delivered

    @property
    def first_limit(self) -> int:
        """The bytes that the peer may send at first, for `open` or `opened`."""
        return self.stream.into.limit

    # The leg's reader, or whoever opens the tunnel.

    def on_open(self, limit: int, grace_s: float) -> bool:
        """Take the peer's first limit; False if the end came first."""
        with self.lock:
            if self.is_over:
                return False
            self.open_locked(limit, grace_s)
            return True

    def on_end(self, error: RelayError) -> None:
        """End the tunnel without a word to the peer; bytes that came are still delivered."""
        with self.lock:
            if self.is_over:
                return
            self.end_locked(EndState.ENDED, error)
        self.on_change()

    def on_reset(self, channel: Channel, error: RelayError) -> None:
        """The peer has ended the tunnel."""
        with self.lock:
            if channel is not self.channel or self.is_over:
                return
            self.end_locked(EndState.ENDED, error)
        self.on_change()

    def detach(self, channel: Channel, error: RelayError) -> bool:
        """The leg is lost: wait for a resume, or end with `error` if none can come.

        Returns:
            Whether the end waits.
        """
        with self.lock:
            if channel is not self.channel or self.is_over:
                return False
            waits = self.detach_locked(error)
        channel.drop()
        self.on_change()
        return waits

    # Any thread.

    def reset(
        self, error: RelayError, channel: Channel | None = None, *, deliver_s: float = FLUSH_S
    ) -> None:
        """End the tunnel with an error and tell the peer; nothing if it is over already.

        `channel`: only if that is still the newest.
        """
        with self.lock:
            if self.is_over or (channel is not None and channel is not self.channel):
                return
            self.outbound.reset_locked(error, deliver_s)
        self.on_change()

    def resume_left_s(self) -> float:
        """Return for how long a resume may still come; ends a tunnel whose grace is over."""
        with self.lock:
            self.expire_locked()
            return self.resume_left_locked() or 0.0

    def wait_over(self, timeout_s: float | None = None) -> None:
        """Wait until the tunnel is finished or ended."""
        with self.lock:
            self.wait_locked(lambda: self.is_over, timeout_s)

    def _attach_locked(self, channel: Channel, peer: Position) -> None:
        """Go on, on `channel`, from where the peer stands."""
        assert self.lock.locked()
        self.stream.out.resume(peer)
        self.attach_locked(channel)
        self.inbound.resumed_locked()
        self.outbound.flush_locked()


# --- http_network_relay/end/user_end.py -----------------------------------------------------------
# The proxy command's end of a tunnel: asks for a resume when its leg is lost.


class UserEnd(TunnelEnd):
    """The end that resumes."""

    @property
    def has_both_eofs(self) -> bool:
        """Whether our source ended and the peer's eof was delivered; acks may be missing."""
        return self.stream.out.is_ended and self.stream.into.eof_delivered

    def begin_resume(self) -> Position:
        """Return the position for `resume`. Only while detached: all channels are stale then."""
        with self.lock:
            return self.stream.into.resume()

    def on_resumed(self, channel: Channel, peer: Position) -> None:
        """Go on, on `channel`, after the peer's `resumed`. Raises TunnelError."""
        with self.lock:
            if self.is_over:
                return
            self.stream.out.check_resume(peer)
            self._attach_locked(channel, peer)
        channel.push()
        self.on_change()


# --- http_network_relay/end/read_coalescer.py -----------------------------------------------------
# Computes the wait before a read, so that one read returns several small writes.
# Each small write of a fast source wakes three programs; these wake-ups are most of such a
# stream's cost. No thread and no I/O: the caller waits.

# Smaller pieces may be keystrokes and their echoes, which never wait.
_LEAST_BYTES = 4 * 1024
# A source is fast after `_TIMES` pieces in a row, each within `_SOON_S` of the last.
_SOON_S = 0.001
_TIMES = 4
# The first and the longest wait; two messages take the longest at 200 Mbit/s.
_FIRST_GATHER_S = 0.0025
_LONGEST_GATHER_S = 0.005
# The intended fill of a read. At 1, a small read would follow each full one.
_AIM = 7 / 8
# The wait's factor after a full read, which does not show how many bytes were ready.
_SHORTER = 0.75
# A source that fills a read within `_SHORTEST_S` could block during a wait: a pipe holds no
# more than one message. The next `_HOLD_OFF` reads do not wait.
_SHORTEST_S = 0.0005
_HOLD_OFF = 1000


class ReadCoalescer:
    """Observes the reads of one source. For the thread that reads the source."""

    def __init__(self, read_bytes: int) -> None:
        """`read_bytes`: the size of a read with sufficient credit."""
        self._read_bytes = read_bytes
        # The time from which the next read was possible.
        self._ready_at = float("-inf")
        # Quick small pieces in a row; below 0, minus the number of reads still without a wait.
        self._times = 0
        self._gather_s = _FIRST_GATHER_S
        # A piece that takes longer than this is not quick.
        self._soon_s = _SOON_S

    def wait_s(self, size: int, wanted: int, now: float) -> float:
        """Return the seconds to wait before the next read, after one of `size` bytes at `now`.

        `wanted` is the requested size: less than a whole read if credit was short.
        """
        waits_s = 0.0
        if size < _LEAST_BYTES or now - self._ready_at >= self._soon_s:
            self._times = min(0, self._times)
        elif self._times < _TIMES:
            self._times = self._times + 1 if size < wanted or self._times < 0 else 0
            self._gather_s = _FIRST_GATHER_S
            if self._times == _TIMES:
                waits_s = self._gather_s
        elif size < wanted or wanted == self._read_bytes:
            factor = _AIM * self._read_bytes / size if size < wanted else _SHORTER
            self._gather_s = min(_LONGEST_GATHER_S, self._gather_s * factor)
            if self._gather_s < _SHORTEST_S:
                self._times = -_HOLD_OFF
            else:
                waits_s = self._gather_s
        self._ready_at = now + waits_s
        # A sleep may overrun; the overrun must not count as slowness of the source.
        self._soon_s = max(_SOON_S, waits_s)
        return waits_s


# --- http_network_relay/dial/deadline.py ----------------------------------------------------------
# The deadline of a dial: one object for all its waits, made once and passed down.

# RFC 8305, "Connection Attempt Delay": a dead first address costs this much.
STAGGER_S = 0.250


class Deadline:
    """Ends a dial after `timeout_s`, or soon after `is_cancelled` returns true."""

    def __init__(self, timeout_s: float, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._at = time.monotonic() + timeout_s
        self._is_cancelled = is_cancelled

    def slice_s(self) -> float:
        """Return how long to wait, in seconds, before the next check()."""
        return max(0.0, min(STAGGER_S, self._at - time.monotonic()))

    def check(self, failure: str) -> None:
        """Raise DialError with the sentence `failure` if the dial must end."""
        if self._is_cancelled():
            raise DialError("cancelled", f"{failure} before the dial was cancelled")
        if time.monotonic() >= self._at:
            raise DialError("timeout", f"{failure} in time")

    def wait_ready(self, sock: socket.socket, *, write: bool, what: str) -> None:
        """Wait for the peer `what` behind the socket. Raises DialError."""
        while not wait_ready(sock, write=write, timeout_s=self.slice_s()):
            self.check(f"{what} did not answer")


# --- http_network_relay/dial/names.py -------------------------------------------------------------
# Name lookups within a deadline, in a bounded number of daemon threads.

# The most lookups at a time. A lookup that hangs keeps its thread and its slot.
_lookup_slots = threading.BoundedSemaphore(32)


def resolve(host: str, port: int, deadline: Deadline) -> list[Any]:
    """Return getaddrinfo's answers, the address families in turns. Raises DialError."""
    if parse_address(host.strip("[]")) is not None:
        # No lookup: an address must not wait for a slot behind names that hang.
        return _by_turns(_look_up(host, port))
    failure = f"the name {host} could not be looked up"
    while not _lookup_slots.acquire(timeout=deadline.slice_s()):
        deadline.check(failure)
    answers: list[Any] = []
    is_done = threading.Event()

    def look_up() -> None:
        try:
            answers.append(_look_up(host, port))
        except (OSError, UnicodeError) as exc:
            answers.append(exc)
        finally:
            _lookup_slots.release()
            is_done.set()

    # A daemon: getaddrinfo has no timeout, and nothing can wake the thread.
    thread = threading.Thread(target=look_up, name=f"lookup:{host}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _lookup_slots.release()
        raise
    while not is_done.wait(deadline.slice_s()):
        deadline.check(failure)
    (answer,) = answers
    if isinstance(answer, Exception):
        reason = getattr(answer, "strerror", None) or answer
        raise DialError("unknown", f"the name {host} is not known ({reason})") from answer
    return _by_turns(answer)


def _look_up(host: str, port: int) -> list[Any]:
    # The brackets of an IPv6 literal are the URL's.
    name = encode_name(host.strip("[]"))
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)


def _by_turns(infos: list[Any]) -> list[Any]:
    """Alternate the families, beginning with the first answer's (RFC 8305, 4)."""
    families: dict[int, list[Any]] = {}
    for info in infos:
        families.setdefault(info[0], []).append(info)
    turns: list[Any] = []
    while any(families.values()):
        turns += [group.pop(0) for group in families.values() if group]
    return turns


def parse_address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def encode_name(name: str) -> bytes:
    """Encode as Python's sockets do. Raises UnicodeError for a text that is no name.

    The IDNA codec is for other names than plain ones: its import costs a start 1 ms.
    """
    labels = name.removesuffix(".").split(".")
    is_plain = name.isascii() and all(0 < len(label) < 64 for label in labels)
    return name.encode("ascii" if is_plain else "idna")


# --- http_network_relay/dial/endpoint.py ----------------------------------------------------------
# The server's address: the parsed --server-url.


class Endpoint(NamedTuple):
    """A server's address, and the path and query of its WebSocket."""

    is_tls: bool
    host: str
    port: int
    resource: str

    @property
    def url(self) -> str:
        """The WebSocket URL, without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.is_tls else 'ws'}://{host}:{self.port}{self.resource}"

    @property
    def is_loopback(self) -> bool:
        """Whether bytes in clear stay on this machine."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


def parse_server_url(url: str, default_path: str) -> Endpoint:
    """Read a ws, wss, http or https URL; a URL without a path gets `default_path`.

    Raises RelayError.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        # getaddrinfo and TLS encode the name too; `.example` and `a..b` would fail there.
        encode_name(parts.hostname or "")
    except ValueError as exc:
        # The message omits the URL, which may hold a password.
        raise RelayError("usage", "--server-url is not a URL: look at its host and port") from exc
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise RelayError(
            "usage", "--server-url must look like https://relay.example or ws://127.0.0.1:8000"
        )
    if parts.username is not None or parts.fragment:
        raise RelayError(
            "usage", "--server-url must have no user, password or #fragment; secrets have own flags"
        )
    is_tls = scheme == "wss"
    resource = default_path if parts.path in ("", "/") else parts.path
    if parts.query:
        resource += f"?{parts.query}"
    if not resource.isascii() or not resource.isprintable() or " " in resource:
        raise RelayError("usage", "--server-url has characters that must be %-encoded")
    return Endpoint(is_tls, parts.hostname, port or (443 if is_tls else 80), resource)


# --- http_network_relay/dial/http_proxy.py --------------------------------------------------------
# HTTP CONNECT proxies: which proxy the environment names, and the way through it.

# The head of a proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024


class Proxy(NamedTuple):
    """An HTTP CONNECT proxy."""

    host: str
    port: int
    authorization: str | None


def proxy_for(endpoint: Endpoint, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy for this server. Raises RelayError for one that cannot be used."""
    names = ("https_proxy", "HTTPS_PROXY") if endpoint.is_tls else ("http_proxy", "HTTP_PROXY")
    for name in (*names, "all_proxy", "ALL_PROXY"):
        if value := environ.get(name, "").strip():
            break
    else:
        return None
    no_proxy = environ.get("no_proxy", "") or environ.get("NO_PROXY", "")
    if bypasses_proxy(endpoint.host, endpoint.port, no_proxy):
        return None
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or parts.scheme != "http":
        raise RelayError(
            "usage", f"{name} is not a usable proxy: only http://HOST:PORT is (HTTP CONNECT)"
        )
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        # The environment's own bytes, which need not be UTF-8.
        encoded = base64.b64encode(pair.encode("utf-8", "surrogateescape"))
        authorization = f"Basic {encoded.decode()}"
    return Proxy(host, port or 80, authorization)


def bypasses_proxy(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names this host.

    `example.com` and `.example.com` mean the name and its subdomains, never notexample.com.
    An address means itself, a network in CIDR form its addresses, `host:port` one port,
    `*` every host.
    """
    host = host.lower().rstrip(".")
    address = parse_address(host)
    for raw in no_proxy.lower().split(","):
        entry, entry_port = _split_port(raw.strip())
        if not entry or entry_port not in (None, port):
            continue
        if entry == "*":
            return True
        if address is not None:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry, strict=False):
                    return True
            continue
        suffix = entry.strip(".")
        if suffix and (host == suffix or host.endswith(f".{suffix}")):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int | None]:
    """Split `host:port` and `[v6]:port`; an IPv6 literal alone has no port."""
    found = re.fullmatch(r"\[([^]]*)]?(.*)|([^:]*)(:[^:]*)", entry)
    if found is None:
        return entry, None
    name, port = found[1] or found[3] or "", found[2] or found[4] or ":"
    if port == ":":
        return name, None
    # -1 is no server's port: a malformed entry matches nothing.
    return name, int(port[1:]) if re.fullmatch(r":[0-9]{1,5}", port) else -1


def printable(text: str) -> str:
    """Return at most 300 characters of a peer's text, none of which moves a cursor."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def connect_through(
    sock: socket.socket, proxy: Proxy, endpoint: Endpoint, deadline: Deadline
) -> None:
    """Ask the proxy for a way to the server (RFC 9110, 9.3.6). Raises RelayError."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [f"CONNECT {host}:{endpoint.port} HTTP/1.1", f"Host: {host}:{endpoint.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    what = f"the HTTP proxy {proxy.host}:{proxy.port}"
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii", "replace")
    head = b""
    try:
        deadline.wait_ready(sock, write=True, what=what)
        sock.send(request)  # An empty send buffer takes the whole request.
        while not head.endswith(b"\r\n\r\n"):
            deadline.wait_ready(sock, write=False, what=what)
            # One byte at a time: the server's own bytes follow the head.
            piece = sock.recv(1)
            if not piece or len(head) > _MAX_HEAD_BYTES:
                raise RelayError("proxy_failed", f"{what} ended the connection")
            head += piece
    except OSError as exc:
        raise RelayError("proxy_failed", f"{what} failed: {exc.strerror or exc}") from exc
    status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(status) < 2 or not status[0].startswith("HTTP/1.") or not status[1].startswith("2"):
        said = printable(" ".join(status[1:])) or "something that is not HTTP"
        raise RelayError("proxy_failed", f"{what} answered {said} to CONNECT {host}")


# --- http_network_relay/dial/connect.py -----------------------------------------------------------
# Dials: names, staggered addresses, HTTP CONNECT proxies and TLS, under one deadline.
# websocket-client's own connect is not used: its timeout is for one read, a dead first address
# fails the dial, a redirect gets the secrets, and NO_PROXY is matched loosely.


def dial_tcp(
    host: str,
    port: int,
    deadline: Deadline,
    allows: Callable[[str], bool] = lambda _: True,
) -> socket.socket:
    """Return a blocking socket, connected to the first address that answers.

    Another address is tried every 250 ms, or at once when one fails. `allows` says whether an
    address may be dialled. Raises DialError.
    """
    found = resolve(host, port, deadline)
    infos = [info for info in found if allows(info[4][0])]
    if found and not infos:
        raise DialError("denied", f"the client does not dial {host}:{port}")
    last: OSError | None = None
    next_at = 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                deadline.check(f"{host}:{port} did not answer")
                now = time.monotonic()
                pending = len(selector.get_map())
                if not infos and not pending:
                    raise _dial_error(last, host, port)
                if infos and (now >= next_at or not pending):
                    error = _begin(infos.pop(0), selector)
                    last, next_at = error or last, 0.0 if error else now + STAGGER_S
                    continue
                for key, _ in selector.select(deadline.slice_s()):
                    sock: socket.socket = key.fileobj  # type: ignore[assignment]
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code == 0:
                        _set_options(sock)
                        return sock
                    sock.close()
                    last, next_at = OSError(code, errno.errorcode.get(code, "?")), 0.0
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]


def _begin(info: Any, selector: selectors.BaseSelector) -> OSError | None:
    """Begin to connect, and register the socket; return the error of a failed beginning."""
    family, kind, protocol, _, address = info
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        return exc
    sock.setblocking(False)
    try:
        sock.connect(address)
    except (BlockingIOError, InterruptedError):
        pass
    except OSError as exc:
        sock.close()
        return exc
    selector.register(sock, selectors.EVENT_WRITE)
    return None


def _set_options(sock: socket.socket) -> None:
    sock.setblocking(True)
    # macOS refuses options on a socket that the peer has reset; the first read fails then.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A connection to a host that has vanished ends after about two minutes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _dial_error(error: OSError | None, host: str, port: int) -> DialError:
    code = error.errno if error is not None else None
    if code in (errno.ECONNREFUSED, getattr(errno, "WSAECONNREFUSED", -1)):
        return DialError("refused", f"{host}:{port} refused the connection")
    if code == errno.ETIMEDOUT:
        return DialError("timeout", f"{host}:{port} did not answer in time")
    reason = errno.errorcode.get(code, str(code)) if code else "no address"
    return DialError("unreachable", f"{host}:{port} cannot be reached ({reason})")


def dial_server(
    endpoint: Endpoint,
    context: ssl.SSLContext | None,
    environ: Mapping[str, str],
    deadline: Deadline,
) -> socket.socket:
    """Return a connected, non-blocking socket, after the TLS handshake if the URL asks for TLS.

    Raises RelayError.
    """
    proxy = proxy_for(endpoint, environ)
    host, port = (proxy.host, proxy.port) if proxy else (endpoint.host, endpoint.port)
    what = "the HTTP proxy" if proxy else "the server"
    try:
        sock = dial_tcp(host, port, deadline)
    except DialError as exc:
        code = "proxy_failed" if proxy else "server_unreachable"
        raise RelayError(code, f"cannot reach {what}: {exc}") from exc
    try:
        sock.setblocking(False)
        if proxy:
            connect_through(sock, proxy, endpoint, deadline)
        if endpoint.is_tls:
            sock = _start_tls(sock, endpoint, context or make_context(None), deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def make_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that always verifies; `ca_file` adds a private CA. Raises RelayError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            reason = exc.strerror or "no certificate in it"
            raise RelayError("usage", f"--ca-file {ca_file} cannot be used: {reason}") from exc
    return context


def _start_tls(
    sock: socket.socket, endpoint: Endpoint, context: ssl.SSLContext, deadline: Deadline
) -> ssl.SSLSocket:
    what = f"TLS with {endpoint.host}:{endpoint.port}"
    tls: socket.socket = sock
    try:
        # After a reset, wrap_socket() fails too, but leaves a socket open.
        sock.getpeername()
        tls = context.wrap_socket(
            sock, server_hostname=endpoint.host, do_handshake_on_connect=False
        )
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                deadline.wait_ready(tls, write=False, what=what)
            except ssl.SSLWantWriteError:
                deadline.wait_ready(tls, write=True, what=what)
            else:
                return tls
    except ssl.SSLCertVerificationError as exc:
        tls.close()
        raise RelayError(
            "tls_failed",
            f"the certificate of {endpoint.host} is not trusted ({exc.verify_message});"
            " a private CA is added with --ca-file",
        ) from exc
    # ValueError: a name that no certificate can have.
    except (OSError, ValueError) as exc:
        tls.close()
        reason = getattr(exc, "strerror", None) or exc
        raise RelayError("tls_failed", f"{what} failed: {reason}; check --server-url") from exc
    except BaseException:
        tls.close()
        raise


# --- http_network_relay/dial/keepalive.py ---------------------------------------------------------
# When a leg pings, and when it counts as lost: silence, sleep, another network.

# A machine that slept, or came into another network, pings at once and waits this long.
_AFTER_SLEEP_S = 3.0
# How often to look whether the way to the server goes out by another address.
_LOOK_S = 2.0
# Until the next try to put a ping, when another thread is inside the queue.
_RETRY_S = 0.01
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def far_peer(sock: Any) -> Any:
    """Return the address of a peer on another machine, None for one that is here."""
    try:
        peer = sock.getpeername() if sock.family in _INTERNET else None
    except OSError:
        return None
    return None if peer is None or ipaddress.ip_address(peer[0]).is_loopback else peer


def _source_address(peer: Any) -> str | None:
    """Return the local address of the route to `peer`, a getpeername(); None without a route.

    No packet is sent, and nothing waits: the kernel looks into its routes.
    """
    family = socket.AF_INET if len(peer) == 2 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError:
        return None


class Keepalive:
    """The pings and the patience of one leg. The timer's thread alone uses it."""

    def __init__(
        self, frame_sender: FrameSender, duplex: DuplexSocket, peer: Any, ping_interval_s: float
    ) -> None:
        """`peer` is a far_peer(): on this machine the way to the server never changes."""
        self._frame_sender = frame_sender
        self._duplex = duplex
        self._peer = peer
        self._ping_interval_s = ping_interval_s
        self._ping_at = time.monotonic() + ping_interval_s
        self._woke_at = 0.0
        self._look_at = float("inf") if peer is None else 0.0
        # The address that the server was reached from last.
        self._source: str | None = None

    def tick(self, now: float, *, slept: bool) -> float:
        """Ping if that is due; return when to be called again. Never writes, never waits.

        Raises RelayError when nothing was heard for too long.
        """
        if slept or self._has_moved(now):
            self._woke_at = self._ping_at = now
        heard_at = self._duplex.heard_at
        if heard_at < self._woke_at:
            silent_at = self._woke_at + _AFTER_SLEEP_S
        else:
            silent_at = heard_at + SILENCE_INTERVALS * self._ping_interval_s
        if now >= silent_at:
            silence = f"nothing was heard from the server for {now - heard_at:.0f} s"
            raise RelayError(Code.LEG_LOST, silence)
        if now >= self._ping_at:
            is_put = self._frame_sender.try_put_leg("ping", Frame(OP_PING, b"", b""))
            self._ping_at = now + (self._ping_interval_s if is_put else _RETRY_S)
        return min(self._ping_at, silent_at, self._look_at)

    def _has_moved(self, now: float) -> bool:
        """Return whether the server is reached from another address than before.

        A laptop that changes its Wi-Fi: the old connection is dead, and nothing reports it.
        """
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_S
        before, after = self._source, _source_address(self._peer)
        if after is not None:  # No network: the address of before may come back.
            self._source = after
        return None not in (before, after) and before != after


# --- http_network_relay/dial/refusal.py -----------------------------------------------------------
# The HTTP answer that refuses a WebSocket: the relay's own, or that of something before it.

# A `Retry-After` counts up to here: a typo must not stop a client for years.
_MAX_RETRY_AFTER_S = 300.0
# By HTTP status, where the body has no code of the server.
_CODES = {401: Code.UNAUTHORIZED, 403: Code.FORBIDDEN, 426: Code.VERSION_UNSUPPORTED}
_CODES |= {429: Code.BUSY, 503: Code.BUSY}


def header_number(text: str) -> float | None:
    """Read a header's number; None for anything else, however long."""
    return float(text) if text.isascii() and text.isdecimal() else None


def refusal(endpoint: Endpoint, status: int, headers: Mapping[str, str], body: bytes) -> RelayError:
    """Return the error for an answer; `headers` have names in lower case."""
    where = f"{endpoint.host}:{endpoint.port}"
    location = headers.get("location")
    if 300 <= status < 400 and location:
        return RelayError(
            Code.NOT_A_RELAY,
            f"{where} redirects to {printable(location)}; redirects are not followed with"
            " secrets, so give that address as --server-url if it is right",
        )
    if RELAY_HEADER.lower() not in headers:
        server = printable(headers.get("server", "unknown"))
        return RelayError(
            Code.NOT_A_RELAY,
            f"something before the relay answered {status}, Server: {server};"
            f" check --server-url {endpoint.url}",
        )
    try:
        answer = json.loads(body)
        code, message = str(answer["code"]), printable(str(answer["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"it answered {status}"
    if find_code(code) in (None, Code.INTERNAL_ERROR):  # Of the server, not of the tunnel.
        code = _CODES.get(status, Code.SERVER_FAILED)
    retry_after_s = header_number(headers.get("retry-after", ""))
    if retry_after_s is not None:
        retry_after_s = min(retry_after_s, _MAX_RETRY_AFTER_S)
    return RelayError(code, f"the relay at {where}: {message}", retry_after_s=retry_after_s)


# --- http_network_relay/dial/connection.py --------------------------------------------------------
# One leg of a client or a proxy command: a WebSocket over websocket-client.
# The library makes the handshake and reads odd frames. Its recv() and send() are not used: they
# answer pings under the send lock, and bound neither time nor size. Threads: one reader calls
# receive(), a writer runs the frame sender, the timer calls tick(). Any thread may put frames,
# or call close() and abort().

# The whole way from the name lookup to the 101.
DIAL_SERVER_S = 20.0
# Of an answer to the handshake: a head, and the body of a refusal.
_MAX_ANSWER_BYTES = 64 * 1024


def websocket_client() -> Any:
    """Import websocket-client late: the import costs a start 50 ms and may be missing."""
    try:
        import websocket
    except ImportError as exc:
        raise RelayError(
            "usage",
            "the Python package websocket-client is missing:"
            " `pip install websocket-client`, or `apt install python3-websocket`",
        ) from exc
    if not hasattr(websocket, "frame_buffer") or not hasattr(websocket, "WebSocket"):
        raise RelayError(
            "usage",
            "the Python module `websocket` here is another package of that name:"
            " `pip uninstall websocket`, then `pip install websocket-client`",
        )
    # For Debian 12's version, a close with 1012 (the server restarts) is a bad frame.
    known = getattr(websocket._abnf, "VALID_CLOSE_STATUS", ())
    if CloseCode.RESTART not in known:
        websocket._abnf.VALID_CLOSE_STATUS = (*known, CloseCode.RESTART)
    return websocket


class _HandshakeSocket:
    """What the library gets as a socket: every call ends by one deadline.

    Keeps the bytes that were read behind the head, and ignores the library's close(), so that
    the body of a refusal can be read with every version of the library.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._taken = 0
        self.buffer = b""

    def gettimeout(self) -> None:
        return None

    def settimeout(self, _: float | None) -> None:
        pass

    def close(self) -> None:
        pass

    def recv(self, size: int) -> bytes:
        while not self.buffer:
            try:
                # Small: the library takes single bytes, and each call copies the rest.
                self.buffer = self._sock.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._deadline.wait_ready(self._sock, write=False, what="the server")
            else:
                if not self.buffer:
                    return b""
        piece, self.buffer = self.buffer[:size], self.buffer[size:]
        self._taken += len(piece)
        if self._taken > _MAX_ANSWER_BYTES:
            raise RelayError("not_a_relay", "the answer to the WebSocket handshake is too long")
        return piece

    def send(self, data: Any) -> int:
        while True:
            try:
                return self._sock.send(data)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._deadline.wait_ready(self._sock, write=True, what="the server")


def connect(
    endpoint: Endpoint,
    headers: list[str],
    *,
    context: ssl.SSLContext | None,
    environ: Mapping[str, str],
    ping_interval_s: float,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Connection:
    """Dial, upgrade and return the leg; raises RelayError, within 20 s."""
    library = websocket_client()
    deadline = Deadline(DIAL_SERVER_S, is_cancelled)
    sock = dial_server(endpoint, context, environ, deadline)
    shim = _HandshakeSocket(sock, deadline)
    # With TLS or on this machine nothing between the two ends reads the bytes: a mask of zero
    # does, if the server agrees.
    is_here = endpoint.is_loopback and far_peer(sock) is None  # No proxy on another machine.
    asks_for_zero = endpoint.is_tls or is_here
    if asks_for_zero:
        headers = [*headers, f"{MASK_HEADER}: {MASK_ZERO}"]
    try:
        answered = _upgrade(library, endpoint, headers, shim).get(MASK_HEADER.lower())
    except BaseException:
        sock.close()
        raise
    make_key = _zero_key if asks_for_zero and answered == MASK_ZERO else _random_key
    return Connection(library, sock, shim.buffer, ping_interval_s, make_key)


def _zero_key() -> bytes:
    return ZERO_KEY


def _random_key() -> bytes:
    return os.urandom(4)


def _upgrade(library: Any, endpoint: Endpoint, headers: list[str], shim: Any) -> Mapping[str, str]:
    """Make the handshake; return the headers of its answer, names in lower case."""
    where = f"{endpoint.host}:{endpoint.port}"
    web_socket = library.WebSocket()
    refused: tuple[int, Mapping[str, str], bytes | None] | None = None
    try:
        web_socket.connect(
            endpoint.url,
            socket=shim,
            header=headers,
            subprotocols=[SUBPROTOCOL],
            suppress_origin=True,
            redirect_limit=0,
        )
        status = web_socket.status
    except library.WebSocketBadStatusException as exc:
        # Version 1.2.3 gives neither headers nor body by name.
        found = getattr(exc, "resp_headers", None) or {}
        refused = (exc.status_code, found, getattr(exc, "resp_body", None))
        status = exc.status_code
    except library.WebSocketConnectionClosedException as exc:
        raise RelayError("server_unreachable", f"{where} ended the WebSocket handshake") from exc
    except library.WebSocketException as exc:
        status = web_socket.status
        if status is None or status == 101:
            raise RelayError(
                "not_a_relay",
                f"{where} does not speak the relay's WebSocket: {printable(str(exc))};"
                " check --server-url",
            ) from exc
    except RelayError:
        raise
    except OSError as exc:
        raise RelayError(
            "server_unreachable",
            f"{where} ended the WebSocket handshake: {printable(exc.strerror or str(exc))}",
        ) from exc
    except Exception as exc:
        # Some answers make the library raise other errors (IndexError, CookieError, ...). An
        # unattended client must go on.
        raise RelayError(
            "not_a_relay",
            f"{where} does not speak HTTP: {printable(repr(exc))}; check --server-url",
        ) from exc
    if refused is None and status == 101:
        return dict(web_socket.getheaders())
    if status is None:  # A blank line for a status line.
        raise RelayError("not_a_relay", f"{where} does not speak HTTP; check --server-url")
    answer, body = (refused[1], refused[2]) if refused else (web_socket.getheaders() or {}, None)
    raise refusal(endpoint, int(status), answer, body if body is not None else _body(answer, shim))


def _body(headers: Mapping[str, str], shim: _HandshakeSocket) -> bytes:
    wanted = int(min(header_number(headers.get("content-length", "")) or 0, _MAX_ANSWER_BYTES // 2))
    body = b""
    with contextlib.suppress(OSError, RelayError):
        while len(body) < wanted:
            piece = shim.recv(wanted - len(body))
            if not piece:
                break
            body += piece
    return body


class Connection:
    """A leg that is up. `frame_sender` is what it sends."""

    def __init__(
        self,
        library: Any,
        sock: Any,
        begun: bytes,
        ping_interval_s: float,
        make_key: Callable[[], bytes] = _random_key,
    ) -> None:
        self.frame_sender = FrameSender(make_key)
        self._library = library
        self._duplex = DuplexSocket(sock)
        self._reader = FrameReader(self._duplex, begun, is_masked=False)
        self._frames = library.frame_buffer(None, True)
        # The library reads by this method alone; ours bounds a frame.
        self._frames.recv_strict = self._read_exactly
        self._messages = MessageReader(self._reader, self.frame_sender, self._read_odd)
        self._writer: threading.Thread | None = None
        self._keepalive = Keepalive(
            self.frame_sender, self._duplex, far_peer(sock), ping_interval_s
        )
        # When the timer aborts the leg. Any thread sets it; a float is read whole.
        self._abort_at = float("inf")
        # Why the leg was given up from here, if it was.
        self.gave_up: RelayError | None = None

    def start(self, name: str) -> None:
        """Start the writer thread; stop() joins it."""
        self.frame_sender.start(self._duplex)
        writer = threading.Thread(target=self._write, name=f"leg-writer:{name}")
        writer.start()  # May fail on a machine out of threads; stop() joins what runs.
        self._writer = writer

    # The reader.

    def receive(self, on_pause: Callable[[], None] | None = None) -> tuple[int, Any]:
        """As MessageReader.receive()."""
        return self._messages.receive(on_pause)

    def _read_odd(self) -> tuple[int, Any, bool]:
        try:
            frame = self._frames.recv_frame()
        except self._library.WebSocketException as exc:
            raise LegError(f"bad frame from the server: {exc}") from exc
        return frame.opcode, frame.data, bool(frame.fin)

    def _read_exactly(self, size: int) -> bytes:
        if size > MAX_MESSAGE_BYTES:
            raise LegError("a frame is too long", CloseCode.TOO_BIG)
        data = b""
        while len(data) < size:
            piece = self._reader.read(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    # The writer.

    def _write(self) -> None:
        try:
            self.frame_sender.run()
        except OSError:
            # The reader sees the same loss, and reports it.
            self.abort()

    # The timer.

    def tick(self, now: float, *, slept: bool) -> float:
        """Ping, or give a silent leg up; return when to be called again. Never waits."""
        if now >= self._abort_at:
            self.abort()
            self._abort_at = float("inf")
        try:
            due_at = self._keepalive.tick(now, slept=slept)
        except RelayError as exc:
            self.give_up(exc)
            due_at = now + 1.0
        return min(due_at, self._abort_at)

    def give_up(self, error: RelayError) -> None:
        """Abort the leg for a reason that this end alone knows."""
        if self.gave_up is None:
            self.gave_up = error
        self.abort()

    # The end.

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        """Send a close behind what is queued; a second later the timer aborts the leg.

        The caller MUST wake the timer.
        """
        payload = struct.pack("!H", code) + reason.encode("ascii", "replace")[:120]
        self._abort_at = min(self._abort_at, time.monotonic() + FLUSH_S)
        self.frame_sender.close(Frame(OP_CLOSE, b"", payload), flush=flush)

    def abort(self) -> None:
        """End the leg now: its reader and its writer wake."""
        self._duplex.abort()

    def stop(self) -> None:
        """End and join the writer, free the socket. The reader calls it, or has ended."""
        if self._writer is not None and self.frame_sender.is_closing:
            # The peer is to read the close, behind which the writer ends.
            self._writer.join(FLUSH_S)
        self.abort()
        self.frame_sender.stop()
        if self._writer is not None:
            self._writer.join()
        self._duplex.close()


# --- http_network_relay/dial/backoff.py -----------------------------------------------------------
# The wait before the next try: exponential backoff with full jitter.

_FIRST_S = 0.2
# A leg that lasted less, and carried nothing, counts as a failed try.
_SHORTEST_LEG_S = 1.0


def uniform(low: float, high: float) -> float:
    """Draw from low..high. Not random.uniform(), whose import costs a start 1 ms."""
    return low + (high - low) * int.from_bytes(os.urandom(7), "big") / 2**56


class Backoff:
    """The first wait is 0 s, each later one uniform in 0..b; b doubles from 0.2 s to `cap_s`."""

    def __init__(self, cap_s: float, draw: Callable[[float, float], float] = uniform) -> None:
        self._cap_s = cap_s
        self._draw = draw
        self._tries = 0

    def lasted(self, seconds: float, *, was_used: bool = False) -> None:
        """Note for how long a leg lasted, and whether the leg carried anything for a tunnel.

        The waits begin anew after a leg that was used, or that lasted for twice the last b.
        """
        if was_used or seconds >= max(_SHORTEST_LEG_S, 2 * self._bound_s()):
            self._tries = 0

    def next_s(self) -> float:
        """Return the seconds to wait before the next try."""
        self._tries += 1
        return self._draw(0.0, self._bound_s())

    def _bound_s(self) -> float:
        if self._tries <= 1:
            return 0.0
        # min() before the power, which a year of tries would make a huge number.
        return min(self._cap_s, _FIRST_S * 2.0 ** min(self._tries - 2, 16))


# --- http_network_relay/proxy_command/messages.py -------------------------------------------------
# What the proxy command says on stderr: one line, with a hint.


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


# --- http_network_relay/proxy_command/settings.py -------------------------------------------------
# The proxy command's settings: flag > environment > default.

SECRET_KEY = Setting(
    "--secret-key", "token", "the token; `ps` shows it: prefer the file", is_secret=True
)
SETTINGS = (SERVER_URL, SECRET_KEY, PING_INTERVAL, MAX_WINDOW, RESUME_TIMEOUT)


class Settings(NamedTuple):
    """What one run needs. Never printed: it holds the token."""

    client: str
    host: str
    port: int
    endpoint: Endpoint
    token: str
    context: ssl.SSLContext | None
    ping_interval_s: float
    max_window_bytes: int
    grace_s: int

    @property
    def target(self) -> str:
        """The target, as messages name it."""
        return f"{self.host}:{self.port} at {self.client}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog="ssh_proxy_command.py",
        description="Carry stdin and stdout to a TCP port behind a relay's client.",
        epilog="Exit codes: 0 clean, 1 tunnel lost, 2 usage, 3 secret refused, 4 client unknown or"
        " offline, 5 target refused, 6 server unreachable or busy, 7 denied by a rule, 128+n ended"
        " by signal n.",
    )
    parser.add_argument("target_host_identifier", help="the client's name")
    parser.add_argument("target_ip", help="address or name of the target, as the client sees it")
    parser.add_argument("target_port", help="1 to 65535")
    parser.add_argument("protocol", nargs="?", default="tcp", help="tcp; may be left out")
    parser.add_argument("--ca-file", metavar="FILE", help="a private CA to trust as well")
    add_settings(parser, SETTINGS)
    return parser


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the checked settings; raises RelayError (usage)."""
    args = make_parser().parse_args(argv)
    # Five digits: int() raises for thousands of them.
    port = int(args.target_port) if matches(r"[0-9]{1,5}", args.target_port) else 0
    if not 1 <= port <= 65535:
        raise ConfigError(f"target_port must be 1 to 65535, not {args.target_port!r}")
    if args.protocol == "udp":
        raise ConfigError("the protocol udp is not supported yet, only tcp is")
    if args.protocol != "tcp":
        raise ConfigError(f"protocol must be tcp, not {args.protocol!r}")
    if not matches(NAME_PATTERN, args.target_host_identifier):
        raise ConfigError("target_host_identifier is not a client's name")
    if not matches(HOST_PATTERN, args.target_ip):
        raise ConfigError("target_ip is not an address or a name")
    given = merge_flags(args, SETTINGS, environ)
    endpoint = parse_server_url(SERVER_URL.text(given), USERS_PATH)
    return Settings(
        client=args.target_host_identifier,
        host=args.target_ip,
        port=port,
        endpoint=endpoint,
        token=read_secret(SECRET_KEY, args, given),
        context=make_context(args.ca_file) if endpoint.is_tls else None,
        ping_interval_s=PING_INTERVAL.number(given),
        max_window_bytes=int(MAX_WINDOW.number(given)),
        grace_s=int(RESUME_TIMEOUT.number(given)),
    )


# --- http_network_relay/proxy_command/leg.py ------------------------------------------------------
# One leg of the proxy command: opens or resumes the tunnel, then receives until the end.

# The sentence for each code of `detached`.
_DETACHED = {
    "client_lost": "the client's connection to the relay was lost",
    "client_replaced": "the client connected to the relay anew",
    "server_restart": "the relay is being restarted",
}


def dial_leg(
    settings: Settings, tunnel_id: str = "", is_cancelled: Callable[[], bool] = lambda: False
) -> Connection:
    """Dial the server; `tunnel_id` names a tunnel to resume. Any thread."""
    headers = [f"Authorization: Bearer {settings.token}"]
    if tunnel_id:
        headers.append(f"{TUNNEL_HEADER}: {tunnel_id}")
    return connect(
        settings.endpoint,
        headers,
        context=settings.context,
        environ=os.environ,
        ping_interval_s=settings.ping_interval_s,
        is_cancelled=is_cancelled,
    )


class Leg:
    """A connection with the only channel of a user leg. Main thread unless noted."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.connection = connection
        self.channel = Channel(connection.frame_sender)
        self._settings = settings
        self._server_restarts = False
        # The deadline for the answer, and the reason with which the timer then aborts the leg.
        self._answer_by = float("inf")
        self._no_answer = RelayError("open_timeout", "")

    def ask(self, first: Opening, timeout_s: float) -> None:
        """Send the first message. The caller MUST wake the timer and call answer()."""
        who = f"{self._settings.target}: " if isinstance(first, Open) else ""
        self._no_answer = RelayError("open_timeout", f"{who}no answer from the client in time")
        self._answer_by = time.monotonic() + timeout_s
        self.connection.start("user")
        self.channel.put_first(first)
        self.channel.push()

    def answer(self, first: Opening) -> Opened | Resumed:
        """Wait for the answer to `first`. Raises RelayError."""
        is_open = isinstance(first, Open)
        wanted, word = (Opened, "opened") if is_open else (Resumed, "resumed")
        try:
            while True:
                opcode, payload = self.connection.receive()
                if opcode == OP_CLOSE:
                    raise self._loss(payload)
                if opcode == OP_BINARY:
                    raise TunnelError(f"data came before {word}")
                control = _parse(payload)
                if isinstance(control, wanted):
                    return control
                if isinstance(control, OpenRefused):
                    # Not for a resume: the caller's sentence names the target.
                    who = f"{first.client}: " if is_open else ""
                    raise RelayError(control.code, who + control.message)
                if isinstance(control, (Reset, Detached)):
                    raise _reason(control)
                if not isinstance(control, GoingAway):
                    raise TunnelError(f"{type_of(control)} came before {word}")
                self._server_restarts = True
        except (LegError, TunnelError) as exc:
            raise _server_error(exc) from exc
        finally:
            self._answer_by = float("inf")

    def read(self, end: UserEnd, on_going_away: Callable[[float], None]) -> None:
        """Pass each message to `end` until the leg is lost or the tunnel is detached.

        `on_going_away`: called with the seconds over which the server spreads reconnects.
        """
        pause = functools.partial(end.inbound.on_pause, self.channel)
        on_pause: Callable[[], None] | None = None
        while True:
            try:
                opcode, payload = self.connection.receive(on_pause)
                if opcode == OP_CLOSE:
                    end.detach(self.channel, self._loss(payload))
                    return
                if opcode == OP_BINARY:
                    on_pause = pause if end.inbound.on_data(self.channel, payload) else None
                    continue
                control = _parse(payload)
                if isinstance(control, GoingAway):
                    self._server_restarts = True
                    on_going_away(control.spread_ms / 1000)
                else:
                    self._pass_on(control, end)
                if isinstance(control, Detached) and not end.is_over:
                    return
            except TunnelError as exc:
                end.reset(_server_error(exc))
            except LegError as exc:
                self.connection.close(exc.close_code, str(exc), flush=False)
                end.detach(self.channel, _server_error(exc))
                return

    def _pass_on(self, control: Control, end: UserEnd) -> None:
        if isinstance(control, Ack):
            end.outbound.on_ack(self.channel, control)
        elif isinstance(control, Eof):
            end.inbound.on_eof(self.channel, control.count)
        elif isinstance(control, Reset):
            end.on_reset(self.channel, _reason(control))
        elif isinstance(control, Detached):
            end.detach(self.channel, _reason(control))
        else:
            raise TunnelError(f"{type_of(control)} after the tunnel was open")

    def say_goodbye(self, ended: RelayError | None) -> None:
        """Close the leg of a tunnel that is over. Any thread; idempotent."""
        if ended is not None and ended.code == "user_gone":
            # A leg with an unanswered `resume` has sent no reset; the client accepts one after it.
            self.channel.put_reset(ended)
        self.connection.close(CloseCode.NORMAL)

    def tick(self, now: float, *, slept: bool) -> float:
        """Check the deadlines; return the time of the next call. Timer thread; never waits."""
        if now >= self._answer_by:
            self._answer_by = float("inf")
            self.connection.give_up(self._no_answer)
        return min(self.connection.tick(now, slept=slept), self._answer_by)

    def _loss(self, close_code: int) -> RelayError:
        if self.connection.gave_up is not None:
            return self.connection.gave_up
        where = f"the relay {self._settings.endpoint.host}"
        if close_code == CloseCode.RESTART or self._server_restarts:
            return RelayError("server_restart", f"{where} is being restarted")
        if close_code == 1006:
            return RelayError("leg_lost", f"the connection to {where} was lost")
        return RelayError("leg_lost", f"{where} ended the connection (close code {close_code})")


def _parse(payload: bytes | bytearray) -> Control:
    return parse_control(decode_text(payload), TO_USER, has_channel=False)


def _reason(control: Reset | Detached) -> RelayError:
    if isinstance(control, Reset):
        return RelayError(control.code, control.message)
    cut = f"the tunnel was cut ({control.code})"
    return RelayError(control.code, _DETACHED.get(control.code, cut))


def _server_error(exc: Exception) -> RelayError:
    return RelayError("protocol_error", f"the server broke the protocol: {exc}")


# --- http_network_relay/proxy_command/next_leg.py -------------------------------------------------
# NextLeg: dials the next leg while the present one still works.

# The pause between two tries to reach a server that restarts, and for how long to try.
RESTART_RETRY_S = (0.1, 0.3)
RESTART_S = 3.0


class NextLeg:
    """Dials in a thread of its own, for a server that goes away."""

    def __init__(
        self,
        end: UserEnd,
        dial: Callable[[], Connection],
        spread_s: float,
        on_up: Callable[[], None],
    ) -> None:
        """`on_up` is called in the thread when the leg is there."""
        self._end = end
        self._dial = dial
        self._spread_s = spread_s
        self._on_up = on_up
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="next-leg")

    def start(self) -> None:
        """Begin; the caller MUST call take(), which joins the thread."""
        self._thread.start()

    def _run(self) -> None:
        wait_s = uniform(0.0, self._spread_s)
        until = time.monotonic() + self._spread_s + RESTART_S
        while True:
            self._end.wait_over(wait_s)
            if self._end.is_over:
                return
            try:
                self._connection = self._dial()
            except RelayError as exc:
                if not exc.is_retryable or time.monotonic() >= until:
                    return
                wait_s = uniform(*RESTART_RETRY_S)
            else:
                self._on_up()
                return

    def take(self) -> Connection | None:
        """Wait for the leg, which the caller then owns; None if there is none."""
        self._thread.join()
        connection, self._connection = self._connection, None
        return connection


# --- http_network_relay/proxy_command/stdio.py ----------------------------------------------------
# Standard input and output of the proxy command, on each operating system.

STDIN = 0

STDOUT = 1

# The new size of a stdin or stdout pipe once full: the default maximum of an unprivileged user.
PIPE_BYTES = 1024 * 1024

# Windows has no poll, and no select for pipes.
CAN_POLL = hasattr(select, "poll")


def fill_standard_files() -> None:
    """Open /dev/null for each closed one of 0, 1, 2: a socket could get the number of stdin."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.dup(number)
    os.close(number)


class QuickStdout:
    """Writes to stdout without waiting, and without O_NONBLOCK on the shared file description."""

    def __init__(self, stdout: int) -> None:
        """Raises OSError if stdout or the system does not support such writes."""
        self._stdout = stdout
        mode = os.fstat(stdout).st_mode
        self._is_socket = stat.S_ISSOCK(mode)
        self._is_enlarged = False
        if self._is_socket and DONT_WAIT:
            self._file: Any = socket.socket(fileno=os.dup(stdout))
        elif stat.S_ISFIFO(mode) and sys.platform == "linux":
            self._file = open(  # noqa: SIM115  # close() closes it.
                f"/proc/self/fd/{stdout}", "wb", buffering=0, opener=_open_now
            )
        else:
            raise OSError(errno.ENOTSUP, "stdout is neither a pipe nor a socket")

    def write(self, data: Any) -> int:
        """Write and return the number of bytes accepted; raises OSError."""
        if self._is_socket:
            return int(self._file.send(data, DONT_WAIT))
        count = self._file.write(data) or 0  # None: the write would block.
        if count < len(data) and not self._is_enlarged:
            self._is_enlarged = True
            enlarge_pipe(self._stdout)
        return count

    def close(self) -> None:
        """Close the own description. The caller MUST ensure that no thread is in write()."""
        self._file.close()


def enlarge_pipe(descriptor: int) -> None:
    """Enlarge a pipe: at 64 KiB, each refill would cost a switch to the peer process."""
    import fcntl  # Not on Windows; and only bulk transfers need fcntl.

    set_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 lacks both names.
    get_size = getattr(fcntl, "F_GETPIPE_SZ", 1032)
    with contextlib.suppress(OSError):  # The user's limit for pipe memory.
        if fcntl.fcntl(descriptor, get_size) < PIPE_BYTES:
            fcntl.fcntl(descriptor, set_size, PIPE_BYTES)


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_NONBLOCK)


def write_stdout(stdout: int, chunk: Any) -> None:
    """Write the whole chunk; blocks."""
    view = memoryview(chunk)
    while view:
        try:
            view = view[os.write(stdout, view) :]
        except BlockingIOError:  # Another process set O_NONBLOCK on the shared pipe.
            select.select([], [stdout], [])


def close_stdout(stdout: int) -> None:
    """Deliver the eof: close every duplicate of stdout, or the reader gets no eof."""
    about = os.fstat(stdout)
    if stat.S_ISSOCK(about.st_mode):
        # stdin may be the same socket: close() alone would send no eof.
        with socket.socket(fileno=os.dup(stdout)) as sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if not stat.S_ISCHR(about.st_mode) and os.path.samestat(about, stderr):
            os.dup2(null, 2)
    os.dup2(null, stdout)
    os.close(null)


# --- http_network_relay/proxy_command/wakeup.py ---------------------------------------------------
# Wakeup: how any thread wakes pump-up, and why the user has gone.


class Wakeup:
    """Any thread; leave() and wake() never wait."""

    def __init__(self) -> None:
        # 128+n once the user has gone. The first wins.
        self.exit_code: int | None = None
        # Where there is no poll.
        self.woken = threading.Event()
        self.left = threading.Event()
        # The end that pump-up polls; -1 without poll.
        self.reader, self._writer = os.pipe() if CAN_POLL else (-1, -1)
        if CAN_POLL:
            os.set_blocking(self.reader, False)
            os.set_blocking(self._writer, False)

    def leave(self, exit_code: int) -> None:
        """Note that the user has gone; pump-up tells the client."""
        if self.exit_code is None:
            self.exit_code = exit_code
        self.wake()
        self.left.set()

    def wake(self) -> None:
        """Let pump-up look: credit came, the user has gone, or the tunnel is over."""
        if CAN_POLL:
            with contextlib.suppress(BlockingIOError):  # Full: pump-up is awake.
                os.write(self._writer, b"w")
        else:
            self.woken.set()


# --- http_network_relay/proxy_command/pumps.py ----------------------------------------------------
# Pumps: stdin to the leg and the leg to stdout, one thread each.

# Two messages: one read of two costs less than two reads of one.
STDIN_READ_BYTES = 2 * MESSAGE_BYTES

# The wait for credit of bytes resent after a resume; the whole exit takes at most 1 s.
GOODBYE_S = 0.5


class Pumps:
    """stdin -> leg and leg -> stdout, one thread each."""

    def __init__(
        self, end: UserEnd, wakeup: Wakeup, stdin: int = STDIN, stdout: int = STDOUT
    ) -> None:
        self._end = end
        self._wakeup = wakeup
        self._stdin = stdin
        self._stdout = stdout
        self._watches_stdout = CAN_POLL
        self._quick_stdout: QuickStdout | None = None
        with contextlib.suppress(OSError):
            self._quick_stdout = QuickStdout(stdout)
        self._coalescer = ReadCoalescer(STDIN_READ_BYTES)
        self._is_stdin_enlarged = False
        # The poll object and its interests. Used only by pump-up.
        self._poll: Any = None
        self._polled: tuple[bool, bool] | None = None
        # Daemon: a blocked write to stdout cannot be woken, nor on Windows a read of stdin.
        self._up = threading.Thread(target=self._pump_up, name="pump-up", daemon=True)
        self._down = threading.Thread(target=self._pump_down, name="pump-down", daemon=True)
        # Without poll, pump-up may block in a read that cannot be woken.
        self._leave = threading.Thread(target=self._leave_unpolled, name="pump-leave", daemon=True)

    def start(self) -> None:
        """Start both threads. The caller MUST call join()."""
        if self._quick_stdout is not None:
            self._end.inbound.deliver_directly(self._quick_stdout.write)
        self._up.start()
        self._down.start()
        if not CAN_POLL:
            self._leave.start()

    def join(self, timeout_s: float) -> None:
        """Join both threads; the exit of the process ends a thread blocked in stdin or stdout."""
        deadline = time.monotonic() + timeout_s
        for thread in (self._down, self._up):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _leave_unpolled(self) -> None:
        self._wakeup.left.wait()
        if not self._end.is_over:
            self._say_goodbye()

    # stdin -> leg; polls for signals and the close of stdout too, even after stdin's eof.

    def _pump_up(self) -> None:
        end = self._end
        try:
            while not end.is_over and self._wakeup.exit_code is None:
                size = min(end.outbound.credit(), STDIN_READ_BYTES)
                if self._wait(want_stdin=size > 0):
                    self._carry(size)
            if not end.is_over:
                self._say_goodbye()
        except OSError as exc:
            end.reset(RelayError("internal_error", f"reading stdin failed: {exc.strerror}"))

    def _carry(self, size: int) -> bool:
        data = os.read(self._stdin, size)
        # More than one message: the pipe, of 64 KiB by default, was full or nearly full.
        if len(data) > MESSAGE_BYTES and not self._is_stdin_enlarged:
            self._is_stdin_enlarged = True
            enlarge_pipe(self._stdin)
        if data:
            self._end.outbound.send(data)
            if wait_s := self._coalescer.wait_s(len(data), size, time.monotonic()):
                time.sleep(wait_s)
        else:
            self._end.outbound.send_eof()
        return bool(data)

    def _wait(self, *, want_stdin: bool) -> bool:
        """Wait for an event of pump-up; return whether stdin can be read."""
        if not CAN_POLL:
            if not want_stdin:
                self._wakeup.woken.wait()
                self._wakeup.woken.clear()
            return want_stdin
        wanted = (want_stdin, self._watches_stdout)
        if wanted != self._polled:
            self._polled, self._poll = wanted, self._make_poll(*wanted)
        ready = dict(self._poll.poll())
        if self._wakeup.reader in ready:
            os.read(self._wakeup.reader, 4096)
        if ready.get(self._stdout, 0) & select.POLLNVAL:
            self._watches_stdout = False
        elif self._stdout in ready and self._watches_stdout:
            self._wakeup.leave(EXIT_SIGPIPE)
        return self._stdin in ready

    def _make_poll(self, want_stdin: bool, watches_stdout: bool) -> Any:
        poll = select.poll()
        poll.register(self._wakeup.reader, select.POLLIN)
        if want_stdin:
            poll.register(self._stdin, select.POLLIN)
        if watches_stdout:
            poll.register(self._stdout, 0)  # 0: POLLERR and POLLHUP are always reported.
        return poll

    def _say_goodbye(self) -> None:
        """Send the bytes ready on stdin, then reset with `user_gone`."""
        end = self._end
        if end.has_both_eofs:
            end.wait_over(FLUSH_S)
        else:
            # Bytes taken before a resume may still wait for credit.
            end.outbound.wait_sent(GOODBYE_S)
            self._take_the_rest()
        end.reset(RelayError("user_gone", "the proxy user has gone"))

    def _take_the_rest(self) -> None:
        if CAN_POLL:
            poll = select.poll()
            poll.register(self._stdin, select.POLLIN)
            while (size := self._end.outbound.credit()) and poll.poll(0) and self._carry(size):
                pass

    # leg -> stdout

    def _pump_down(self) -> None:
        end = self._end
        try:
            while chunk := end.inbound.next_chunk():
                write_stdout(self._stdout, chunk)
                end.inbound.delivered(len(chunk))
            if chunk == b"":
                self._watches_stdout = False
                self._wakeup.wake()
                self._close_quick_stdout()
                close_stdout(self._stdout)
                end.inbound.delivered_eof()
        except BrokenPipeError:
            self._wakeup.leave(EXIT_SIGPIPE)
        except OSError as exc:
            end.reset(RelayError("internal_error", f"writing stdout failed: {exc.strerror}"))
        finally:
            self._close_quick_stdout()

    def _close_quick_stdout(self) -> None:
        self._end.inbound.deliver_directly(None)
        if self._quick_stdout is not None:
            self._quick_stdout.close()


# --- http_network_relay/proxy_command/carrier.py --------------------------------------------------
# Carrier: one tunnel of the proxy command, resumed from leg to leg.

# Longer than the client's dial (10 s), so that the user reads the client's reason. Also longer
# than the server holds a resume for an absent client (10 s).
ANSWER_TIMEOUT_S = 15.0
# The longest wait between two tries to resume.
RESUME_CAP_S = 5.0


class Carrier:
    """Opens and resumes the tunnel, and reads its legs. Main thread unless noted."""

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        wakeup: Wakeup,
        wake_timer: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._wakeup = wakeup
        self._wake_timer = wake_timer
        leg = Leg(connection, settings)
        # The leg in use. Main writes the field; the timer and any thread that ends the tunnel read.
        self.leg: Leg | None = leg
        self._end = UserEnd(leg.channel, settings.max_window_bytes, self._on_change)
        # Kept: a resume repeats the fields of the `open`.
        self._opening = Open(
            client=settings.client,
            host=settings.host,
            port=settings.port,
            protocol="tcp",
            tunnel_id=os.urandom(16).hex(),
            resume_token=os.urandom(32).hex(),
            limit=self._end.first_limit,
            grace_s=settings.grace_s,
        )
        self._attempt = 0
        self._next_leg: NextLeg | None = None
        # The reason of the last failed resume.
        self._failure: RelayError | None = None

    def open(self) -> None:
        """Send `open` and wait for the answer. Raises RelayError."""
        assert self.leg is not None  # Until the first _leave().
        answer = self._ask(self.leg, self._opening, ANSWER_TIMEOUT_S)
        assert isinstance(answer, Opened)  # _ask() returns nothing else for an Open.
        self._end.on_open(answer.limit, min(self._settings.grace_s, answer.grace_s))

    def stop(self) -> None:
        """Close all legs."""
        unused = self._next_leg.take() if self._next_leg is not None else None
        if unused is not None:
            unused.stop()
        self._leave()

    def carry(self) -> int:
        """Carry the tunnel from leg to leg to its end; return the exit code."""
        end, pumps = self._end, Pumps(self._end, self._wakeup)
        pumps.start()
        backoff = Backoff(RESUME_CAP_S)
        while (leg := self.leg) is not None:
            begun, counts = time.monotonic(), end.counts
            leg.read(end, self._on_going_away)
            self._leave()
            if not end.is_over:
                backoff.lasted(time.monotonic() - begun, was_used=end.counts != counts)
                self._come_back(backoff)
        self._wakeup.wake()  # Expiry does not call _on_change().
        # Bytes received before the end may still be delivered for FLUSH_S.
        if self._wakeup.exit_code is None:
            pumps.join(FLUSH_S)
        if end.is_finished:
            return EXIT_CLEAN
        if self._wakeup.exit_code is not None:
            return self._wakeup.exit_code
        ended = end.ended or RelayError("leg_lost", "the tunnel was lost")
        sentence = f"{self._settings.target}: {ended}"
        if end.state is EndState.EXPIRED:
            sentence += f"; not resumed within {end.grace_s:.0f} s"
            sentence += f": {self._failure}" if self._failure is not None else ""
        complain(RelayError(ended.code, sentence))
        return EXIT_TUNNEL_LOST

    def _ask(self, leg: Leg, first: Opening, timeout_s: float) -> Opened | Resumed:
        self.leg = leg
        leg.ask(first, timeout_s)
        self._wake_timer()
        # A thread that ends the tunnel from here on closes this leg; check for an earlier end.
        if self._end.is_over:
            raise RelayError("leg_lost", "the tunnel ended meanwhile")
        return leg.answer(first)

    def _dial(self) -> Connection:
        """Dial for a resume. Main thread or the thread of NextLeg."""
        return dial_leg(self._settings, self._opening.tunnel_id, self._is_too_late)

    def _is_too_late(self) -> bool:
        return self._end.is_over or (self._end.is_detached and not self._end.resume_left_s())

    def _on_going_away(self, spread_s: float) -> None:
        leg = self.leg
        if self._next_leg is None and self._end.grace_s and leg is not None:
            # The abort ends main's read of the old leg.
            self._next_leg = NextLeg(self._end, self._dial, spread_s, leg.connection.abort)
            self._next_leg.start()

    def _come_back(self, backoff: Backoff) -> None:
        """Retry the resume on new legs until one succeeds or the tunnel is over."""
        end = self._end
        next_leg, self._next_leg = self._next_leg, None
        connection = next_leg.take() if next_leg is not None else None
        wait_s = 0.0 if connection is not None else backoff.next_s()
        while True:
            end.wait_over(wait_s)
            if end.is_over:
                if connection is not None:
                    connection.stop()
                return
            try:
                self._resume(connection or self._dial())
                self._failure = None
                return
            except RelayError as exc:
                self._leave()
                # Keep the earlier reason once no time is left: the last try only timed out.
                if self._failure is None or end.resume_left_s():
                    self._failure = exc
                if not exc.is_retryable:
                    end.on_end(RelayError(exc.code, str(exc)))
                wait_s = max(backoff.next_s(), exc.retry_after_s or 0.0)
                connection = None

    def _resume(self, connection: Connection) -> None:
        self._attempt += 1
        received, delivered, limit = self._end.begin_resume()
        first = Resume(
            **self._opening._replace(limit=limit)._asdict(),
            attempt=self._attempt,
            received=received,
            delivered=delivered,
        )
        leg = Leg(connection, self._settings)
        answer = self._ask(leg, first, min(ANSWER_TIMEOUT_S, self._end.resume_left_s()))
        assert isinstance(answer, Resumed)  # _ask() returns nothing else for a Resume.
        try:
            peer = Position(answer.received, answer.delivered, answer.limit)
            self._end.on_resumed(leg.channel, peer)
        except TunnelError as exc:
            raise RelayError("protocol_error", f"the client broke the protocol: {exc}") from exc
        if self._end.is_over:  # The tunnel expired during the resume.
            raise RelayError("leg_lost", "the tunnel ended meanwhile")

    def _leave(self) -> None:
        """Close the leg in use, if any."""
        leg = self.leg
        if leg is not None:
            if self._end.is_over:
                # The thread that ended the tunnel may have closed an earlier leg instead.
                leg.say_goodbye(self._end.ended)
            self.leg = None
            leg.connection.stop()

    def _on_change(self) -> None:
        """Handle new credit, the loss of the leg or the end. Any thread."""
        self._wakeup.wake()
        leg = self.leg
        if self._end.is_over and leg is not None:
            leg.say_goodbye(self._end.ended)
            self._wake_timer()


# --- http_network_relay/proxy_command/session.py --------------------------------------------------
# Session: one run of the proxy command, from the first dial to the exit code.

# Signals that mean: the user has gone. ssh sends SIGHUP at the end of each session.
GONE_SIGNALS = ("SIGHUP", "SIGTERM", "SIGINT")


class Session:
    """Opens the tunnel, and passes the timer's ticks and the signals on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timer = Timer(self._tick, self._on_signal)
        self._wakeup = Wakeup()
        # Written by main, read by the timer.
        self._carrier: Carrier | None = None
        self._is_carrying = False

    def run(self) -> int:
        """Return the exit code; raises RelayError for what failed before the tunnel opened."""
        names = [name for name in GONE_SIGNALS if hasattr(signal, name)]
        self._timer.start(getattr(signal, name) for name in names)
        try:
            carrier = self._open_patiently()
            # Before carry(): a signal from here on lets pump-up say goodbye, and kills nothing.
            self._is_carrying = True
            return carrier.carry()
        finally:
            if self._carrier is not None:
                self._carrier.stop()
            self._timer.stop()

    def _open_patiently(self) -> Carrier:
        """Open; try again only while the server restarts, with a new tunnel."""
        restart_until = 0.0
        while True:
            try:
                connection = dial_leg(self._settings)
                carrier = Carrier(self._settings, connection, self._wakeup, self._timer.wake)
                self._carrier = carrier
                carrier.open()
                return carrier
            except RelayError as exc:
                if self._carrier is not None:
                    self._carrier.stop()
                is_restarting = time.monotonic() < restart_until
                if exc.code == "server_restart" and not restart_until:
                    restart_until = time.monotonic() + RESTART_S
                # The client may come back to the new server a moment later than we do.
                elif not (is_restarting and exc.is_retryable):
                    raise
            time.sleep(uniform(*RESTART_RETRY_S))

    # The timer's thread: never writes to the leg, never waits for a lock.

    def _tick(self, now: float, slept: bool) -> float:
        leg = self._carrier.leg if self._carrier is not None else None
        return leg.tick(now, slept=slept) if leg is not None else now + 60.0

    def _on_signal(self, number: int) -> None:
        if not self._is_carrying:
            # Nothing is open and nothing to keep; main may be inside a name lookup.
            os._exit(EXIT_SIGNAL_BASE + number)
        self._wakeup.leave(EXIT_SIGNAL_BASE + number)


# --- http_network_relay/proxy_command/main.py -----------------------------------------------------

# The interpreter hands the GIL on after 5 ms by default, which a keystroke would feel.
SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tunnel over stdin and stdout; returns the exit code."""
    fill_standard_files()
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
        websocket_client()
    except RelayError as exc:
        return complain(exc)
    if not settings.endpoint.is_tls and not settings.endpoint.is_loopback:
        warn(f"{settings.endpoint.url} is not encrypted: use https")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()
    gc.enable()
    session = Session(settings)
    try:
        return session.run()
    except RelayError as exc:
        return complain(exc)


if __name__ == "__main__":
    sys.exit(main())
