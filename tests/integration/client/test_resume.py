"""Tunnels of the client that outlive their legs: resumed, refused, expired, limited, remembered."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import client.tunnel_table
from client.forwarder import Forwarder
from http_network_relay.wire.constants import MESSAGE_BYTES, MIN_WINDOW_BYTES
from http_network_relay.wire.errors import RelayError
from server.config import LEG_BUDGET_BYTES
from tests.support.client.fake_leg import ServerSide
from tests.support.targets import (
    Conversation,
    EchoTarget,
    RecordingTarget,
    SilentTarget,
    SourceTarget,
    Target,
    black_hole_port,
    pseudo_random_bytes,
)
from tests.support.waiting import eventually

KIB = 1024
MIB = 1024 * KIB
STOPPED = RelayError("client_stopped", "the end of the test")


@pytest.fixture
def server() -> Iterator[ServerSide]:
    """The server's side of one leg, whose tunnels are kept for two minutes."""
    with ServerSide(grace_s=120) as side:
        yield side


@pytest.fixture
def echo() -> Iterator[EchoTarget]:
    """A target that answers."""
    with EchoTarget() as target:
        yield target


def opened(server: ServerSide, target: Target, channel: int = 1, **fields: Any) -> Conversation:
    before = len(target.conversations)
    server.open(channel, target.port, **fields)
    server.control("opened", channel)
    return target.conversation(before)


def is_alive(server: ServerSide, channel: int) -> bool:
    """Whether that echoing tunnel still carries bytes both ways."""
    before = len(server.bytes_of(channel))
    server.send(channel, b"alive?")
    return server.wait_bytes(channel, before + 6)[before:] == b"alive?"


def detach(server: ServerSide, channel: int) -> Forwarder:
    """The user's leg is lost, and the client knows."""
    tunnel = server.tunnel(channel)
    server.say("detached", channel, code="user_lost")
    eventually(lambda: tunnel.end.is_detached or tunnel.end.is_over)
    return tunnel


def shorten(tunnel: Forwarder, grace_s: float = 0.1) -> None:
    """Let its grace be over soon."""
    with tunnel.end.changed:
        tunnel.end.grace_s = grace_s
        tunnel.end.changed.notify_all()


# Coming back.


def test_opened_states_the_clients_grace_and_the_smaller_one_holds(
    server: ServerSide, echo: EchoTarget
) -> None:
    """Each end says its own."""
    opened(server, echo, 1, grace_s=7)
    assert server.control("opened", 1)["grace_s"] == 120
    assert server.tunnel(1).end.grace_s == 7
    opened(server, echo, 2, grace_s=1000)
    assert server.tunnel(2).end.grace_s == 120


def test_tunnel_goes_on_with_every_byte_from_leg_to_leg(
    server: ServerSide, echo: EchoTarget
) -> None:
    """The leg is lost with bytes of both directions on the way, three times."""
    data = pseudo_random_bytes(900 * KIB)
    conversation = opened(server, echo)
    server.send(1, data[: 200 * KIB])
    got = server.wait_bytes(1, 100 * KIB)
    legs, sent = [server], 200 * KIB
    try:
        for attempt in (1, 2, 3):
            legs[-1].lose()
            legs.append(ServerSide(server.tunnels))
            got_before = len(got)
            legs[-1].resume(
                1, echo.port, of=1, attempt=attempt, received=got_before, delivered=got_before,
                limit=got_before + MIN_WINDOW_BYTES,
            )  # fmt: skip
            resumed = legs[-1].control("resumed", 1)
            # What was said before the loss has come whole: the fake leg loses nothing that way.
            assert resumed["received"] == sent
            assert resumed["delivered"] <= sent
            assert resumed["limit"] >= sent
            more = data[sent : min(resumed["limit"], sent + 200 * KIB)]
            legs[-1].send(1, more)
            sent += len(more)
            got += legs[-1].wait_bytes(1, min(sent, got_before + MIN_WINDOW_BYTES) - got_before)
            assert got == data[: len(got)]
            assert legs[-1].order[0] == (1, "resumed")
        assert conversation.ended is None
    finally:
        for leg in legs[1:]:
            leg.end()


