"""The controls of the wire (docs/protocol.md, "Controls"): parsed, checked and encoded.

Knows no socket, clock, thread or log. Every control that comes in is checked field by
field against one table and copied; nothing unknown passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from http_network_relay.wire.codes import CLOSE_NOT_UTF8, CLOSE_TOO_BIG
from http_network_relay.wire.constants import (
    CHANNEL_BYTES,
    HOST_PATTERN,
    MAX_CHANNEL,
    MAX_CONTROL_BYTES,
    MAX_COUNT,
    MAX_DATA_BYTES,
    MAX_MESSAGE_CHARS,
    NAME_PATTERN,
)
from http_network_relay.wire.errors import LegError, TunnelError


def _count(value: Any) -> int | None:
    # bool is an int in Python, not on the wire.
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
    """A sentence for a person: shortened, with nothing that moves a terminal's cursor."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else "?" for c in value[:MAX_MESSAGE_CHARS])


_code = _matching(r"[a-z][a-z_]{0,63}")
_seconds = _whole(0, 10**6)

_Check = Callable[[Any], Any]
_OPEN: dict[str, _Check] = {
    "client": _matching(NAME_PATTERN),
    "host": _matching(HOST_PATTERN),
    "port": _whole(1, 65535),
    "protocol": _matching(r"[a-z]{1,16}"),
    "tunnel_id": _matching(r"[0-9a-f]{32}"),
    "resume_token": _matching(r"[0-9a-f]{64}"),
    "limit": _count,
    "grace_s": _seconds,
}
_REASON: dict[str, _Check] = {"code": _code, "message": _prose}
# One row a type: field -> check that returns the value, or None for a bad one.
FIELDS: dict[str, dict[str, _Check]] = {
    "open": _OPEN,
    "opened": {"limit": _count, "grace_s": _seconds},
    "refused": _REASON,
    "ack": {"delivered": _count, "limit": _count, "eof": _flag},
    "eof": {"count": _count},
    "reset": _REASON,
    "detached": {"code": _code},
    "going_away": {"spread_ms": _whole(0, 10**6)},
    "resume": {**_OPEN, "attempt": _count, "received": _count, "delivered": _count},
    "resumed": {"received": _count, "delivered": _count, "limit": _count},
}
# Fields that the server adds on the way to a client.
_ADDED_BY_SERVER: dict[str, _Check] = {"user": _matching(r"[!-~]{1,128}")}

FROM_USER: frozenset[str] = frozenset({"open", "resume", "ack", "eof", "reset"})
FROM_CLIENT: frozenset[str] = frozenset({"opened", "resumed", "refused", "ack", "eof", "reset"})
TO_CLIENT: frozenset[str] = FROM_USER | {"detached", "going_away"}
TO_USER: frozenset[str] = FROM_CLIENT | {"detached", "going_away"}
# These concern the leg and have no channel.
LEG_TYPES: frozenset[str] = frozenset({"going_away"})
_channel = _whole(1, MAX_CHANNEL)


def parse_control(text: str, legal: frozenset[str], *, has_channel: bool) -> dict[str, Any]:
    """Return a new dict with `type`, `channel` (on a client leg) and the known fields.

    `legal` is what may come from this side. Unknown fields are ignored. Raises
    LegError or TunnelError as docs/protocol.md, "Errors", tells them apart.
    """
    if len(text) > MAX_CONTROL_BYTES or len(text.encode("utf-8", "replace")) > MAX_CONTROL_BYTES:
        raise LegError(f"a control is longer than {MAX_CONTROL_BYTES} bytes", CLOSE_TOO_BIG)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise LegError("a text message is not JSON") from exc
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise LegError("a control has no known type")
    control: dict[str, Any] = {"type": kind}
    if has_channel and kind not in LEG_TYPES:
        channel = _channel(raw.get("channel"))
        if channel is None:
            raise LegError(f"{kind} has no valid channel")
        control["channel"] = channel
    channel = control.get("channel", 0)
    if kind not in legal:
        raise TunnelError(f"{kind} does not come from this side", channel)
    checks = FIELDS[kind]
    if has_channel and kind in ("open", "resume"):
        checks = {**checks, **_ADDED_BY_SERVER}
    for name, check in checks.items():
        value = check(raw.get(name))
        if value is None:
            raise TunnelError(f"{kind} has a missing or bad field {name}", channel)
        control[name] = value
    return control


def decode_text(payload: bytes | bytearray) -> str:
    """Return a text message as text; raises LegError if it is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise LegError("a text message is not UTF-8", CLOSE_NOT_UTF8) from exc


def encode_control(kind: str, channel: int = 0, **fields: Any) -> bytes:
    """Return the JSON of a control; `channel` 0 leaves that field out (a user leg)."""
    control: dict[str, Any] = {"type": kind}
    if channel:
        control["channel"] = channel
    if "message" in fields:
        fields["message"] = _prose(fields["message"])
    control.update(fields)
    # Not as \uXXXX: a message of 500 characters must fit into MAX_CONTROL_BYTES.
    return json.dumps(control, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def encode_channel(channel: int) -> bytes:
    """Return the 4 bytes that stand before the stream bytes on a client leg."""
    return channel.to_bytes(CHANNEL_BYTES, "big")


def split_channel(message: bytes | bytearray | memoryview) -> int:
    """Return the channel of a binary message of a client leg; its bytes follow at 4."""
    if len(message) < CHANNEL_BYTES:
        raise LegError("a binary message is shorter than its channel")
    channel = int.from_bytes(message[:CHANNEL_BYTES], "big")
    if len(message) == CHANNEL_BYTES or len(message) > CHANNEL_BYTES + MAX_DATA_BYTES:
        raise TunnelError("a data message has not 1 to 65536 bytes", channel)
    return channel


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text has the pattern."""
    return re.fullmatch(pattern, text) is not None


def is_secret(text: str) -> bool:
    """Whether a secret can travel in a header: printable ASCII without spaces."""
    return matches(r"[!-~]{1,4096}", text)
