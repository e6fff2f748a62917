"""The client's leg: whose error is whose, and what a wrong message leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import client.tunnel_table
from http_network_relay.wire.constants import MIN_WINDOW_BYTES, OP_BINARY
from http_network_relay.wire.errors import LegError
from tests.support.client.fake_leg import ServerSide
from tests.support.targets import EchoTarget, SilentTarget, black_hole_port
from tests.support.waiting import eventually


@pytest.fixture
def server() -> Iterator[ServerSide]:
    """The server's side of one leg."""
    with ServerSide() as side:
        yield side


@pytest.fixture
def echo() -> Iterator[EchoTarget]:
    """A target that answers."""
    with EchoTarget() as target:
        yield target


def is_alive(server: ServerSide, channel: int) -> bool:
    """Whether that echoing tunnel still carries bytes both ways."""
    before = len(server.bytes_of(channel))
    server.send(channel, b"alive?")
    return server.wait_bytes(channel, before + 6)[before:] == b"alive?"


WRONG_FOR_A_TUNNEL: dict[str, Any] = {
    "no bytes": lambda s: s.say_raw(b"\0\0\0\2", OP_BINARY),
    "too many bytes": lambda s: s.say_raw(b"\0\0\0\2" + bytes(65537), OP_BINARY),
    # More than the largest window and the kernel take together.
    "overrun": lambda s: s.send(2, bytes(64 * MIN_WINDOW_BYTES)),
    "ack of too much": lambda s: s.ack(2, 1000),
    "limit that falls": lambda s: s.ack(2, 0, limit=0),
    "ack of no eof": lambda s: s.ack(2, 0, eof=True),
    "eof too early": lambda s: s.say("eof", 2, count=5),
    "second eof": lambda s: (s.say("eof", 2, count=0), s.say("eof", 2, count=0)),
    "data after eof": lambda s: (s.say("eof", 2, count=0), s.send(2, b"x")),
    "count too large": lambda s: s.say_raw(b'{"type":"eof","channel":2,"count":9007199254740993}'),
    "field missing": lambda s: s.say_raw(b'{"type":"ack","channel":2,"delivered":0}'),
    "from the wrong side": lambda s: s.say("opened", 2, limit=1, grace_s=0),
    "refused": lambda s: s.say("refused", 2, code="busy", message=""),
    "resumed": lambda s: s.say("resumed", 2, received=0, delivered=0, limit=0),
}


@pytest.mark.parametrize("name", WRONG_FOR_A_TUNNEL)
def test_tunnel_error_ends_that_tunnel_and_no_other(
    server: ServerSide, echo: EchoTarget, name: str
) -> None:
    """reset protocol_error; the neighbour and the leg go on."""
    server.open(1, echo.port)
    with SilentTarget(receive_buffer_bytes=4096) as silent:
        server.open(2, silent.port)
        server.control("opened", 1)
        server.control("opened", 2)
        victim = silent.conversation()
        WRONG_FOR_A_TUNNEL[name](server)
        reset = server.control("reset", 2)
        assert reset["code"] == "protocol_error"
        assert is_alive(server, 1)
        assert victim.wait_ended() == "reset"
    assert not server.transport.closes


@pytest.mark.parametrize("name", ["data", "eof", "ack"])
def test_message_before_opened_ends_that_tunnel_and_its_dial(
    server: ServerSide, echo: EchoTarget, name: str
) -> None:
    """The server may not send before the target accepted; the leg goes on."""
    server.open(1, echo.port)
    server.control("opened", 1)
    with black_hole_port() as hole:
        server.open(2, hole)
        eventually(lambda: len(server.tunnels.alive()) == 2)
        if name == "data":
            server.send(2, b"x")
        elif name == "eof":
            server.say("eof", 2, count=0)
        else:
            server.ack(2, 0)
        assert server.control("reset", 2)["code"] == "protocol_error"
        server.wait_forgotten(2, 0.8)
    assert server.kinds(2) == ["reset"]
    assert is_alive(server, 1)


WRONG_FOR_THE_LEG: dict[str, bytes | tuple[bytes, int]] = {
    "not JSON": b"{",
    "not UTF-8": b'{"type":"reset","channel":1,"code":"busy","message":"\xff"}',
    "not an object": b"[]",
    "no type": b"{}",
    "unknown type": b'{"type":"hello","channel":1}',
    "no channel": b'{"type":"eof","count":0}',
    "channel 0": b'{"type":"eof","channel":0,"count":0}',
    "unknown channel": b'{"type":"eof","channel":7,"count":0}',
    "unknown channel, bad field": b'{"type":"eof","channel":7}',
    "bad going_away": b'{"type":"going_away","spread_ms":-1}',
    "too long": b'{"type":"reset","channel":1,"code":"busy","message":"' + b"x" * 5000 + b'"}',
    "short binary": (b"\0\0\0", OP_BINARY),
    "empty binary": (b"", OP_BINARY),
    "binary for an unknown channel": (b"\0\0\0\7x", OP_BINARY),
}


