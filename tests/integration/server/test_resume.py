"""The server's part in a resume: it passes on, counts, holds, and takes slots over."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import CLIENT_SECRET, TOKEN, Server, start_server
from tests.support.raw import (
    TUNNEL_HEADER,
    USER_PATH,
    RawClient,
    RawUser,
    handshake_status,
    user_headers,
)
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

KIB = 1024
CAP = 1024 * KIB
OTHER_TOKEN = secret_of("pu-other")
CREDENTIALS = {
    "clients": {"device": CLIENT_SECRET, "off": secret_of("cs-off")},
    "proxy_users": [TOKEN, OTHER_TOKEN],
}
ID = "ab" * 16
# Held for so short a time, in the server that `hasty` is.
PENDING_S = 0.3


def start(folder: Path, **settings: Any) -> Server:
    env = {"HTTP_NETWORK_RELAY_MAX_WINDOW": str(CAP)}
    return start_server(folder, **{"credentials": CREDENTIALS, "env": env, **settings})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with a window of 1 MiB for all tests that leave it running."""
    with start(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    """A fresh leg of the client: its channels count from 1."""
    with RawClient(server.url) as raw:
        yield raw


def open_tunnel(client: RawClient, user: RawUser, **fields: Any) -> int:
    user.send_open(**{"tunnel_id": ID, "grace_s": 120, **fields})
    channel: int = client.recv_control("open")["channel"]
    client.send_opened(channel, grace_s=120)
    user.recv_control("opened")
    return channel


def resume_tunnel(client: RawClient, user: RawUser, **fields: Any) -> int:
    user.send_resume(**{"tunnel_id": ID, **fields})
    channel: int = client.recv_control("resume")["channel"]
    client.send_resumed(channel)
    user.recv_control("resumed")
    return channel


def wait_down(server: Server, after: int) -> None:
    server.wait_for_line("leg down", after=after)


# Passed on, and counted.


def test_resume_and_resumed_pass_with_all_fields_when_the_client_is_there(
    server: Server, client: RawClient
) -> None:
    """New objects, with channel and user, and limits lowered to cap and budget."""
    with RawUser(server.url, resumes=ID) as user:
        fields: dict[str, Any] = {"tunnel_id": ID, "attempt": 4, "limit": 2**53, "grace_s": 120}
        fields |= {"received": 10**9, "delivered": 10**9 - 5, "surprise": [1], "user": "x"}
        user.send_resume(**fields)
        resume = client.recv_control("resume")
        assert resume.pop("user").startswith("token-")
        assert resume == {
            "type": "resume",
            "channel": 1,
            "client": "device",
            "host": "127.0.0.1",
            "port": 22,
            "protocol": "tcp",
            "tunnel_id": ID,
            "resume_token": "0" * 64,
            "limit": 10**9 - 5 + CAP,
            "grace_s": 120,
            "attempt": 4,
            "received": 10**9,
            "delivered": 10**9 - 5,
        }
        client.send_resumed(1, received=500, delivered=400, limit=2**53)
        counts = {"received": 500, "delivered": 400, "limit": 400 + CAP}
        assert user.recv_control() == {"type": "resumed", **counts}
        line = server.wait_for_line("tunnel resumed attempt=4")
        assert "0" * 64 not in line


@pytest.mark.parametrize("who", ["user", "client"])
def test_overrun_is_found_when_a_resumed_end_sends_beyond_its_limit(
    server: Server, client: RawClient, who: str
) -> None:
    """Bytes from `received` to the very limit pass; one more is an error of the tunnel."""
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID, received=70_000, delivered=60_000, limit=60_000 + 262_144)
        channel = client.recv_control("resume")["channel"]
        client.send_resumed(channel, received=70_000, delivered=60_000, limit=60_000 + 262_144)
        user.recv_control("resumed")
        left = 262_144 - 10_000
        while left:
            size = min(left, 64 * KIB)
            if who == "user":
                user.send_binary(bytes(size))
                client.recv_on()
            else:
                client.send_on(channel, bytes(size))
                user.recv_binary()
            left -= size
        if who == "user":
            user.send_binary(b"x")
        else:
            client.send_on(channel, b"x")
        assert client.recv_control("reset")["code"] == "protocol_error"
        assert user.recv_control("reset")["code"] == "protocol_error"


