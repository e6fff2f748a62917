"""The whole client against a server played by hand: tunnels that outlive its legs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from client.agent import Agent
from client.config import ClientConfig
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from tests.support.client.by_hand import PlayedLeg, PlayedServer
from tests.support.targets import (
    Conversation,
    EchoTarget,
    RecordingTarget,
    Target,
    pseudo_random_bytes,
)
from tests.support.waiting import eventually

KIB = 1024
TOKEN = "5" * 64


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[PlayedServer]:
    """A server whose legs the test plays."""
    with PlayedServer() as played:
        yield played


@pytest.fixture
def echo() -> Iterator[EchoTarget]:
    """A target that answers."""
    with EchoTarget() as target:
        yield target


@contextmanager
def running(server: PlayedServer, *, grace_s: int = 120) -> Iterator[Agent]:
    """A client of that server; at the end it must stop within 2 s."""
    endpoint = Endpoint(False, "127.0.0.1", server.port, "/ws_for_clients")
    agent = Agent(ClientConfig(endpoint=endpoint, name="lab-1", secret="cs", grace_s=grace_s))
    agent.start()
    try:
        yield agent
    finally:
        begun = time.monotonic()
        agent.stop()
        has_ended = agent.join(begun + 5.0)
        assert has_ended
        assert time.monotonic() - begun < 2.0


@pytest.fixture
def agent(server: PlayedServer) -> Iterator[Agent]:
    """A running client."""
    with running(server) as made:
        yield made


def opening(port: int, number: int = 1) -> dict[str, Any]:
    return {
        "client": "lab-1", "host": "127.0.0.1", "port": port, "protocol": "tcp",
        "tunnel_id": f"{number:032x}", "resume_token": TOKEN, "limit": MIN_WINDOW_BYTES,
        "grace_s": 120, "user": "anna",
    }  # fmt: skip


def opened(leg: PlayedLeg, target: Target, channel: int = 1) -> Conversation:
    before = len(target.conversations)
    leg.say("open", channel, **opening(target.port, channel))
    assert leg.control("opened", channel)["grace_s"] == 120
    return target.conversation(before)


def resumed(
    leg: PlayedLeg,
    target: Target,
    received: int,
    *,
    attempt: int = 1,
    channel: int = 1,
    of: int = 1,
) -> dict[str, Any]:
    more = {"attempt": attempt, "received": received, "delivered": received}
    fields = {**opening(target.port, of), **more, "limit": received + MIN_WINDOW_BYTES}
    leg.say("resume", channel, **fields)
    return leg.control("resumed", channel)


def is_alive(leg: PlayedLeg, channel: int = 1) -> bool:
    """Whether that echoing tunnel still carries bytes both ways."""
    before = len(leg.data.get(channel, b""))
    leg.send(b"alive?", channel)
    return leg.wait_bytes(before + 6, channel)[before:] == b"alive?"


def test_open_that_comes_while_the_client_stops_begins_nothing(
    server: PlayedServer, echo: EchoTarget
) -> None:
    """Its leg would be lost in a moment, and the process wait for the grace to end."""
    with running(server) as agent:
        leg = server.leg()
        agent.stop()
        assert leg.wait_close() == 1001
        leg.say("open", 1, **opening(echo.port))
        leg.cut()
    assert echo.conversations == []


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("rst", [False, True], ids=["FIN", "RST"])
def test_leg_that_is_cut_in_a_transfer_costs_no_byte_either_way(
    server: PlayedServer, echo: EchoTarget, rst: bool
) -> None:
    """What was on the way both ways is sent again, from what each end has taken in."""
    data = pseudo_random_bytes(700 * KIB)
    leg = server.leg()
    conversation = opened(leg, echo)
    got = bytearray()
    sent, cuts, limit = 0, 0, MIN_WINDOW_BYTES
    while len(got) < len(data):
        # As much as the window allows goes out, and not all that comes back is read.
        leg.send(data[sent:limit], 1)
        sent = max(sent, min(limit, len(data)))
        wanted = min(len(data), len(got) + 90 * KIB)
        got += leg.wait_bytes(wanted - len(got), 1)
        if len(got) >= len(data):
            break
        leg.cut(rst=rst)
        cuts += 1
        leg = server.leg()
        answer = resumed(leg, echo, len(got), attempt=cuts)
        assert answer["delivered"] <= answer["received"] <= sent
        sent, limit = answer["received"], answer["limit"]
        assert data[: len(got)] == got
    assert got == data
    assert cuts >= 3
    assert conversation.ended is None


@pytest.mark.usefixtures("agent")
def test_two_tunnels_of_a_lost_leg_are_resumed_each_for_itself(
    server: PlayedServer, echo: EchoTarget
) -> None:
    """In another order, on other channels."""
    leg = server.leg()
    for channel in (1, 2):
        opened(leg, echo, channel)
        assert is_alive(leg, channel)
    leg.cut()
    leg = server.leg()
    for channel, of in ((4, 2), (9, 1)):
        answer = resumed(leg, echo, 6, channel=channel, of=of)
        assert answer["received"] == 6
        assert is_alive(leg, channel)


@pytest.mark.usefixtures("agent")
def test_next_leg_is_up_while_the_first_still_carries(
    server: PlayedServer, echo: EchoTarget
) -> None:
    """`going_away`: the tunnels change over, one by one, and lose no moment."""
    first = server.leg()
    for channel in (1, 2):
        opened(first, echo, channel)
    first.say("going_away", spread_ms=50)
    second = server.leg()
    assert is_alive(first, 1)
    assert is_alive(first, 2)
    answer = resumed(second, echo, 6, of=1)
    assert answer["received"] == 6
    assert first.control("reset", 1)["code"] == "superseded"
    assert is_alive(second, 1)
    assert is_alive(first, 2)  # The other one is still there.
    first.close(1012)
    # Both were the same client's: no third leg comes for it.
    assert is_alive(second, 1)
    assert resumed(second, echo, 12, channel=2, of=2)["received"] == 12
    assert not server.has_leg()


@pytest.mark.usefixtures("agent")
def test_next_leg_is_tried_again_while_the_new_server_is_not_there(
    server: PlayedServer, echo: EchoTarget
) -> None:
    """The old server refuses it; the first leg carries on meanwhile."""
    first = server.leg()
    opened(first, echo)
    server.refusals.extend([("503 No", "server_restart", {"Retry_After": "1"})] * 3)
    first.say("going_away", spread_ms=0)
    second = server.leg()
    assert server.refused == ["server_restart"] * 3
    assert is_alive(first, 1)
    assert resumed(second, echo, 6)["received"] == 6


def test_client_stops_while_two_legs_are_up(server: PlayedServer, echo: EchoTarget) -> None:
    """Each is closed with 1001, each tunnel reset with its reason; no thread is left."""
    with running(server):
        first = server.leg()
        opened(first, echo, 1)
        first.say("going_away", spread_ms=0)
        second = server.leg()
        opened(second, echo, 2)
        # The reading half of both goes on while it stops.
        codes: dict[int, int] = {}
        readers = [
            threading.Thread(target=lambda n=n, at=at: codes.update({n: at.wait_close()}))
            for n, at in enumerate((first, second), 1)
        ]
        for reader in readers:
            reader.start()
    for reader in readers:
        reader.join()
    assert codes == {1: 1001, 2: 1001}
    assert first.control("reset", 1)["code"] == "client_stopped"
    assert second.control("reset", 2)["code"] == "client_stopped"


@pytest.mark.parametrize("is_back", [False, True], ids=["no leg", "another leg"])
def test_client_stops_at_once_while_tunnels_are_detached(
    server: PlayedServer, is_back: bool
) -> None:
    """No grace is waited for; the targets read a reset."""
    with RecordingTarget() as target:
        with running(server):
            leg = server.leg()
            conversations = [opened(leg, target, channel) for channel in (1, 2, 3)]
            if not is_back:
                server.refusals.extend([("401 No", "unauthorized", {})] * 9)
            leg.cut()
            if is_back:
                server.leg()
            else:
                eventually(lambda: server.refused)
        for conversation in conversations:
            assert conversation.wait_ended() == "reset"


def test_target_is_reset_when_the_leg_is_lost_without_grace(server: PlayedServer) -> None:
    """--resume-timeout 0: as if resume had never been."""
    with RecordingTarget() as target, running(server, grace_s=0):
        leg = server.leg()
        leg.say("open", 1, **opening(target.port))
        assert leg.control("opened", 1)["grace_s"] == 0
        conversation = target.conversation()
        leg.cut()
        assert conversation.wait_ended() == "reset"
        leg = server.leg()
        more = {"attempt": 1, "received": 0, "delivered": 0}
        leg.say("resume", 1, **{**opening(target.port), **more})
        assert leg.control("refused", 1)["code"] == "unknown_tunnel"


def test_target_is_reset_when_the_grace_is_over(
    server: PlayedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With the line of a lost leg; the client itself goes on."""
    caplog.set_level(logging.INFO)
    with RecordingTarget() as target, running(server, grace_s=1):
        leg = server.leg()
        leg.say("open", 1, **opening(target.port))
        leg.control("opened", 1)
        conversation = target.conversation()
        begun = time.monotonic()
        leg.cut()
        server.leg()
        assert conversation.wait_ended() == "reset"
        assert 0.8 < time.monotonic() - begun < 2.0
        eventually(lambda: "tunnel closed" in caplog.text and "tunnel detached" in caplog.text)
    lines = [record.getMessage() for record in caplog.records]
    assert "tunnel detached tunnel=00000000 user=anna reason=leg_lost" in lines
    assert any("tunnel closed tunnel=00000000 user=anna reason=leg_lost" in line for line in lines)
