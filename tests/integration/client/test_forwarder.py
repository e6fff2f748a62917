"""A tunnel at the client, from `open` to its end, against real targets."""

from __future__ import annotations

import hashlib
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import client.forwarder
from http_network_relay.dial.deadline import Deadline
from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from http_network_relay.wire.errors import DialError, RelayError
from tests.support.client.fake_leg import ServerSide
from tests.support.ports import free_port
from tests.support.targets import (
    AnswerAfterEofTarget,
    Conversation,
    DuplexTarget,
    EchoTarget,
    RecordingTarget,
    ResetTarget,
    SilentTarget,
    SinkTarget,
    SourceTarget,
    Target,
    black_hole_port,
    pseudo_random_bytes,
)
from tests.support.waiting import eventually

KIB = 1024


@pytest.fixture
def server() -> Iterator[ServerSide]:
    """The server's side of one leg."""
    with ServerSide() as side:
        yield side


def opened(server: ServerSide, target: Target, channel: int = 1, **fields: Any) -> Conversation:
    """Open a tunnel to the target and return its conversation."""
    before = len(target.conversations)
    server.open(channel, target.port, **fields)
    server.control("opened", channel)
    return target.conversation(before)


def finish(server: ServerSide, channel: int, sent: int) -> None:
    """Play the proxy user's part of a clean end: both eofs, both acks."""
    server.say("eof", channel, count=sent)
    count = server.control("eof", channel)["count"]
    server.wait(lambda: len(server.data.get(channel, b"")) == count)
    server.ack(channel, count, eof=True)
    server.wait_forgotten(channel)


# The clean end.


def test_bytes_go_both_ways_and_both_eofs_end_the_tunnel(server: ServerSide) -> None:
    """opened, data, eof, in this order; the last ack says eof; the target sees FIN."""
    data = pseudo_random_bytes(100_000)
    with EchoTarget() as target:
        conversation = opened(server, target)
        server.send(1, data)
        assert server.wait_bytes(1, len(data)) == data
        finish(server, 1, len(data))
        assert conversation.wait_ended() == "eof"
    assert server.kinds(1) == ["opened", "data", "eof"]
    acks = [control for control in server.controls if control["type"] == "ack"]
    assert acks[-1]["eof"] is True
    assert acks[-1]["delivered"] == len(data)
    assert [ack["limit"] for ack in acks] == sorted(ack["limit"] for ack in acks)


def test_opened_states_the_first_window_and_no_grace(server: ServerSide) -> None:
    """Only after the target accepted."""
    with EchoTarget() as target:
        opened(server, target)
        control = server.control("opened", 1)
    assert control == {"type": "opened", "channel": 1, "limit": MIN_WINDOW_BYTES, "grace_s": 0}


def test_target_that_answers_after_eof_is_heard_to_the_end(server: ServerSide) -> None:
    """Half-close: `printf 'b\\na\\n' | sort`."""
    with AnswerAfterEofTarget() as target:
        opened(server, target)
        server.send(1, b"b\na\n")
        server.say("eof", 1, count=4)
        assert server.control("ack", 1)["eof"] is True
        assert server.wait_bytes(1, 4) == b"a\nb\n"
        assert server.control("eof", 1)["count"] == 4


def test_target_that_ends_first_still_takes_what_comes(server: ServerSide) -> None:
    """The other direction lives on for as long as it likes."""
    with RecordingTarget(close_on_eof=False) as target:
        conversation = opened(server, target)
        conversation.send(b"bye")
        conversation.shutdown_write()
        assert server.control("eof", 1)["count"] == 3
        server.ack(1, 3, eof=True)
        server.send(1, b"still here")
        conversation.wait_received(10)
        assert conversation.ended is None
        server.say("eof", 1, count=10)
        assert conversation.wait_ended() == "eof"
        server.wait_forgotten(1)
        assert conversation.received == b"still here"


def test_eof_is_handed_on_at_once(server: ServerSide) -> None:
    """The target sees FIN while its own direction is open, and the ack says so."""
    with RecordingTarget(close_on_eof=False) as target:
        conversation = opened(server, target)
        server.say("eof", 1, count=0)
        assert conversation.wait_ended(1.0) == "eof"
        assert server.control("ack", 1) == {
            "type": "ack", "channel": 1, "delivered": 0, "limit": MIN_WINDOW_BYTES, "eof": True,
        }  # fmt: skip
        assert server.find("eof", 1) is None


