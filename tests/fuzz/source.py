"""Makes structured input of bytes: numbers, choices, controls and frames.

Bytes that are used up read as zeros, so that every byte string is an input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from http_network_relay.wire.constants import MAX_COUNT, OP_BINARY, OP_CLOSE, OP_PING, OP_TEXT
from http_network_relay.wire.controls import FIELDS, LEG_TYPES
from tests.support.raw import encode_frame

T = TypeVar("T")

# What a field that is a number may say beside what is right, and what stands for any other.
_COUNTS = (0, 1, 255, 4096, 65536, 2**18, 2**22, MAX_COUNT, MAX_COUNT + 1, -1)
_JUNK: tuple[Any, ...] = (
    None, True, -1, 1.5, 1e308, 2**64, MAX_COUNT, "", "0", "\x1b[2J", "x" * 600, "é" * 500,
    [], {}, [[]], {"type": "open"},
)  # fmt: skip
CODES = ("user_gone", "target_reset", "target_lost", "superseded", "protocol_error", "newer_code")
# Tunnels are few, so that resumes and repeated opens meet them.
IDS = tuple(f"{number:032x}" for number in range(8))
RESUME_TOKENS = ("0" * 64, "1" * 64)


class Source:
    """Takes one byte string apart, front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        """Whether only zeros follow."""
        return self._at >= len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        self._at += size
        return self._data[self._at - size : self._at]

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def number(self, below: int) -> int:
        """Return a number from 0, of one or two bytes."""
        return int.from_bytes(self.take(1 if below <= 256 else 2), "big") % below

    def pick(self, choices: Sequence[T]) -> T:
        """Return one of these."""
        return choices[self.number(len(choices))]

    def is_rare(self, one_in: int) -> bool:
        """Whether something rare happens; never once the bytes are used up."""
        return self.number(256) * one_in >= 256 * (one_in - 1)

    def text(self, size: int) -> str:
        """Return text of so many bytes: UTF-8 where it is some, else anything."""
        return self.take(size).decode("utf-8", "surrogateescape")


def fields_of(source: Source, kind: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a control: those of `known`, others as they may be, some junk."""
    fields = {
        name: known[name] if name in known else _value(source, name)
        for name in FIELDS.get(kind, ("count",))
    }
    if source.is_rare(20):
        fields[source.pick((*fields, "more", "channel", "type", "user"))] = source.pick(_JUNK)
    if source.is_rare(60) and fields:
        del fields[source.pick(sorted(fields))]
    return fields


def _value(source: Source, name: str) -> Any:
    if name in ("limit", "delivered", "received", "count", "attempt"):
        return source.pick(_COUNTS[:-2]) + source.number(3)
    choices: dict[str, Sequence[Any]] = {
        "client": ("pest", "good", "nobody"),
        "host": ("127.0.0.1", "::1", "127.1", "a..b", "[::1", "127.0.0.1."),
        "port": (1, 22, 65535, 0),
        "protocol": ("tcp", "tcp", "tcp", "udp"),
        "tunnel_id": IDS,
        "resume_token": RESUME_TOKENS,
        "grace_s": (0, 1, 1, 120),
        "eof": (False, True),
        "code": CODES,
        "message": ("", "gone", "\x1b[2J\n", "é" * 600),
        "spread_ms": (0, 10, 10**6),
        "user": ("anna", "bob"),
    }
    return source.pick(choices[name])


def control(source: Source, kind: str, channel: int, known: dict[str, Any]) -> bytes:
    """Return a control's JSON; `channel` 0 leaves that field out. Now and then it is broken."""
    said: dict[str, Any] = {"type": kind}
    if channel and kind not in LEG_TYPES:
        said["channel"] = channel
        said["user"] = known.get("user", "anna")
    said.update(fields_of(source, kind, known))
    text = json.dumps(said, ensure_ascii=source.is_rare(2)).encode("utf-8", "replace")
    if source.is_rare(200):
        return broken(source, text)
    return text


def broken(source: Source, data: bytes) -> bytes:
    """Return the bytes with some cut out, doubled or replaced."""
    at = source.number(len(data) + 1)
    size = source.number(8)
    return data[:at] + source.take(source.number(5)) + data[at + size :]


def frame(source: Source, opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """Return a message as one frame or as fragments, with a ping in between at times."""
    if not source.is_rare(8):
        return encode_frame(opcode, payload, mask=masked)
    cut = source.number(len(payload) + 1)
    ping = encode_frame(OP_PING, source.take(source.number(126)), mask=masked)
    return (
        encode_frame(opcode, payload[:cut], fin=False, mask=masked)
        + ping * source.number(3)
        + encode_frame(0, payload[cut:], mask=masked)
    )


def bad_frame(source: Source, *, masked: bool) -> bytes:
    """Return what ends a leg, or soon leads to it: wrong frames, or plain garbage."""
    payload = source.take(source.number(64))
    kind = source.number(8)
    if kind == 0:
        return encode_frame(source.number(16), payload, rsv=source.number(8), mask=masked)
    if kind == 1:
        return encode_frame(OP_BINARY, payload, mask=not masked)
    if kind == 2:  # A close, well formed or not.
        return encode_frame(OP_CLOSE, payload[: source.number(64)], mask=masked)
    if kind == 3:
        return encode_frame(OP_BINARY, bytes(65541 + source.number(2) * 70_000), mask=masked)
    if kind == 4:  # A size that never comes.
        return encode_frame(OP_TEXT, bytes(70_000), mask=masked)[: 2 + source.number(14)]
    if kind == 5:
        return encode_frame(OP_TEXT, payload, fin=False, mask=masked)
    if kind == 6:
        return encode_frame(OP_PING, bytes(126), mask=masked)
    return source.take(source.number(300))
