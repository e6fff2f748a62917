"""The agent against servers played by hand: when it comes back, and how it stops."""

from __future__ import annotations

import json
import logging
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import client.agent
from client.agent import CAP_S, Agent
from client.config import ClientConfig
from http_network_relay.dial.backoff import Backoff
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from tests.support.client.by_hand import HandServer, Visitor, frame, hand_server, stay
from tests.support.targets import RecordingTarget, SilentTarget, black_hole_port

SECRET = "cs-a-secret-that-is-looked-for"
SEED = 11


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class PromptAgent(Agent):
    """Does not wait between its tries, but notes how long it would have; stops after some."""

    def __init__(self, config: ClientConfig, tries: int) -> None:
        super().__init__(config, random.Random(SEED).uniform)
        self.waits: list[float] = []
        self.has_tried = threading.Event()
        self._tries = tries

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) >= self._tries:
            self.has_tried.set()
            super()._wait(10.0)


def config_for(endpoint: Endpoint) -> ClientConfig:
    return ClientConfig(endpoint=endpoint, name="lab-1", secret=SECRET)


@contextmanager
def running(agent: Agent, *, stops_in_s: float = 2.0) -> Iterator[Agent]:
    """The agent, stopped at the end and in time."""
    agent.start()
    try:
        yield agent
    finally:
        begun = time.monotonic()
        agent.stop()
        has_ended = agent.join(begun + 5.0)
        seconds = time.monotonic() - begun
    assert has_ended
    assert seconds < stops_in_s


def tries(serve: Callable[[Visitor], None], count: int) -> tuple[list[float], HandServer]:
    """What the agent waits after each of `count` tries against that server."""
    with hand_server(serve) as server:
        agent = PromptAgent(config_for(server.endpoint), count)
        with running(agent):
            assert agent.has_tried.wait(10.0)
    return agent.waits[:count], server


def drop(visitor: Visitor) -> None:
    """Read the request and end the connection."""
    visitor.read_head()


def closing(code: int, *before: bytes) -> Callable[[Visitor], None]:
    def serve(visitor: Visitor) -> None:
        visitor.upgrade(*before, frame(OP_CLOSE, struct.pack("!H", code)))
        visitor.wait_gone()

    return serve


def answering(status: str, code: str, **headers: str) -> Callable[[Visitor], None]:
    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        body = json.dumps({"code": code, "message": "because"}).encode()
        visitor.answer(status, body, HTTP_Network_Relay="v1", **headers)

    return serve


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records]


# Coming back.


@pytest.mark.parametrize(
    "serve", [drop, closing(1012), closing(1001)], ids=["drop", "1012", "1001"]
)
def test_retries_follow_the_backoff(serve: Callable[[Visitor], None]) -> None:
    """At once, then with full jitter on a doubling bound."""
    waits, _ = tries(serve, 8)
    expected = Backoff(CAP_S, random.Random(SEED).uniform)
    assert waits == [expected.next_s() for _ in range(8)]


def test_server_that_is_not_there_is_tried_by_the_backoff() -> None:
    """Refused connections too."""
    with hand_server(drop) as server:
        endpoint = server.endpoint
    agent = PromptAgent(config_for(endpoint), 5)
    with running(agent):
        assert agent.has_tried.wait(5.0)
    expected = Backoff(CAP_S, random.Random(SEED).uniform)
    assert agent.waits[:5] == [expected.next_s() for _ in range(5)]