def test_target_that_ends_while_nobody_is_there_is_heard_later(server: ServerSide) -> None:
    """Its last words and its eof wait for the user; so does its FIN for the other direction."""
    with RecordingTarget(close_on_eof=False) as target:
        conversation = opened(server, target)
        server.send(1, b"up")
        conversation.wait_received(2)
        detach(server, 1)
        conversation.send(b"last words")
        conversation.shutdown_write()
        server.resume(2, target.port, of=1)
        assert server.wait_bytes(2, 10) == b"last words"
        assert server.control("eof", 2)["count"] == 10
        assert server.control("resumed", 2)["received"] == 2
        server.send(2, b" more")
        conversation.wait_received(7)
        server.say("eof", 2, count=7)
        assert server.control("ack", 2)["eof"] is True
        server.ack(2, 10, eof=True)
        assert conversation.wait_ended() == "eof"
        server.wait_forgotten(2)


def test_bytes_and_eof_that_came_before_the_loss_reach_the_target_without_a_leg(
    server: ServerSide,
) -> None:
    """The target does not wait for the user to come back."""
    with RecordingTarget(close_on_eof=False) as target:
        conversation = opened(server, target)
        server.send(1, b"all of it")
        server.say("eof", 1, count=9)
        tunnel = server.tunnel(1)
        server.lose()
        assert conversation.wait_ended() == "eof"
        assert conversation.received == b"all of it"
        assert tunnel.end.is_detached


def test_last_ack_that_was_lost_is_said_again(server: ServerSide, echo: EchoTarget) -> None:
    """The tunnel is finished here, its target closed; the user still asks how it ended."""
    opened(server, echo)
    server.send(1, b"x")
    server.say("eof", 1, count=1)
    server.control("eof", 1)
    server.ack(1, 1, eof=True)
    server.wait_forgotten(1)
    for number in (2, 3):
        server.resume(number, echo.port, of=1, attempt=number, received=1, delivered=1)
        resumed = server.control("resumed", number)
        assert (resumed["received"], resumed["delivered"]) == (1, 1)
        assert server.control("eof", number)["count"] == 1
        server.say("eof", number, count=1)
        assert server.control("ack", number)["eof"] is True
        server.ack(number, 1, eof=True)
    assert "reset" not in server.kinds(3)


def test_resume_while_the_old_channel_lives_ends_that_channel_and_not_the_tunnel(
    server: ServerSide, echo: EchoTarget
) -> None:
    """`superseded` there; whatever comes late on it is ignored."""
    conversation = opened(server, echo)
    assert is_alive(server, 1)
    server.resume(2, echo.port, of=1, received=6, delivered=6)
    assert server.control("reset", 1)["code"] == "superseded"
    server.send(1, b"late")
    server.ack(1, 2**40)
    server.say("eof", 1, count=77)
    server.say("detached", 1, code="user_lost")
    server.say("reset", 1, code="user_gone", message="")
    server.say_raw(b'{"type":"ack","channel":1}')
    assert is_alive(server, 2)
    assert conversation.ended is None
    assert conversation.received_bytes == 12
    assert server.kinds(1) == ["opened", "data", "reset"]


def test_resume_on_another_leg_while_the_old_one_is_up_takes_the_tunnel_over(
    server: ServerSide, echo: EchoTarget
) -> None:
    """Two legs at once: the loss of the old one a moment later does not concern it."""
    conversation = opened(server, echo)
    assert is_alive(server, 1)
    with ServerSide(server.tunnels) as second:
        second.resume(1, echo.port, of=1, received=6, delivered=6)
        second.control("resumed", 1)
        assert server.control("reset", 1)["code"] == "superseded"
        server.send(1, b"late")
        server.lose()
        assert is_alive(second, 1)
        assert conversation.received_bytes == 12


def test_user_who_goes_away_after_a_resume_ends_the_tunnel_at_once(
    server: ServerSide, echo: EchoTarget
) -> None:
    """FIN, no grace, nothing remembered: a later resume finds nothing."""
    conversation = opened(server, echo)
    detach(server, 1)
    server.resume(2, echo.port, of=1)
    server.control("resumed", 2)
    server.say("reset", 2, code="user_gone", message="")
    assert conversation.wait_ended() == "eof"
    server.wait_forgotten(2)
    server.resume(3, echo.port, of=1, attempt=2)
    assert server.control("refused", 3)["code"] == "unknown_tunnel"
    # And its id is free again.
    server.open(4, echo.port, tunnel_id=f"{1:032x}")
    server.control("opened", 4)