def test_tunnel_finishes_when_its_eofs_were_sent_again(server: Server, client: RawClient) -> None:
    """The counts of the whole stream, and both acks on this channel."""
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID, received=50, delivered=50)
        channel = client.recv_control("resume")["channel"]
        client.send_resumed(channel, received=7, delivered=7)
        user.recv_control("resumed")
        user.send_control({"type": "eof", "count": 7})
        client.send_control_on(channel, "eof", count=50)
        assert client.recv_control("eof")["count"] == 7
        assert user.recv_control("eof")["count"] == 50
        user.send_control({"type": "ack", "delivered": 50, "limit": 2**53, "eof": True})
        client.send_control_on(channel, "ack", delivered=7, limit=2**53, eof=True)
        assert client.recv_control("ack")["eof"] is True
        assert user.recv_control("ack")["eof"] is True
        server.wait_for_line("tunnel closed reason=eof up=7 down=50")


def test_refusal_of_the_client_reaches_the_user_when_it_knows_no_such_tunnel(
    server: Server, client: RawClient
) -> None:
    """With its code; then the server closes with 1000."""
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID)
        channel = client.recv_control("resume")["channel"]
        client.send_control_on(channel, "refused", code="unknown_tunnel", message="no such")
        assert user.recv_control("refused")["code"] == "unknown_tunnel"
        assert user.recv_close(1)[0] == 1000
    client.expect_nothing(0.05)


def test_user_is_refused_when_its_counts_cannot_be_true(server: Server, client: RawClient) -> None:
    """More handed on than taken in; the client hears nothing of it."""
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID, received=1, delivered=2)
        assert user.recv_control("refused")["code"] == "protocol_error"
        assert user.recv_close(1)[0] == 1000
    client.expect_nothing(0.05)


@pytest.mark.parametrize("kind", ["opened", "data", "ack", "bad counts"])
def test_user_is_refused_when_the_client_answers_a_resume_wrongly(
    server: Server, client: RawClient, kind: str
) -> None:
    """And that tunnel is detached at the client, not ended: its user's end comes again."""
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID)
        channel = client.recv_control("resume")["channel"]
        if kind == "data":
            client.send_on(channel, b"x")
        elif kind == "bad counts":
            client.send_resumed(channel, received=1, delivered=2)
        else:
            fields = {"limit": 9, "grace_s": 1, "delivered": 0, "eof": False}
            client.send_control_on(channel, kind, **fields)
        assert user.recv_control("refused")["code"] == "protocol_error"
        assert client.recv_control("detached")["code"] == "user_lost"


# Nobody ends a tunnel with a `resume` that the client has not accepted.