def test_every_try_says_who_it_is_and_is_the_same_instance() -> None:
    """Name and secret, and 32 hex digits that stay for the life of the process."""
    _, server = tries(drop, 3)
    _, other = tries(drop, 1)
    assert {visitor.header("Authorization") for visitor in server.visitors} == {
        "Basic bGFiLTE6Y3MtYS1zZWNyZXQtdGhhdC1pcy1sb29rZWQtZm9y"
    }
    (instance,) = {visitor.header("HTTP-Network-Relay-Instance") for visitor in server.visitors}
    assert len(instance) == 32
    assert int(instance, 16) >= 0
    assert other.visitors[0].header("HTTP-Network-Relay-Instance") != instance


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("401 No", "unauthorized"),
        ("403 No", "forbidden"),
        ("404 No", "not_found"),
        ("426 No", "version_unsupported"),
    ],
)
def test_refusal_is_an_error_line_and_tried_at_the_cap(
    status: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is there to start it again; the operator may correct it."""
    waits, _ = tries(answering(status, code), 3)
    assert waits == [CAP_S] * 3
    assert levels(caplog) == ["ERROR"] * 3
    assert f"reason={code}" in caplog.text
    assert "because" in caplog.text
    assert SECRET not in caplog.text


def test_busy_server_is_tried_when_it_says() -> None:
    """Never before Retry-After."""
    waits, _ = tries(answering("503 No", "busy", Retry_After="9"), 3)
    assert waits == [9.0] * 3


def test_replaced_by_another_machine_waits_at_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    """Two machines with one name must not fight for it."""
    waits, _ = tries(closing(4409), 2)
    assert waits == [CAP_S] * 2
    assert levels(caplog) == ["ERROR"] * 2
    assert "another machine registered as lab-1" in caplog.text


def test_replaced_by_itself_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Its own return was faster than the old leg's end."""
    caplog.set_level(logging.INFO)
    tries(closing(4408), 1)
    assert set(levels(caplog)) == {"INFO"}


def holding(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """From here on each leg seems to have held so long."""
    real = Backoff.lasted
    monkeypatch.setattr(Backoff, "lasted", lambda self, _, **kw: real(self, seconds, **kw))


def test_leg_that_held_starts_the_backoff_anew_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first retry after it is immediate, whatever went before."""
    count = 0

    def serve(visitor: Visitor) -> None:
        nonlocal count
        count += 1
        if count <= 5:
            drop(visitor)
            return
        holding(monkeypatch, 60.0)
        closing(1001)(visitor)

    waits, _ = tries(serve, 7)
    assert waits[4] > 0
    assert waits[5:] == [0.0, 0.0]


def carry(visitor: Visitor, number: int, port: int) -> None:
    """Open a tunnel on this leg."""
    opening = {**OPEN, "port": port, "tunnel_id": f"{number:032x}"}
    visitor.upgrade(frame(OP_TEXT, json.dumps(opening).encode()))
    assert json.loads(visitor.read_frame()[1])["type"] == "opened"


def test_leg_that_carried_a_tunnel_starts_the_backoff_anew() -> None:
    """However short it held: the tunnel waits for the next one."""
    count = 0

    def serve(visitor: Visitor) -> None:
        nonlocal count
        count += 1
        if count <= 5:
            drop(visitor)
            return
        carry(visitor, count, target.port)

    with RecordingTarget() as target:
        waits, _ = tries(serve, 7)
    assert waits[4] > 0
    assert waits[5:] == [0.0, 0.0]


def test_leg_that_was_told_to_leave_starts_the_backoff_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that restarts time and again, and is away for longer each time."""
    monkeypatch.setattr(client.agent, "_RESTART_S", 0.0)
    count = 0

    def serve(visitor: Visitor) -> None:
        nonlocal count
        count += 1
        if count != 6:
            drop(visitor)
            return
        carry(visitor, count, target.port)
        visitor.sock.sendall(frame(OP_TEXT, b'{"type":"going_away","spread_ms":0}'))
        visitor.wait_gone()

    with RecordingTarget() as target:
        waits, _ = tries(serve, 8)
    assert waits[4] > 0
    assert waits[5:7] == [0.0, 0.0]  # Within spread_ms; then the first failure.
    assert 0 < waits[7] <= 0.2


def test_leg_that_does_not_hold_does_not_start_the_backoff_anew() -> None:
    """A server that accepts and drops in a loop is not hammered."""
    waits, _ = tries(closing(1001), 12)
    assert max(waits) > 5.0


def test_return_after_going_away_is_spread_and_then_quick() -> None:
    """Within spread_ms first; then every 100 to 300 ms for three seconds."""
    going = frame(OP_TEXT, b'{"type":"going_away","spread_ms":800}')
    count = 0

    def serve(visitor: Visitor) -> None:
        nonlocal count
        count += 1
        (closing(1012, going) if count == 1 else drop)(visitor)

    waits, _ = tries(serve, 5)
    assert 0.0 <= waits[0] <= 0.8
    assert all(0.1 <= wait <= 0.3 for wait in waits[1:])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 101 x\r\nSet-Cookie: a,b=1\r\n\r\n",
        b"\xff" * 99,
    ],
)
def test_no_answer_ends_the_agent(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """An unattended machine would be lost for good."""

    def serve(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.sock.sendall(answer)

    tries(serve, 3)
    assert levels(caplog) == ["WARNING"] * 3


def test_broken_protocol_ends_the_leg_and_not_the_agent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server reads why; then the client comes back."""
    closes: list[tuple[int, bytes]] = []

    def serve(visitor: Visitor) -> None:
        visitor.upgrade(frame(OP_TEXT, b"not JSON"))
        closes.append(visitor.read_frame())
        visitor.wait_gone()

    tries(serve, 3)
    assert [close[0] for close in closes[:3]] == [OP_CLOSE] * 3
    assert closes[0][1][:2] == struct.pack("!H", 1002)
    assert "ERROR" in levels(caplog)


# Stopping.


def test_stop_while_waiting_to_retry_ends_at_once() -> None:
    """In the middle of 30 s."""
    with hand_server(answering("401 No", "unauthorized")) as server:
        agent = PromptAgent(config_for(server.endpoint), tries=1)
        with running(agent, stops_in_s=0.5):
            assert agent.has_tried.wait(5.0)
            assert agent.waits == [CAP_S]


@pytest.mark.parametrize("stage", ["tcp", "upgrade"])
def test_stop_during_a_dial_ends_soon(stage: str) -> None:
    """Nobody answers the SYN; nobody answers the request."""
    with hand_server(stay) as server, black_hole_port() as hole:
        port = hole if stage == "tcp" else server.port
        agent = Agent(config_for(Endpoint(False, "127.0.0.1", port, "/p")))
        with running(agent, stops_in_s=0.6):
            if stage == "upgrade":
                server.visitor()


@pytest.mark.parametrize("moment", ["before the dial", "after the dial", "before the leg reads"])
def test_stop_while_a_leg_comes_up_is_not_missed(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no leg to close yet, and a moment later there would be one for ever."""

    def serve(visitor: Visitor) -> None:
        visitor.upgrade()
        visitor.sock.sendall(frame(visitor.read_frame()[0], struct.pack("!H", 1001)))

    real_connect, real_serve = client.agent.connect, client.agent.Leg.serve

    def connect(*args: Any, **options: Any) -> Any:
        if moment == "before the dial":
            agent.stop()
        transport = real_connect(*args, **options)
        if moment == "after the dial":
            agent.stop()
        return transport

    def read(leg: Any) -> int:
        if moment == "before the leg reads":
            agent.stop()
        return real_serve(leg)

    monkeypatch.setattr(client.agent, "connect", connect)
    monkeypatch.setattr(client.agent.Leg, "serve", read)
    with hand_server(serve) as server:
        agent = Agent(config_for(server.endpoint))
        begun = time.monotonic()
        agent.start()
        assert agent.join(begun + 5.0)
        assert time.monotonic() - begun < 1.0


OPEN = {
    "type": "open", "channel": 1, "client": "lab-1", "host": "127.0.0.1", "protocol": "tcp",
    "tunnel_id": "0" * 32, "resume_token": "0" * 64, "limit": 262_144, "grace_s": 0, "user": "a",
}  # fmt: skip


def test_stop_resets_each_tunnel_with_a_reason_and_closes_the_leg() -> None:
    """The proxy user reads why, the target gets RST, the server a close of 1001."""
    said: list[tuple[int, bytes]] = []
    is_open = threading.Event()

    with RecordingTarget() as target:

        def serve(visitor: Visitor) -> None:
            opening = json.dumps({**OPEN, "port": target.port}).encode()
            visitor.upgrade(frame(OP_TEXT, opening))
            while True:
                said.append(visitor.read_frame())
                is_open.set()
                if said[-1][0] == OP_CLOSE:
                    visitor.sock.sendall(frame(OP_CLOSE, said[-1][1][:2]))
                    return

        with hand_server(serve) as server:
            agent = Agent(config_for(server.endpoint))
            with running(agent):
                assert is_open.wait(5.0)
                conversation = target.conversation()
            assert conversation.wait_ended() == "reset"
    assert json.loads(said[0][1])["type"] == "opened"
    assert json.loads(said[1][1])["code"] == "client_stopped"
    assert said[2] == (OP_CLOSE, struct.pack("!H", 1001) + b"client stopped")


def test_stop_ends_in_time_although_server_and_target_are_stuck() -> None:
    """A server that reads nothing and answers no close, a target that takes nothing."""
    ends, is_up = threading.Event(), threading.Event()

    with SilentTarget(receive_buffer_bytes=4096) as target:

        def serve(visitor: Visitor) -> None:
            opening = json.dumps({**OPEN, "port": target.port}).encode()
            visitor.upgrade(frame(OP_TEXT, opening))
            assert json.loads(visitor.read_frame()[1])["type"] == "opened"
            for _ in range(4):
                visitor.sock.sendall(frame(OP_BINARY, b"\0\0\0\1" + bytes(65_532)))
            is_up.set()
            ends.wait(10.0)

        with hand_server(serve) as server:
            agent = Agent(config_for(server.endpoint))
            with running(agent):
                assert is_up.wait(5.0)
            ends.set()


def test_agent_that_fails_logs_the_bug_and_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is there to restart it."""
    tries = threading.Semaphore(0)

    def broken(*_: object, **__: object) -> None:
        tries.release()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(client.agent, "connect", broken)
    monkeypatch.setattr(client.agent, "CAP_S", 0.05)
    agent = Agent(config_for(Endpoint(False, "127.0.0.1", 1, "/p")))
    with running(agent):
        for _ in range(3):
            assert tries.acquire(timeout=5.0)
    assert set(levels(caplog)) == {"ERROR"}
    assert caplog.records[0].exc_info is not None