def test_megabytes_both_ways_at_once_are_exact(server: ServerSide) -> None:
    """Under a window that the other side opens bit by bit."""
    size = 3_000_000
    up = pseudo_random_bytes(size, "up")
    with DuplexTarget(size, "down") as target:
        conversation = opened(server, target)
        sent = limit = got = 0
        while sent < size or got < size:
            mark = len(server.order)
            limit = max([MIN_WINDOW_BYTES, *(c["limit"] for c in server.controls if "limit" in c)])
            step = min(limit - sent, 65536, size - sent)
            if step:
                server.send(1, up[sent : sent + step])
                sent += step
            now = len(server.bytes_of(1))
            if now > got:
                got = now
                server.ack(1, got, limit=got + MIN_WINDOW_BYTES)
            elif not step:
                server.wait(lambda mark=mark: len(server.order) > mark)
        finish(server, 1, size)
        conversation.wait_received(size)
        assert conversation.received_bytes == size
        assert conversation.received_sha256 == hashlib.sha256(up).hexdigest()
        assert server.bytes_of(1) == pseudo_random_bytes(size, "down")


def test_target_is_read_only_as_far_as_credit_goes(server: ServerSide) -> None:
    """A user who does not read costs the client the window, not the download."""
    with SourceTarget(4_000_000) as target:
        server.open(1, target.port, limit=100_000)
        server.control("opened", 1)
        server.wait_bytes(1, 100_000)
        assert len(server.bytes_of(1)) == 100_000
        server.ack(1, 100_000, limit=100_001)
        server.wait_bytes(1, 100_001)
        tunnel = server.tunnel(1)
        assert tunnel.end.counts[0] == 100_001
        assert tunnel.end.outbound.credit() == 0


# Refusals.


def test_refused_target_is_told(server: ServerSide) -> None:
    """With the target in the sentence, and nothing left of the channel."""
    port = free_port()
    server.open(1, port)
    refused = server.control("refused", 1)
    assert refused["code"] == "target_refused"
    assert f"127.0.0.1:{port}" in refused["message"]
    server.wait_forgotten(1)
    assert server.kinds(1) == ["refused"]