# Refusals.

MISMATCH: dict[str, dict[str, Any]] = {
    "no such tunnel": {"tunnel_id": "f" * 32},
    "another user": {"user": "bert"},
    "wrong token": {"resume_token": "0" * 63 + "1"},
    "wrong host": {"host": "127.0.0.2"},
    "wrong port": {"port": 1},
    "wrong protocol": {"protocol": "udp"},
    "all wrong, old attempt": {"resume_token": "f" * 64, "attempt": 0, "received": 10**9},
}


def test_whatever_does_not_fit_is_refused_in_the_same_words(
    server: ServerSide, echo: EchoTarget
) -> None:
    """They must not tell which tunnels are there, nor in what a guess was wrong."""
    opened(server, echo)
    answers = set()
    for number, fields in enumerate(MISMATCH.values(), 2):
        server.resume(number, **{"port": echo.port, "of": 1, **fields})
        refused = server.control("refused", number)
        answers.add((refused["code"], refused["message"]))
    assert len(answers) == 1
    assert next(iter(answers))[0] == "unknown_tunnel"
    assert is_alive(server, 1)


def test_tunnel_that_still_dials_is_refused_as_unknown(server: ServerSide) -> None:
    """Its user has not read `opened`."""
    with black_hole_port() as hole:
        server.open(1, hole)
        server.tunnel(1)
        server.resume(2, hole, of=1)
        assert server.control("refused", 2)["code"] == "unknown_tunnel"


@pytest.mark.parametrize("attempt", [0, 4, 5])
def test_attempt_that_is_not_newer_is_refused_as_superseded(
    server: ServerSide, echo: EchoTarget, attempt: int
) -> None:
    """It was on the way for long; the newest has the tunnel."""
    opened(server, echo)
    server.resume(2, echo.port, of=1, attempt=5)
    server.control("resumed", 2)
    server.resume(3, echo.port, of=1, attempt=attempt)
    assert server.control("refused", 3)["code"] == "superseded"
    assert is_alive(server, 2)


@pytest.mark.parametrize("counts", [(7, 0), (6, 7), (5, 2)], ids=["too much", "crossed", "fell"])
def test_counts_that_cannot_be_true_are_refused_and_touch_nothing(
    server: ServerSide, echo: EchoTarget, counts: tuple[int, int]
) -> None:
    """The channel before lives on, and the attempt may come again."""
    opened(server, echo)
    assert is_alive(server, 1)
    server.ack(1, 3)
    tunnel = server.tunnel(1)
    eventually(lambda: tunnel.end.stream.out.delivered == 3)
    received, delivered = counts
    server.resume(2, echo.port, of=1, received=received, delivered=delivered)
    assert server.control("refused", 2)["code"] == "protocol_error"
    assert is_alive(server, 1)
    server.resume(3, echo.port, of=1, received=12, delivered=12)
    server.control("resumed", 3)
    assert is_alive(server, 3)


@pytest.mark.parametrize("when", ["attached", "detached", "finished", "reset"])
def test_open_with_the_id_of_a_tunnel_that_is_there_or_remembered_is_refused(
    server: ServerSide, echo: EchoTarget, when: str
) -> None:
    """And does not touch it."""
    conversation = opened(server, echo)
    if when == "detached":
        detach(server, 1)
    elif when == "finished":
        server.say("eof", 1, count=0)
        server.control("eof", 1)
        server.ack(1, 0, eof=True)
        server.wait_forgotten(1)
    elif when == "reset":
        conversation.reset()
        server.control("reset", 1)
        server.wait_forgotten(1)
    server.open(2, echo.port, tunnel_id=f"{1:032x}")
    assert server.control("refused", 2)["code"] == "protocol_error"
    server.resume(3, echo.port, of=1)
    if when == "reset":
        assert server.control("refused", 3)["code"] == "target_reset"
    else:
        server.control("resumed", 3)
    # The same id of another user is theirs.
    server.open(4, echo.port, tunnel_id=f"{1:032x}", user="bert")
    server.control("opened", 4)