@pytest.mark.parametrize("name", WRONG_FOR_THE_LEG)
def test_leg_error_ends_the_leg_with_its_code(
    server: ServerSide, echo: EchoTarget, name: str
) -> None:
    """1002, 1009 for size, 1007 for text; all its tunnels end, their targets with RST."""
    server.open(1, echo.port)
    server.control("opened", 1)
    victim = echo.conversation()
    wrong = WRONG_FOR_THE_LEG[name]
    payload, opcode = wrong if isinstance(wrong, tuple) else (wrong, 1)
    server.say_raw(payload, opcode)
    code = server.wait_served()
    assert code == {"too long": 1009, "not UTF-8": 1007}.get(name, 1002)
    assert [(close[0], close[2]) for close in server.transport.closes] == [(code, False)]
    assert victim.wait_ended() == "reset"


def test_leg_error_of_the_transport_ends_the_leg_with_its_code(server: ServerSide) -> None:
    """A giant frame, for example."""
    server.transport.messages.put(LegError("a frame is too long", 1009))
    assert server.wait_served() == 1009
    assert server.transport.closes == [(1009, "a frame is too long", False)]


def test_close_of_the_server_is_the_result(server: ServerSide) -> None:
    """The agent judges it."""
    server.transport.messages.put((8, 4409))
    assert server.wait_served() == 4409


def test_message_for_a_channel_that_has_ended_is_dropped(
    server: ServerSide, echo: EchoTarget
) -> None:
    """A cancelled download is a normal race: no answer, no error."""
    server.open(1, echo.port)
    server.open(2, echo.port)
    server.control("opened", 1)
    server.control("opened", 2)
    server.say("reset", 2, code="user_gone", message="")
    server.wait_forgotten(2)
    server.send(2, b"late")
    server.ack(2, 10**9)
    server.say("eof", 2, count=5)
    server.say("reset", 2, code="user_gone", message="")
    server.say("detached", 2, code="user_lost")
    server.say_raw(b'{"type":"ack","channel":2}')
    server.say_raw(b"\0\0\0\2", OP_BINARY)
    assert is_alive(server, 1)
    assert server.kinds(2) == ["opened"]


def test_channel_is_never_used_twice(server: ServerSide, echo: EchoTarget) -> None:
    """A second `open` of a channel, ended or not, is a leg error: the server numbers them."""
    server.open(5, echo.port)
    server.control("opened", 5)
    server.open(3, echo.port, tunnel_id="f" * 32)
    assert server.wait_served() == 1002


def test_channels_may_skip_numbers(server: ServerSide, echo: EchoTarget) -> None:
    """An `open` that was taken back was never sent."""
    server.open(3, echo.port)
    server.open(9, echo.port)
    server.control("opened", 3)
    server.control("opened", 9)
    # Between them: assigned by order, and ended.
    server.send(4, b"dropped")
    assert is_alive(server, 3)


def test_tunnel_id_in_use_is_refused_and_the_first_not_touched(
    server: ServerSide, echo: EchoTarget
) -> None:
    """Of the same user only; another user's ids are theirs."""
    server.open(1, echo.port, tunnel_id="a" * 32)
    server.control("opened", 1)
    server.open(2, echo.port, tunnel_id="a" * 32)
    assert server.control("refused", 2)["code"] == "protocol_error"
    server.open(3, echo.port, tunnel_id="a" * 32, user="bert")
    server.control("opened", 3)
    assert is_alive(server, 1)
    assert is_alive(server, 3)


def test_resume_of_a_tunnel_without_grace_is_refused_as_unknown(
    server: ServerSide, echo: EchoTarget
) -> None:
    """`--resume-timeout 0`: such a tunnel is not kept, and nobody takes it over."""
    server.open(1, echo.port)
    server.control("opened", 1)
    server.resume(2, echo.port, of=1)
    assert server.control("refused", 2)["code"] == "unknown_tunnel"
    assert is_alive(server, 1)


@pytest.mark.parametrize("protocol", ["udp", "x"])
def test_other_protocol_is_refused(server: ServerSide, echo: EchoTarget, protocol: str) -> None:
    """Version 1 knows tcp."""
    server.open(1, echo.port, protocol=protocol)
    assert server.control("refused", 1)["code"] == "protocol_unsupported"
    assert not echo.conversations


def test_one_tunnel_too_many_is_refused(
    server: ServerSide, echo: EchoTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there is room again when one has ended."""
    assert client.tunnel_table.MAX_TUNNELS == 512
    monkeypatch.setattr(client.tunnel_table, "MAX_TUNNELS", 3)
    for channel in (1, 2, 3, 4):
        server.open(channel, echo.port)
    assert server.control("refused", 4)["code"] == "busy"
    server.control("opened", 3)
    server.say("reset", 1, code="user_gone", message="")
    server.wait_forgotten(1)
    server.open(5, echo.port)
    server.control("opened", 5)


def test_going_away_is_noted_and_ends_nothing(server: ServerSide, echo: EchoTarget) -> None:
    """The leg lives until the server closes it."""
    server.open(1, echo.port)
    server.control("opened", 1)
    server.say("going_away", spread_ms=1500)
    assert is_alive(server, 1)
    assert server.leg.spread_s == 1.5
    assert server.leg.is_leaving.is_set()


def test_unknown_fields_are_ignored(server: ServerSide, echo: EchoTarget) -> None:
    """A newer server may say more."""
    server.open(1, echo.port, colour="blue", deep={"a": [1]})
    server.control("opened", 1)
    assert is_alive(server, 1)