def test_unknown_target_is_told(server: ServerSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's resolver does not know the name."""

    def look_up(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    server.open(1, 22, host="nobody.example")
    refused = server.control("refused", 1)
    assert refused["code"] == "target_unknown"
    assert "nobody.example" in refused["message"]


def test_target_that_does_not_answer_is_told(
    server: ServerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the dial's deadline, whatever that is."""
    monkeypatch.setattr(client.forwarder, "DIAL_TARGET_S", 0.3)
    with black_hole_port() as hole:
        begun = time.monotonic()
        server.open(1, hole)
        assert server.control("refused", 1)["code"] == "target_timeout"
        assert time.monotonic() - begun < 1.0


def test_target_without_a_way_is_told(server: ServerSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth kind."""

    def dial(*_: Any) -> Any:
        raise DialError("unreachable", "10.0.0.1:22 cannot be reached (EHOSTUNREACH)")

    monkeypatch.setattr(client.forwarder, "dial_tcp", dial)
    server.open(1, 22)
    assert server.control("refused", 1)["code"] == "target_unreachable"


# The target's ends.


def test_reset_of_the_target_comes_behind_its_data(server: ServerSide) -> None:
    """What it said before is part of the conversation."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        conversation.send(b"last words")
        server.wait_bytes(1, 10)
        conversation.reset()
        assert server.control("reset", 1)["code"] == "target_reset"
        server.wait_forgotten(1)
    assert server.bytes_of(1) == b"last words"
    assert server.kinds(1) == ["opened", "data", "reset"]


def test_target_that_takes_no_more_is_read_to_its_end_first(server: ServerSide) -> None:
    """Writing fails; what the target said until then still comes, and then the reset."""
    with RecordingTarget() as target:
        server.open(1, target.port, limit=10)
        server.control("opened", 1)
        conversation = target.conversation()
        conversation.send(b"refused, because of this and that")
        server.wait_bytes(1, 10)
        # The reader waits for credit; the writer learns of the end first.
        conversation.reset()
        conversation.wait(lambda me: me.is_closed)
        server.send(1, b"more")
        tunnel = server.tunnel(1)
        eventually(lambda: tunnel.end.outbound._consumer_failed)
        assert server.find("reset", 1) is None
        server.ack(1, 10)
        assert server.control("reset", 1)["code"] == "target_reset"
        assert server.bytes_of(1) == b"refused, because of this and that"
    assert server.kinds(1) == ["opened", "data", "reset"]


def test_target_that_goes_after_its_eof_is_noticed_in_a_second(server: ServerSide) -> None:
    """Nobody reads it any more, and the user may have nothing to write."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        conversation.close()
        server.control("eof", 1)
        server.send(1, b"x")  # Its answer is an RST, and nobody writes again.
        assert server.control("reset", 1, 1.0)["code"] == "target_reset"
        server.wait_forgotten(1)


def test_target_that_resets_on_the_first_byte_ends_with_a_reset(server: ServerSide) -> None:
    """`opened`, then `reset target_reset`: the tunnel is over, nothing stays."""
    with ResetTarget(after_bytes=1) as target:
        server.open(1, target.port)
        server.control("opened", 1)
        server.send(1, b"x")
        assert server.control("reset", 1)["code"] == "target_reset"
        server.wait_forgotten(1)


# The user's ends.


def test_user_gone_is_a_fin_behind_the_data(server: ServerSide) -> None:
    """Everything before it is written, then FIN and never RST."""
    data = pseudo_random_bytes(200_000)
    with RecordingTarget() as target:
        conversation = opened(server, target)
        server.send(1, data)
        server.say("reset", 1, code="user_gone", message="")
        assert conversation.wait_ended() == "eof"
        server.wait_forgotten(1)
        conversation.wait(lambda me: me.is_closed)
        assert conversation.received == data
        assert conversation.ended == "eof"
    assert "reset" not in server.kinds(1)


class Talker(Target):
    """Sends all the time, whatever comes; ends a moment after the other side's FIN."""

    def __init__(self) -> None:
        self.heard_eof = threading.Event()
        super().__init__()

    def serve(self, conversation: Conversation) -> None:
        def talk() -> None:
            try:
                while not self.heard_eof.is_set():
                    conversation.send(b"noise" * 1000)
            except OSError:
                pass

        thread = threading.Thread(target=talk)
        thread.start()
        while conversation.recv():
            pass
        self.heard_eof.set()
        thread.join()


def test_user_gone_is_a_fin_even_while_the_target_is_sending(server: ServerSide) -> None:
    """Closing on unread bytes would send RST: sshd would log a reset for a normal logout."""
    with Talker() as target:
        conversation = opened(server, target, limit=10_000)
        server.wait_bytes(1, 10_000)
        server.say("reset", 1, code="user_gone", message="")
        assert conversation.wait_ended() == "eof"
        server.wait_forgotten(1, 1.0)
        conversation.wait(lambda me: me.is_closed)
        assert conversation.ended == "eof"


class Babbler(Target):
    """Sends for ever and never listens."""

    def serve(self, conversation: Conversation) -> None:
        while True:
            conversation.send(bytes(65536))


def test_user_gone_ends_the_tunnel_although_the_target_sends_for_ever(
    server: ServerSide,
) -> None:
    """A target that ignores the FIN has a second, not for ever."""
    with Babbler() as target:
        opened(server, target, limit=10_000)
        server.wait_bytes(1, 10_000)
        begun = time.monotonic()
        server.say("reset", 1, code="user_gone", message="")
        server.wait_forgotten(1)
        assert time.monotonic() - begun < 1.5


def test_user_gone_ends_the_tunnel_although_bytes_are_always_there(
    server: ServerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SHUT_RD does not end what still comes: the clock does."""
    real = client.forwarder.dial_tcp

    class Endless(socket.socket):
        def recv(self, *args: Any) -> bytes:
            return b"x" * 100

    def dial(*args: Any) -> socket.socket:
        return Endless(fileno=real(*args).detach())

    monkeypatch.setattr(client.forwarder, "dial_tcp", dial)
    with RecordingTarget() as target:
        opened(server, target, limit=1000)
        server.wait_bytes(1, 1000)
        begun = time.monotonic()
        server.say("reset", 1, code="user_gone", message="")
        server.wait_forgotten(1)
        assert time.monotonic() - begun < 1.5


def test_user_gone_is_no_reset_for_a_target_that_stays(server: ServerSide) -> None:
    """After FIN and a second of patience our side closes, without an RST."""
    with RecordingTarget(close_on_eof=False) as target:
        conversation = opened(server, target)
        server.say("reset", 1, code="user_gone", message="")
        assert conversation.wait_ended() == "eof"
        server.wait_forgotten(1, 2.0)
        poll = select.poll()
        poll.register(conversation._sock, 0)  # Errors are told unasked.
        assert not any(events & select.POLLERR for _, events in poll.poll(0))
        assert conversation.ended == "eof"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("reset", {"code": "protocol_error", "message": ""}),
        ("reset", {"code": "of_tomorrow", "message": ""}),
        ("detached", {"code": "user_lost"}),
        ("detached", {"code": "server_restart"}),
    ],
)
def test_any_other_end_is_a_reset_at_the_target(
    server: ServerSide, kind: str, fields: dict[str, str]
) -> None:
    """A database must not take a lost line for a clean end; what came before still comes."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        server.send(1, b"before")
        server.say(kind, 1, **fields)
        assert conversation.wait_ended() == "reset"
        assert conversation.received == b"before"
        server.wait_forgotten(1)
    assert server.kinds(1) == ["opened"]


def test_lost_leg_resets_every_target(server: ServerSide) -> None:
    """All tunnels of the leg, each after what came before."""
    with RecordingTarget() as target:
        conversations = [opened(server, target, channel) for channel in (1, 2, 3)]
        for channel in (1, 2, 3):
            server.send(channel, b"before")
        server.lose()
        for conversation in conversations:
            assert conversation.wait_ended() == "reset"
            assert conversation.received == b"before"


def test_stopped_client_resets_with_its_reason(server: ServerSide) -> None:
    """The proxy user reads why."""
    with RecordingTarget() as target:
        conversation = opened(server, target)
        server.tunnels.reset_all(RelayError("client_stopped", "the client was stopped"))
        assert server.control("reset", 1)["code"] == "client_stopped"
        assert conversation.wait_ended() == "reset"


# Targets that do not read.


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes next to nothing for a target that does not read."""
    real = client.forwarder.dial_tcp

    def dial(*args: Any) -> socket.socket:
        sock = real(*args)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(client.forwarder, "dial_tcp", dial)


def stick(server: ServerSide, channel: int) -> None:
    """Send a window to a target that does not read, until its writer is stuck."""
    server.send(channel, bytes(MIN_WINDOW_BYTES))
    tunnel = server.tunnel(channel)
    eventually(lambda: tunnel.end.stream.into.received == MIN_WINDOW_BYTES)
    assert tunnel._sock is not None
    eventually(lambda: not wait_ready(tunnel._sock, write=True, timeout_s=0.0))  # type: ignore[arg-type]
    assert tunnel.end.counts[1] < MIN_WINDOW_BYTES


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("code", ["protocol_error", "user_gone"])
def test_target_that_does_not_read_delays_the_end_by_a_second(
    server: ServerSide, code: str
) -> None:
    """And delays no other tunnel at all."""
    with SilentTarget(receive_buffer_bytes=4096) as silent, EchoTarget() as echo:
        opened(server, silent, 1)
        opened(server, echo, 2)
        stick(server, 1)
        begun = time.monotonic()
        server.send(2, b"quick")
        assert server.wait_bytes(2, 5) == b"quick"
        server.say("reset", 1, code=code, message="")
        server.send(2, b"again")
        assert server.wait_bytes(2, 10) == b"quickagain"
        assert time.monotonic() - begun < 0.2
        server.wait_forgotten(1)
        assert 0.9 < time.monotonic() - begun < 1.4


@pytest.mark.usefixtures("small_buffers")
def test_target_that_does_not_read_holds_no_more_than_the_window(server: ServerSide) -> None:
    """One byte more is an overrun: that tunnel ends, its neighbour does not."""
    with SilentTarget(receive_buffer_bytes=4096) as silent, EchoTarget() as echo:
        opened(server, silent, 1)
        opened(server, echo, 2)
        stick(server, 1)
        assert "ack" not in {kind for channel, kind in server.order if channel == 1}
        server.send(1, b"x")
        assert server.control("reset", 1)["code"] == "protocol_error"
        server.send(2, b"x")
        assert server.wait_bytes(2, 1) == b"x"


# Dials that are not wanted any more.


def test_reset_during_the_dial_closes_the_late_socket(
    server: ServerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dial succeeds a moment after the user went away: nobody gets that socket."""
    dialled, go_on = threading.Event(), threading.Event()
    real = client.forwarder.dial_tcp

    def dial(host: str, port: int, deadline: Deadline, *_: Any) -> socket.socket:
        sock = real(host, port, deadline)
        dialled.set()
        assert go_on.wait(5.0)
        return sock

    monkeypatch.setattr(client.forwarder, "dial_tcp", dial)
    with RecordingTarget() as target:
        server.open(1, target.port)
        assert dialled.wait(5.0)
        server.say("reset", 1, code="user_gone", message="")
        eventually(lambda: server.tunnel(1).end.is_over)
        go_on.set()
        assert target.conversation().wait_ended() == "eof"
        server.wait_forgotten(1)
    assert server.kinds(1) == []


def test_reset_cancels_a_dial_that_gets_no_answer(server: ServerSide) -> None:
    """Long before the dial's deadline."""
    with black_hole_port() as hole:
        server.open(1, hole)
        eventually(lambda: server.tunnels.alive())
        begun = time.monotonic()
        server.say("reset", 1, code="user_gone", message="")
        server.wait_forgotten(1)
        assert time.monotonic() - begun < 0.8
    assert server.kinds(1) == []


def test_lost_leg_drops_a_tunnel_that_dials(server: ServerSide) -> None:
    """There is nobody to answer to."""
    with black_hole_port() as hole:
        server.open(1, hole)
        eventually(lambda: server.tunnels.alive())
        server.lose()
        server.wait_forgotten(1, 0.8)


# The log.


def test_log_has_one_line_for_the_start_and_one_for_the_end(
    server: ServerSide, caplog: pytest.LogCaptureFixture
) -> None:
    """With short id, user, reason and both counts; no payload, no secret."""
    caplog.set_level(logging.INFO)
    with EchoTarget() as target:
        opened(server, target, tunnel_id="abcdef01" + "0" * 24, resume_token="5ec7e7" + "0" * 58)
        server.send(1, b"payload!")
        server.wait_bytes(1, 8)
        finish(server, 1, 8)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0] == f"tunnel opened tunnel=abcdef01 user=anna target=127.0.0.1:{target.port}"
    assert lines[1].startswith("tunnel closed tunnel=abcdef01 user=anna reason=eof up=8 down=8 ")
    assert "payload" not in caplog.text
    assert "5ec7e7" not in caplog.text


@pytest.mark.parametrize("rounds", [40])
def test_many_short_tunnels_leave_nothing(server: ServerSide, rounds: int) -> None:
    """Whatever the threads' order: no tunnel, no socket, every byte."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with SinkTarget() as target:
            for channel in range(1, rounds + 1):
                server.open(channel, target.port)
            for channel in range(1, rounds + 1):
                server.control("opened", channel)
                server.send(channel, b"x" * channel)
                if channel % 2:
                    server.say("reset", channel, code="user_gone", message="")
                else:
                    server.say("eof", channel, count=channel)
            for channel in range(2, rounds + 1, 2):
                server.control("eof", channel)
                server.ack(channel, 0, eof=True)
            for channel in range(1, rounds + 1):
                server.wait_forgotten(channel)
            eventually(lambda: target.open_count == 0)
            counts = sorted(each.received_bytes for each in target.conversations)
        assert counts == list(range(1, rounds + 1))
    finally:
        sys.setswitchinterval(before)