def test_target_that_reset_while_nobody_was_there_is_told_after_the_resume(
    server: ServerSide,
) -> None:
    """The eof again, then the reset; who comes once more reads its code and sentence."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        server.send(1, b"x")
        conversation.wait_received(1)
        tunnel = server.tunnel(1)
        conversation.shutdown_write()
        server.control("eof", 1)
        detach(server, 1)
        conversation.reset()
        eventually(lambda: tunnel.end.outbound._due_reset, 2.0)
        server.resume(2, target.port, of=1)
        server.control("resumed", 2)
        server.control("eof", 2)
        assert server.control("reset", 2)["code"] == "target_reset"
        server.wait_forgotten(1)
        server.resume(3, target.port, of=1, attempt=2)
        refused = server.control("refused", 3)
    assert refused["code"] == "target_reset"
    assert "reset" in refused["message"]


# The grace.


@pytest.mark.parametrize("loss", ["user_lost", "leg_lost"])
def test_target_is_reset_when_nobody_comes_back_in_time(
    server: ServerSide, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line when it is detached, one when it is closed, both with the reason of the loss."""
    caplog.set_level(logging.INFO)
    with RecordingTarget() as target:
        conversation = opened(server, target)
        server.send(1, b"before")
        tunnel = server.tunnel(1)
        if loss == "user_lost":
            detach(server, 1)
        else:
            server.lose()
        conversation.wait_received(6)
        assert conversation.ended is None
        shorten(tunnel)
        assert conversation.wait_ended(2.0) == "reset"
        tunnel.thread.join(5.0)
    about = f"tunnel=00000000 user=anna reason={loss}"
    # By the leg's reader, which may be behind the tunnel's own thread.
    eventually(lambda: f"tunnel detached {about}" in caplog.text)
    lines = [record.getMessage() for record in caplog.records]
    assert f"tunnel detached {about}" in lines
    assert any(line.startswith(f"tunnel closed {about} up=6 down=0") for line in lines)


def test_resume_that_comes_after_the_grace_is_refused_as_unknown(
    server: ServerSide, echo: EchoTarget
) -> None:
    """As if it had never been."""
    opened(server, echo)
    tunnel = detach(server, 1)
    shorten(tunnel)
    tunnel.thread.join(5.0)
    server.resume(2, echo.port, of=1)
    assert server.control("refused", 2)["code"] == "unknown_tunnel"


