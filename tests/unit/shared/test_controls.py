"""Reading the wire: whatever comes, an answer is a control, a leg error or a tunnel error."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from http_network_relay.wire.constants import (
    MAX_CHANNEL,
    MAX_CONTROL_BYTES,
    MAX_COUNT,
    MAX_MESSAGE_CHARS,
)
from http_network_relay.wire.controls import (
    FIELDS,
    FROM_CLIENT,
    FROM_USER,
    LEG_TYPES,
    TO_CLIENT,
    TO_USER,
    OpenRefused,
    Reset,
    decode_text,
    encode_channel,
    encode_control,
    is_secret,
    parse_control,
    split_channel,
    type_of,
)
from http_network_relay.wire.errors import LegError, TunnelError
from tests.support.controls import as_dict, from_dict

SIDES = [(FROM_USER, False), (TO_CLIENT, True), (FROM_CLIENT, True), (TO_USER, False)]
GOOD: dict[str, Any] = {
    "client": "lab-1",
    "host": "127.0.0.1",
    "port": 22,
    "protocol": "tcp",
    "tunnel_id": "0" * 32,
    "resume_token": "0" * 64,
    "limit": 262_144,
    "grace_s": 0,
    "user": "anna",
    "code": "busy",
    "message": "why",
    "delivered": 0,
    "received": 0,
    "attempt": 1,
    "eof": False,
    "count": 0,
    "spread_ms": 0,
}
# Values that are wrong for every field of their kind.
WRONG_NUMBERS: list[Any] = [None, True, False, 1.0, -1, MAX_COUNT + 1, "1", [], {}, 10**400]
WRONG_TEXTS = [None, True, 1, 1.5, [], {}, ["a"], {"a": 1}]
WRONG_FLAGS: list[Any] = [None, 0, 1, "true", [], {}, 1.0]


def side_of(kind: str) -> tuple[frozenset[str], bool]:
    return next(side for side in reversed(SIDES) if kind in side[0])


def good(kind: str, *, has_channel: bool) -> dict[str, Any]:
    control: dict[str, Any] = {"type": kind}
    if has_channel and kind not in LEG_TYPES:
        control["channel"] = 7
    control.update({name: GOOD[name] for name in FIELDS[kind]})
    if has_channel and kind in ("open", "resume"):
        control["user"] = GOOD["user"]
    return control


def wrong_for(name: str) -> list[Any]:
    value = GOOD[name]
    if isinstance(value, bool):
        return WRONG_FLAGS
    return WRONG_NUMBERS if isinstance(value, int) else WRONG_TEXTS


@pytest.mark.parametrize(
    ("kind", "has_channel"),
    [(kind, has_channel) for legal, has_channel in SIDES for kind in sorted(legal)],
)
def test_wrong_value_in_any_field_is_an_error_of_that_tunnel(kind: str, has_channel: bool) -> None:
    """Every field of every type against every kind of wrong value."""
    legal = next(legal for legal, has in SIDES if has is has_channel and kind in legal)
    whole = good(kind, has_channel=has_channel)
    parsed = parse_control(json.dumps(whole), legal, has_channel=has_channel)
    assert as_dict(parsed) == whole
    for name in whole:
        if name in ("type", "channel"):
            continue
        missing = {key: value for key, value in whole.items() if key != name}
        for control in [missing, *({**whole, name: wrong} for wrong in wrong_for(name))]:
            with pytest.raises(TunnelError) as caught:
                parse_control(json.dumps(control), legal, has_channel=has_channel)
            assert caught.value.channel == whole.get("channel", 0)
            assert name in str(caught.value)


@pytest.mark.parametrize("channel", [None, 0, -1, MAX_CHANNEL + 1, 1.0, True, "7", [7], {}])
@pytest.mark.parametrize("kind", sorted(TO_CLIENT - LEG_TYPES))
def test_wrong_channel_is_an_error_of_the_leg(kind: str, channel: Any) -> None:
    """Without a channel nobody knows whose tunnel it is."""
    control = {**good(kind, has_channel=True), "channel": channel}
    with pytest.raises(LegError):
        parse_control(json.dumps(control), TO_CLIENT, has_channel=True)


@pytest.mark.parametrize(
    "message",
    [
        "\n", "\r\nmore", "\x1b[2J", "\x00", "\x7f", "\x85", "\u202e", "\u2028", "\u200b",
        "\ufeff", "\ud800", "\u00a0",
    ],
)  # fmt: skip
def test_message_cannot_move_a_cursor_or_begin_a_line(message: str) -> None:
    """What is not printable becomes a question mark."""
    control = {**good("refused", has_channel=False), "message": f"a{message}b"}
    parsed = parse_control(json.dumps(control), TO_USER, has_channel=False)
    assert isinstance(parsed, OpenRefused)
    assert parsed.message.isprintable()
    assert parsed.message.startswith("a?")
    assert len(parsed.message) == len(message) + 2


def test_message_is_cut_when_it_is_long() -> None:
    """A screen, not a book."""
    control = {**good("reset", has_channel=False), "message": "é" * 1000}
    parsed = parse_control(json.dumps(control, ensure_ascii=False), TO_USER, has_channel=False)
    assert isinstance(parsed, Reset)
    assert parsed.message == "é" * MAX_MESSAGE_CHARS


def assert_is_ours(error: Exception) -> None:
    """A sentence of our own, short enough for any log."""
    assert str(error).isascii()
    assert len(str(error)) < 200


def controls() -> st.SearchStrategy[str]:
    """Nearly right: a real type with fields of any kind."""
    number = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 7, 22, MAX_COUNT])
    value: st.SearchStrategy[Any] = st.none() | st.booleans() | number | st.text(max_size=40)
    value |= st.sampled_from([GOOD[name] for name in GOOD])
    value |= st.lists(st.integers(), max_size=3)
    kind = st.sampled_from(sorted(FIELDS)) | st.text(max_size=10)
    names = st.sampled_from([*sorted(GOOD), "channel", "more"])
    fields = st.dictionaries(names, value, max_size=12)
    return st.builds(lambda kind, fields: json.dumps({**fields, "type": kind}), kind, fields)


@given(
    text=st.text(max_size=5000) | controls(),
    side=st.sampled_from(SIDES),
)
@example(text="[" * 5000, side=SIDES[1])
@example(text='{"a":' * 1000, side=SIDES[1])
@example(text='{"type":' + "9" * 4000 + "}", side=SIDES[0])
@example(text='{"type":"ack","delivered":' + "9" * 4000 + "}", side=SIDES[0])
@example(text='{"type":"\ud800"}', side=SIDES[0])
@example(text='{"type":{"open":1}}', side=SIDES[0])
@example(text="\ud800" * 2000, side=SIDES[0])
def test_any_text_is_a_control_or_one_of_two_errors(
    text: str, side: tuple[frozenset[str], bool]
) -> None:
    """Nothing a peer writes raises anything else, and what passes is only what is known."""
    legal, has_channel = side
    try:
        parsed = parse_control(text, legal, has_channel=has_channel)
    except (LegError, TunnelError) as exc:
        # A peer's own words must not come back through a log or a reset.
        assert_is_ours(exc)
        return
    kind = type_of(parsed)
    assert set(as_dict(parsed)) <= {"type", "channel", "user", *FIELDS[kind]}
    assert kind in legal
    # What was read can be written, and reads the same.
    encoded = encode_control(parsed)
    assert len(encoded) <= MAX_CONTROL_BYTES
    assert parse_control(encoded.decode(), legal, has_channel=has_channel) == parsed


@given(st.binary(max_size=5000))
def test_any_bytes_are_text_or_a_leg_error(payload: bytes) -> None:
    """A text message that is not UTF-8 breaks the leg's rules."""
    is_text = payload.decode("utf-8", "ignore").encode() == payload
    if is_text:
        assert decode_text(payload).encode() == payload
    else:
        with pytest.raises(LegError) as caught:
            decode_text(payload)
        assert caught.value.close_code == 1007