GARBAGE: dict[str, Callable[[RawUser], None]] = {
    "data": lambda user: user.send_binary(b"x"),
    "a bad field": lambda user: user.send_control({"type": "eof", "count": -1}),
    "a second resume": lambda user: user.send_resume(tunnel_id=ID),
    "no JSON": lambda user: user.send_text("{"),
    "a lost link": lambda user: user.drop(),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_tunnel_lives_on_when_somebody_resumes_it_and_breaks_a_rule(
    server: Server, client: RawClient, case: str
) -> None:
    """All that the client hears is that this channel is detached; never a reset."""
    with RawUser(server.url) as owner, RawUser(server.url, OTHER_TOKEN, resumes=ID) as other:
        channel = open_tunnel(client, owner)
        other.send_resume(tunnel_id=ID, attempt=10**6)
        foreign = client.recv_control("resume")["channel"]
        GARBAGE[case](other)
        assert client.recv_control() == {
            "type": "detached",
            "channel": foreign,
            "code": "user_lost",
        }
        # Its answer comes too late, and is dropped.
        client.send_control_on(foreign, "refused", code="unknown_tunnel", message="")
        owner.send_binary(b"alive")
        assert client.recv_on() == (channel, b"alive")


def test_reset_follows_its_resume_when_the_user_goes_before_the_answer(
    server: Server, client: RawClient
) -> None:
    """On the channel of the resume: the client has looked at its token by then."""
    with RawUser(server.url) as owner, RawUser(server.url) as again:
        open_tunnel(client, owner)
        again.send_resume(tunnel_id=ID)
        resumed_on = client.recv_control("resume")["channel"]
        again.send_control({"type": "reset", "code": "user_gone", "message": ""})
        assert client.recv_control("reset")["channel"] == resumed_on


# Superseded, and two at once.


def test_old_user_leg_is_shut_when_the_tunnel_is_resumed_on_another(
    server: Server, client: RawClient
) -> None:
    """`reset superseded` on the old channel ends that channel and that leg, and nothing else."""
    with RawUser(server.url) as old, RawUser(server.url) as new:
        channel = open_tunnel(client, old)
        new.send_resume(tunnel_id=ID)
        resumed = client.recv_control("resume")["channel"]
        client.send_resumed(resumed)
        client.send_control_on(channel, "reset", code="superseded", message="newer")
        new.recv_control("resumed")
        assert old.recv_control("reset")["code"] == "superseded"
        assert old.recv_close(1)[0] == 1000
        server.wait_for_line("tunnel closed reason=superseded")
        new.send_binary(b"goes on")
        assert client.recv_on() == (resumed, b"goes on")
        client.expect_nothing(0.05)


def test_old_user_leg_is_cut_off_when_it_is_superseded_and_nobody_reads_it(
    server: Server, client: RawClient
) -> None:
    """Its link is dead most likely: the slot is free within half a second."""
    with RawUser(server.url) as old, RawUser(server.url) as new:
        channel = open_tunnel(client, old)
        resumed = resume_tunnel(client, new)
        lines = server.line_count
        client.send_control_on(channel, "reset", code="superseded", message="")
        server.wait_for_line("leg down reason=superseded", 0.5, after=lines)
        client.send_on(resumed, b"goes on")
        assert new.recv_binary() == b"goes on"


def test_both_resumes_reach_the_client_when_two_come_at_once(
    server: Server, client: RawClient
) -> None:
    """It alone says which is the newest; the server keeps them apart by their channels."""
    with RawUser(server.url) as first, RawUser(server.url) as second:
        first.send_resume(tunnel_id=ID, attempt=1)
        second.send_resume(tunnel_id=ID, attempt=2)
        resumes = [client.recv_control("resume") for _ in range(2)]
        channels = {resume["attempt"]: resume["channel"] for resume in resumes}
        client.send_resumed(channels[2])
        client.send_control_on(channels[1], "refused", code="superseded", message="")
        second.recv_control("resumed")
        assert first.recv_control("refused")["code"] == "superseded"
        second.send_binary(b"2")
        assert client.recv_on() == (channels[2], b"2")


# A slot that is taken over.


def test_resume_takes_its_old_legs_slot_when_the_server_is_full(tmp_path: Path) -> None:
    """The old leg ends there and then; for another user's tunnel there is no room."""
    with (
        start(tmp_path, threads=2) as server,
        RawClient(server.url) as client,
        RawUser(server.url) as old,
    ):
        channel = open_tunnel(client, old)
        for token, tunnel_id in ((OTHER_TOKEN, ID), (TOKEN, "cd" * 16)):
            headers = {**user_headers(token), TUNNEL_HEADER: tunnel_id}
            assert handshake_status(server.url + USER_PATH, headers).status == 503

        for attempt in (1, 2, 3):
            new = RawUser(server.url, resumes=ID)
            assert old.recv_close(1)[0] == 1006
            assert client.recv_control("detached") == {
                "type": "detached",
                "channel": channel,
                "code": "user_lost",
            }
            channel = resume_tunnel(client, new, attempt=attempt)
            new.send_binary(b"x")
            assert client.recv_on() == (channel, b"x")
            old.drop()
            old = new
        eventually(lambda: server.text.count("leg down reason=replaced ") == 3)
        # The losers gave nothing back: there is still no room for a second user.
        assert handshake_status(server.url + USER_PATH, user_headers()).status == 503
        old.close()


@pytest.mark.parametrize("value", ["ab" * 15, "AB" * 16, "x" * 32, " "])
def test_upgrade_is_refused_when_the_tunnels_header_is_bad(server: Server, value: str) -> None:
    """As any other header that cannot be right."""
    headers = {**user_headers(), TUNNEL_HEADER: value}
    answer = handshake_status(server.url + USER_PATH, headers)
    assert (answer.status, answer.json["code"]) == (400, "bad_request")


# Held.


def test_resume_is_held_when_the_client_is_not_there_yet(server: Server) -> None:
    """Both that wait are opened when it comes, and go on as if it had been there."""
    with RawUser(server.url) as user, RawUser(server.url) as other:
        user.send_resume(tunnel_id=ID, received=5, delivered=5)
        other.send_resume(tunnel_id="cd" * 16)
        for waiting in (user, other):
            waiting.expect_nothing(0.05)
        with RawClient(server.url) as client:
            resumes = [client.recv_control("resume") for _ in range(2)]
            assert sorted(resume["tunnel_id"] for resume in resumes) == [ID, "cd" * 16]
            assert [resume["channel"] for resume in resumes] == [1, 2]
            for resume in resumes:
                client.send_resumed(resume["channel"])
            user.recv_control("resumed")
            other.recv_control("resumed")
            user.send_binary(b"x")
            channel = next(r["channel"] for r in resumes if r["tunnel_id"] == ID)
            assert client.recv_on() == (channel, b"x")


def test_user_is_refused_when_the_client_is_lost_before_it_answers(server: Server) -> None:
    """`client_offline`, as for an open: it may try again, and then waits."""
    with RawClient(server.url) as client, RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID)
        client.recv_control("resume")
        client.drop()
        assert user.recv_control("refused", 1)["code"] == "client_offline"
        assert user.recv_close(1)[0] == 1000


