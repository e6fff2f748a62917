"""The controls of the wire (docs/protocol.md, "Controls"): parsed, checked and encoded.

No socket, clock, thread or log here. Every control that arrives is checked field by field
against one table and copied; unknown fields are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Union

from http_network_relay.wire.codes import CloseCode
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