@given(st.binary(max_size=20) | st.integers(0, MAX_CHANNEL).map(encode_channel))
def test_any_binary_message_has_a_channel_or_is_one_of_two_errors(message: bytes) -> None:
    """Short ones are the leg's error, empty ones the tunnel's."""
    if len(message) < 4:
        with pytest.raises(LegError):
            split_channel(message)
    elif len(message) == 4:
        with pytest.raises(TunnelError) as caught:
            split_channel(message)
        assert caught.value.channel == int.from_bytes(message, "big")
    else:
        assert encode_channel(split_channel(message)) == message[:4]


@pytest.mark.parametrize("secret", ["", " ", "a b", "a\n", "a\r\nX: y", "ä", "\x7f", "a" * 4097])
def test_secret_that_cannot_stand_in_a_header_is_none(secret: str) -> None:
    """Else it could add a header of its own."""
    assert not is_secret(secret)


def test_secret_of_printable_ascii_is_one() -> None:
    """Every character of it."""
    assert is_secret("".join(map(chr, range(0x21, 0x7F))))


def test_every_encoded_control_is_one_line_of_json() -> None:
    """Without white space, type and channel first."""
    for kind in FIELDS:
        whole = good(kind, has_channel=True)
        encoded = encode_control(from_dict({**whole, "channel": 7})).decode()
        assert re.match(rf'{{"type":"{kind}","channel":7,', encoded)
        assert "\n" not in encoded
        assert ": " not in encoded