def test_resume_is_logged(
    server: ServerSide, echo: EchoTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """With its attempt, and no token."""
    caplog.set_level(logging.INFO)
    opened(server, echo)
    detach(server, 1)
    server.resume(2, echo.port, of=1, attempt=3)
    server.control("resumed", 2)
    line = "tunnel resumed tunnel=00000000 user=anna attempt=3"
    eventually(lambda: line in [record.getMessage() for record in caplog.records])
    assert "0" * 64 not in caplog.text


def test_detached_tunnel_whose_target_takes_nothing_expires_too(server: ServerSide) -> None:
    """Its writer is stuck; it looks at the clock all the same."""

    with SilentTarget(receive_buffer_bytes=4096) as target:
        server.open(1, target.port)
        server.control("opened", 1)
        server.send(1, bytes(MIN_WINDOW_BYTES))
        tunnel = detach(server, 1)
        shorten(tunnel)
        tunnel.thread.join(5.0)
        assert not tunnel.thread.is_alive()


# Bounds.


def test_detached_tunnel_takes_no_more_from_its_target(server: ServerSide) -> None:
    """A fast source and a lost user cost the window, and not a byte more than one read."""
    with SourceTarget(64 * MIB) as target:
        server.open(1, target.port, limit=MIB)
        server.control("opened", 1)
        server.wait_bytes(1, MIB)
        server.ack(1, MIB, limit=3 * MIB)
        server.wait_bytes(1, 2 * MIB)
        tunnel = detach(server, 1)
        out = tunnel.end.stream.out
        assert out.kept_bytes <= 2 * MIB + 64 * KIB
        # The source is stuck: what it has given stays the same when it could give more.
        taken = eventually(lambda: out.taken if tunnel.end.outbound.credit() == 0 else None)
        assert taken is not None
        assert taken <= 3 * MIB + 64 * KIB
        server.resume(2, target.port, of=1, received=MIB, delivered=MIB, limit=2 * MIB)
        data = server.wait_bytes(2, MIB)
        assert len(data) == MIB
        assert tunnel.end.outbound.credit() == 0
        assert out.kept_bytes <= 2 * MIB + 128 * KIB


def three_detached(server: ServerSide, target: Target) -> list[Forwarder]:
    """Detached one after the other, the first on channel 1."""
    tunnels = []
    for channel in (1, 2, 3):
        opened(server, target, channel)
    for channel in (1, 2, 3):
        tunnels.append(detach(server, channel))
    return tunnels


def test_too_many_detached_tunnels_end_the_one_that_has_waited_longest(
    server: ServerSide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning for the operator; the others wait on."""
    assert client.tunnel_table.MAX_DETACHED == 256
    monkeypatch.setattr(client.tunnel_table, "MAX_DETACHED", 2)
    with RecordingTarget() as target:
        tunnels = three_detached(server, target)
        assert target.conversation(0).wait_ended() == "reset"
        tunnels[0].thread.join(5.0)
        assert [tunnel.end.is_detached for tunnel in tunnels] == [False, True, True]
    # By the leg's reader, which may be behind the tunnel's own thread.
    eventually(lambda: "too many wait for their users" in caplog.text)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_limits_of_detached_tunnels_are_no_less_than_what_one_leg_carries() -> None:
    """By a server's budget, which is of each direction; so the loss of a leg alone ends none."""
    carried = LEG_BUDGET_BYTES // MIN_WINDOW_BYTES
    assert carried <= client.tunnel_table.MAX_DETACHED < client.tunnel_table.MAX_TUNNELS
    held = 2 * LEG_BUDGET_BYTES + carried * MESSAGE_BYTES
    assert held <= client.tunnel_table.MAX_DETACHED_BYTES


def test_all_of_200_tunnels_go_on_when_the_leg_of_the_client_is_lost(
    server: ServerSide, echo: EchoTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """And a user who was lost before waits on beside them."""
    count = 200
    for channel in range(1, count + 2):
        opened(server, echo, channel)
        server.send(channel, b"before")
    for channel in range(1, count + 2):
        assert server.wait_bytes(channel, 6) == b"before"
    lost = detach(server, count + 1)
    server.lose()
    assert len(server.tunnels.alive()) == count + 1
    with ServerSide(server.tunnels) as second:
        for channel in range(1, count + 1):
            second.resume(channel, echo.port, of=channel, received=6, delivered=6)
        for channel in range(1, count + 1):
            assert second.control("resumed", channel)["received"] == 6
            assert is_alive(second, channel)
    assert lost.end.is_detached
    assert "given up" not in caplog.text


def test_tunnel_that_is_attached_does_not_count_as_one_that_waits(
    server: ServerSide, echo: EchoTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and how much they carry."""
    monkeypatch.setattr(client.tunnel_table, "MAX_DETACHED", 1)
    monkeypatch.setattr(client.tunnel_table, "MAX_DETACHED_BYTES", 10)
    for channel in (1, 2, 3):
        opened(server, echo, channel)
        server.send(channel, bytes(1000))
        server.wait_bytes(channel, 1000)
    server.ack(3, 1000)
    tunnel = server.tunnel(3)
    eventually(lambda: tunnel.end.stream.out.delivered == 1000)
    assert detach(server, 3).end.is_detached
    assert is_alive(server, 1)
    assert is_alive(server, 2)


def test_too_many_bytes_of_detached_tunnels_end_the_one_that_has_waited_longest(
    server: ServerSide, echo: EchoTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep to send again, and what waits for their targets."""
    assert client.tunnel_table.MAX_DETACHED_BYTES == 144 * MIB
    monkeypatch.setattr(client.tunnel_table, "MAX_DETACHED_BYTES", 250_000)
    for channel in (1, 2, 3):
        opened(server, echo, channel)
        server.send(channel, bytes(100_000))
        server.wait_bytes(channel, 100_000)
    tunnels = [detach(server, channel) for channel in (1, 2, 3)]
    eventually(lambda: tunnels[0].end.is_over)
    assert tunnels[0].end.ended is not None
    assert [tunnel.end.is_detached for tunnel in tunnels] == [False, True, True]


def test_remembered_tunnels_are_bounded_and_the_oldest_goes_first(
    server: ServerSide, echo: EchoTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep counts only: no thread, no socket, no byte."""
    assert client.tunnel_table.MAX_REMEMBERED == 512
    monkeypatch.setattr(client.tunnel_table, "MAX_REMEMBERED", 2)
    for channel in (1, 2, 3):
        opened(server, echo, channel)
        server.send(channel, b"x" * 1000)
        server.say("eof", channel, count=1000)
        server.control("eof", channel)
        server.ack(channel, 1000, eof=True)
        server.wait_forgotten(channel)
    for tunnel, _ in server.tunnels._over.values():
        assert tunnel.end.stream.out.kept_bytes == 0
        eventually(lambda thread=tunnel.thread: not thread.is_alive())
    server.resume(4, echo.port, of=1, received=1000, delivered=1000)
    assert server.control("refused", 4)["code"] == "unknown_tunnel"
    for number in (2, 3):
        server.resume(3 + number, echo.port, of=number, received=1000, delivered=1000)
        server.control("resumed", 3 + number)


def test_remembered_tunnel_is_forgotten_when_its_grace_is_over(
    server: ServerSide, echo: EchoTarget
) -> None:
    """And not a moment sooner."""
    opened(server, echo)
    server.say("eof", 1, count=0)
    server.control("eof", 1)
    server.ack(1, 0, eof=True)
    server.wait_forgotten(1)
    ((key, (tunnel, until)),) = server.tunnels._over.items()
    assert 110 < until - time.monotonic() <= 120
    server.tunnels._over[key] = (tunnel, time.monotonic() - 0.001)
    server.resume(2, echo.port, of=1)
    assert server.control("refused", 2)["code"] == "unknown_tunnel"
    assert not server.tunnels._over


# Races.


def test_limit_does_not_end_a_tunnel_that_was_resumed_a_moment_before(
    server: ServerSide, echo: EchoTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two legs: one reader counts who waits while the other resumes it."""
    monkeypatch.setattr(client.tunnel_table, "MAX_DETACHED", 0)
    opened(server, echo)
    tunnel = server.tunnel(1)
    real = tunnel.end.detached_bytes
    with ServerSide(server.tunnels) as second:

        def detached_bytes() -> Any:
            found = real()
            if found is not None and second.find("resumed", 1) is None:
                second.resume(1, echo.port, of=1)
                second.control("resumed", 1)
            return found

        monkeypatch.setattr(tunnel.end, "detached_bytes", detached_bytes)
        server.lose()
        assert is_alive(second, 1)


def test_many_resumes_from_two_legs_at_once_leave_one_tunnel_and_every_byte(
    server: ServerSide, echo: EchoTarget
) -> None:
    """The newest attempt has it, whatever the order in which the legs' readers come."""
    conversation = opened(server, echo)
    assert is_alive(server, 1)
    with ServerSide(server.tunnels) as second:
        legs = (server, second)
        rounds = 40
        barrier = threading.Barrier(2)

        def ask(which: int) -> None:
            for number in range(rounds):
                barrier.wait(10.0)
                legs[which].resume(
                    number + 2, echo.port, of=1, attempt=2 * number + 1 + which,
                    received=6, delivered=6,
                )  # fmt: skip

        threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert second.control("resumed", rounds + 1)["received"] == 6
        assert is_alive(second, rounds + 1)
        assert conversation.received_bytes == 12
        for leg in legs:
            leg.wait(lambda leg=leg: len(answers(leg)) >= rounds)
        assert set(answers(server)) | set(answers(second)) <= {"resumed", "superseded"}


def answers(leg: ServerSide) -> list[str]:
    return [
        control.get("code", control["type"])
        for control in leg.controls
        if control["type"] in ("resumed", "refused")
    ]


def test_stop_ends_detached_tunnels_at_once(server: ServerSide) -> None:
    """Nobody waits for a grace; the target reads a reset."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        tunnel = detach(server, 1)
        begun = time.monotonic()
        server.tunnels.reset_all(STOPPED)
        server.tunnels.join(begun + 2.0)
        assert not tunnel.thread.is_alive()
        assert time.monotonic() - begun < 1.0
        assert conversation.wait_ended() == "reset"