def test_resume_is_refused_when_the_client_stays_away(tmp_path: Path) -> None:
    """`client_offline` behind the time, and a close; a user that does not close is cut off."""
    conf = tmp_path / "hasty.py"
    conf.write_text(
        "from server.worker.gunicorn_settings import *\n"
        "import server.legs.user_leg\n"
        f"server.legs.user_leg.PENDING_RESUME_S = {PENDING_S}\n"
    )
    with start(tmp_path, args=["-c", str(conf)]) as server, RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID)
        user.expect_nothing(PENDING_S / 2)
        assert user.recv_control("refused", 2)["code"] == "client_offline"
        assert user.recv_close(1)[0] == 1000
        server.wait_for_line("leg down reason=client_offline ", 3)


def test_resume_is_forgotten_when_its_user_is_lost(server: Server) -> None:
    """The client that comes later hears nothing of it."""
    lines = server.line_count
    with RawUser(server.url) as user:
        user.send_resume(tunnel_id=ID)
        user.ping()
        user.expect_nothing(0.05)
        assert user.pongs_seen == 1
    wait_down(server, lines)
    with RawClient(server.url) as client:
        client.expect_nothing(0.1)


@pytest.mark.parametrize("when", ["held", "late"])
def test_resume_goes_elsewhere_when_the_server_stops(tmp_path: Path, when: str) -> None:
    """A held one and one that comes now are refused with the code that says: come again."""
    with start(tmp_path, threads=4) as server, RawUser(server.url) as user:
        if when == "held":
            user.send_resume(tunnel_id=ID)
            user.ping()
            user.expect_nothing(0.05)
            server.terminate()
        else:
            server.wait_for_line("leg up")
            server.terminate()
            user.recv_control("going_away")
            user.send_resume(tunnel_id=ID)
        while (control := user.recv_control())["type"] == "going_away":
            continue
        assert control["code"] == "server_restart"
        assert user.recv_close(1)[0] == 1000
        user.drop()
        assert server.wait(2) == 0
