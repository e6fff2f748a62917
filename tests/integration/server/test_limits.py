"""Limits by the raw protocol: each has a code of its own, and harms nobody else."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import CLIENT_NAME, CLIENT_SECRET, TOKEN, Server, start_server
from tests.support.raw import (
    CLIENT_PATH,
    USER_PATH,
    Handshake,
    RawClient,
    RawUser,
    client_headers,
    handshake_status,
    read_handshake,
    upgrade_request,
    user_headers,
)
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

OTHER_TOKEN = "another-token-of-another-user"
OTHER_CLIENT = "other-device"
CREDENTIALS = {
    "clients": {CLIENT_NAME: CLIENT_SECRET, OTHER_CLIENT: CLIENT_SECRET + "2"},
    "proxy_users": [TOKEN, OTHER_TOKEN],
}
KIB = 1024


@contextmanager
def server_with(folder: Path, **settings: object) -> Iterator[Server]:
    env = {f"HTTP_NETWORK_RELAY_{name.upper()}": str(value) for name, value in settings.items()}
    with start_server(folder, credentials=CREDENTIALS, env=env) as server:
        yield server


class Relay:
    """A server with its client, and users that come and go."""

    def __init__(self, stack: ExitStack, server: Server) -> None:
        self.stack = stack
        self.server = server
        self.client = stack.enter_context(RawClient(server.url))

    def ask(self, number: int, token: str = TOKEN, **fields: Any) -> RawUser:
        """A user who has said `open`."""
        user = self.stack.enter_context(RawUser(self.server.url, token))
        user.send_open(tunnel_id=f"{number:032x}", **fields)
        return user

    def open(self, number: int, token: str = TOKEN, **fields: Any) -> tuple[RawUser, int]:
        """A user whose tunnel is open, and its channel."""
        user = self.ask(number, token, **fields)
        channel = self.client.recv_control("open")["channel"]
        self.client.send_opened(channel)
        user.recv_control("opened")
        return user, channel


@contextmanager
def relay_with(folder: Path, **settings: object) -> Iterator[Relay]:
    with server_with(folder, **settings) as server, ExitStack() as stack:
        yield Relay(stack, server)


def refusal(user: RawUser) -> str:
    told = user.recv_control("refused")
    assert told["message"]
    assert user.recv_close()[0] == 1000
    return str(told["code"])


# Failed logins.


def fail(
    server: Server, name: str = CLIENT_NAME, secret: str = secret_of("cs-wrong"), source: str = ""
) -> Handshake:
    headers = client_headers(name=name, secret=secret)
    return handshake_status(server.url + CLIENT_PATH, {**headers, "X-Forwarded-For": source})


def test_login_is_refused_429_when_too_many_failed(tmp_path: Path) -> None:
    """At once, the same for known and unknown names; a right secret still passes."""
    with server_with(tmp_path, failed_logins=3) as server:
        for name in (CLIENT_NAME, "nobody"):
            answers = [fail(server, name=name) for _ in range(5)]
            assert [answer.status for answer in answers] == [401] * 3 + [429] * 2
            assert answers[4].json["code"] == "too_many"
            assert answers[4].headers["retry-after"] == "30"
            assert "www-authenticate" not in answers[4].headers
        users = [
            handshake_status(server.url + USER_PATH, user_headers(secret_of("pu-wrong")))
            for _ in range(4)
        ]
        assert [answer.status for answer in users] == [401] * 3 + [429]
        with RawClient(server.url), RawUser(server.url):
            assert fail(server).status == 429


def test_refusal_of_a_flood_tells_nothing_and_holds_no_thread(tmp_path: Path) -> None:
    """Over the limit known and unknown names get the same bytes, as quickly as ever."""
    with server_with(tmp_path, failed_logins=1) as server:
        bodies = set()
        begun = time.monotonic()
        for _ in range(10):
            bodies |= {fail(server).body, fail(server, name="nobody").body}
        assert time.monotonic() - begun < 5
        assert len(bodies) == 2  # 401 and 429.


def test_failed_login_is_one_line_that_fail2ban_can_read(tmp_path: Path) -> None:
    """The address, the name where it is a legal one, and nothing that a stranger wrote."""
    with server_with(tmp_path, failed_logins=1) as server:
        fail(server, name="gw", source="203.0.113.7")
        fail(server, name="gw", source="203.0.113.7")
        fail(server, name="a b\ngw\x1b[2J", source="2001:db8::1")
        handshake_status(server.url + USER_PATH, user_headers(secret_of("pu-wrong")))
        server.wait_for_line("kind=user name=- code=unauthorized")
        lines = [line.split(" WARNING ")[1] for line in server.lines if "login failed" in line]
        assert lines == [
            "login failed address=203.0.113.7 kind=client name=gw code=unauthorized",
            "login failed address=203.0.113.7 kind=client name=gw code=too_many",
            "login failed address=2001:db8::1 kind=client name=- code=unauthorized",
            "login failed address=127.0.0.1 kind=user name=- code=unauthorized",
        ]


def test_forged_address_is_not_counted_when_the_peer_is_no_trusted_proxy(tmp_path: Path) -> None:
    """Each try under another name of its own would be no limit at all."""
    with server_with(tmp_path, failed_logins=2, trusted_proxies="192.0.2.1") as server:
        answers = [fail(server, source=f"203.0.113.{number}").status for number in range(4)]
        assert answers == [401, 401, 429, 429]


def test_address_behind_a_trusted_proxy_is_counted_by_itself(tmp_path: Path) -> None:
    """What stands left of the trusted proxy's own entry may be forged, and is not looked at."""
    with server_with(tmp_path, failed_logins=2) as server:
        answers = [fail(server, source=f"6.6.6.{n}, 203.0.113.7").status for n in range(4)]
        assert answers == [401, 401, 429, 429]
        assert fail(server, source="203.0.113.8").status == 401


# Request heads.


def test_head_that_is_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    """431 with a code, and no thread ever sees it; one at the limit is read."""
    with server_with(tmp_path, max_header_bytes=2048) as server:
        url = server.url + USER_PATH
        size = len(upgrade_request(url, {**user_headers(), "X": "y"}))
        fitting = {**user_headers(), "X": "y" * (2048 - size + 1)}
        assert handshake_status(url, fitting).status == 101
        answer = handshake_status(url, {**fitting, "Y": "y"})
        assert (answer.status, answer.json["code"]) == (431, "head_too_large")
        assert answer.headers["http-network-relay"] == "v1"
        assert TOKEN not in server.text


def test_head_that_does_not_end_is_refused_when_its_time_is_over(tmp_path: Path) -> None:
    """408 with a code; who said nothing at all gets nothing."""
    with (
        server_with(tmp_path, handshake_timeout=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as talking,
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as silent,
    ):
        begun = time.monotonic()
        talking.sendall(b"GET / HTTP/1.1\r\n")
        answer = read_handshake(talking)
        assert (answer.status, answer.json["code"]) == (408, "head_timeout")
        assert silent.recv(1) == b""
        assert 0.4 < time.monotonic() - begun < 2


# Tunnels.


def test_open_is_refused_when_the_user_has_all_their_tunnels(tmp_path: Path) -> None:
    """Other users have their own; one that ends makes room; a resume counts once."""
    with relay_with(tmp_path, tunnels_per_user=2) as relay:
        first, _ = relay.open(1)
        relay.open(2)
        assert refusal(relay.ask(3)) == "user_full"
        relay.open(3, OTHER_TOKEN)
        # The old leg is not known to be dead: its tunnel comes back beside it.
        again = relay.stack.enter_context(RawUser(relay.server.url))
        again.send_resume(tunnel_id=f"{2:032x}")
        channel = relay.client.recv_control("resume")["channel"]
        relay.client.send_resumed(channel)
        again.recv_control("resumed")
        first.send_control({"type": "reset", "code": "user_gone", "message": ""})
        relay.client.recv_control("reset")
        again.drop()
        relay.client.recv_control("detached")
        relay.open(4)


def test_open_is_refused_when_the_client_has_all_its_tunnels(tmp_path: Path) -> None:
    """Whoever has them."""
    with relay_with(tmp_path, tunnels_per_client=2) as relay:
        first, _ = relay.open(1)
        relay.open(2, OTHER_TOKEN)
        assert refusal(relay.ask(3)) == "client_full"
        first.drop()
        relay.client.recv_control("detached")
        relay.open(3)


@pytest.mark.parametrize("setting", ["tunnels_per_user", "tunnels_per_client"])
def test_open_is_refused_when_its_id_is_that_of_another_tunnel(
    tmp_path: Path, setting: str
) -> None:
    """One id at the same client again, and at another client: each `open` is one tunnel more."""
    with relay_with(tmp_path, **{setting: 1}) as relay:
        relay.open(1)
        assert refusal(relay.ask(1)) == setting[len("tunnels_per_") :] + "_full"
        other = RawClient(relay.server.url, OTHER_CLIENT, CLIENT_SECRET + "2")
        relay.stack.enter_context(other)
        elsewhere = relay.ask(1, client=OTHER_CLIENT)
        if setting == "tunnels_per_user":
            assert refusal(elsewhere) == "user_full"
        else:
            other.recv_control("open")


def test_opens_are_refused_when_they_come_too_quickly(tmp_path: Path) -> None:
    """For an `open` as for a `resume`, and neither takes from the other, nor from other users."""
    with relay_with(tmp_path, opens_per_second=0.1) as relay:
        relay.open(1)
        assert refusal(relay.ask(2)) == "too_many_opens"
        relay.open(2, OTHER_TOKEN)
        for attempt in (1, 2):
            user = relay.stack.enter_context(RawUser(relay.server.url, resumes=f"{1:032x}"))
            user.send_resume(tunnel_id=f"{1:032x}", attempt=attempt)
            if attempt == 1:
                relay.client.recv_control("detached")
                channel = relay.client.recv_control("resume")["channel"]
                relay.client.send_resumed(channel)
                user.recv_control("resumed")
            else:
                assert refusal(user) == "too_many_opens"


def test_held_resume_is_counted_once(tmp_path: Path) -> None:
    """It is looked at again when its client comes, which is no second try."""
    with server_with(tmp_path, opens_per_second=0.1) as server, RawUser(server.url) as user:
        user.send_resume()
        user.expect_nothing(0.1)
        with RawClient(server.url) as client:
            client.send_resumed(client.recv_control("resume")["channel"])
            user.recv_control("resumed")


def test_tunnel_is_reset_at_both_ends_when_it_was_idle(tmp_path: Path) -> None:
    """Those that carry something live on, and so do the legs."""
    with relay_with(tmp_path, idle_timeout=2) as relay:
        idle, idle_channel = relay.open(1)
        busy, busy_channel = relay.open(2)
        told: list[tuple[int, str]] = []

        def next_of_client() -> bool:
            busy.send_binary(b"k")
            message = relay.client.recv()
            if message[0] == "text":
                told.append((message[1]["channel"], message[1]["code"]))
            return bool(told)

        eventually(next_of_client, 5)
        assert told == [(idle_channel, "idle_timeout")]
        reset = idle.recv_control("reset")
        assert reset["code"] == "idle_timeout"
        assert "2 s" in reset["message"]
        assert idle.recv_close()[0] == 1000
        relay.client.send_on(busy_channel, b"still here")
        assert busy.recv_binary() == b"still here"
        relay.server.wait_for_line("tunnel closed reason=idle_timeout")


def test_tunnel_is_reset_when_it_is_too_old(tmp_path: Path) -> None:
    """With its own code."""
    with relay_with(tmp_path, max_age=1) as relay:
        user, channel = relay.open(1)
        assert user.recv_control("reset")["code"] == "max_age"
        reset = relay.client.recv_control("reset")
        assert (reset["channel"], reset["code"]) == (channel, "max_age")


def test_slot_is_free_again_when_the_client_never_answers(tmp_path: Path) -> None:
    """The user is refused, the client is told, and the tunnel does not count any more."""
    with relay_with(tmp_path, idle_timeout=1, max_age=1, tunnels_per_user=1) as relay:
        user = relay.ask(1)
        channel = relay.client.recv_control("open")["channel"]
        assert refusal(user) in ("idle_timeout", "max_age")
        assert relay.client.recv_control("reset")["channel"] == channel
        relay.open(2)


# Bytes a second.


def upload(relay: Relay, user: RawUser, channel: int, size: int, limit: int) -> list[int]:
    """Send `size` bytes as credit allows, ack what comes as an end does; the limits granted."""
    sent = received = acked = 0
    limits = [limit]
    while received < size:
        while sent < min(size, limits[-1]):
            piece = min(size, limits[-1], sent + 64 * KIB) - sent
            user.send_binary(b"x" * piece)
            sent += piece
        while received < sent:
            message = relay.client.recv()
            if message[0] == "text":  # Credit of the other direction.
                assert message[1]["type"] == "ack"
                continue
            assert message[0] == "binary"
            received += len(message[1]) - 4
            if received - acked >= 64 * KIB or received == size:
                acked = received
                counts = {"delivered": acked, "limit": acked + 256 * KIB, "eof": False}
                relay.client.send_control_on(channel, "ack", **counts)
        if received < size:
            ack = user.recv_control("ack")
            assert ack["limit"] >= limits[-1]
            limits.append(ack["limit"])
    return limits


def test_credit_is_raised_later_when_a_user_is_faster_than_their_rate(tmp_path: Path) -> None:
    """1 MiB at 256 KiB a second: a second's worth at once, the rest as time passes."""
    with relay_with(tmp_path, bytes_per_second=256 * KIB) as relay:
        user = relay.ask(1, limit=256 * KIB)
        opened = relay.client.recv_control("open")
        assert opened["limit"] == 64 * KIB
        relay.client.send_opened(opened["channel"])
        limit = user.recv_control("opened")["limit"]
        assert limit == 64 * KIB
        begun = time.monotonic()
        limits = upload(relay, user, opened["channel"], 1024 * KIB, limit)
        took = time.monotonic() - begun
        assert 2.7 < took < 6
        assert len(limits) > 10

        # The tokens are used up: what ends a stream is not held by that.
        user.send_control({"type": "eof", "count": 1024 * KIB})
        begun = time.monotonic()
        assert eventually_control(relay.client, "eof")["count"] == 1024 * KIB
        user.send_control({"type": "reset", "code": "user_gone", "message": ""})
        eventually_control(relay.client, "reset")
        assert time.monotonic() - begun < 1
        assert "tunnel slowed reason=bytes_per_second" in relay.server.text


def test_short_tunnels_are_no_way_around_the_rate(tmp_path: Path) -> None:
    """All they carry together is bounded, as fast as they come; one that waits gets its turn."""
    rate = 64 * KIB
    with relay_with(tmp_path, bytes_per_second=rate, opens_per_second=0) as relay:
        begun = time.monotonic()
        carried, number = 0, 0
        while time.monotonic() - begun < 1.5:
            number += 1
            with RawUser(relay.server.url) as user:
                user.send_open(tunnel_id=f"{number:032x}")
                channel = eventually_control(relay.client, "open")["channel"]
                relay.client.send_opened(channel)
                limit = user.recv_control("opened")["limit"]
                if limit:
                    user.send_binary(b"x" * limit)
                    carried += len(relay.client.recv_on()[1])
                user.send_control({"type": "reset", "code": "user_gone", "message": ""})
                eventually_control(relay.client, "reset")
        took = time.monotonic() - begun
        assert number > 10
        assert rate < carried <= rate * (2 + took)
        # Its very first credit comes by an ack of nothing.
        user = relay.ask(number + 1)
        channel = eventually_control(relay.client, "open")["channel"]
        relay.client.send_opened(channel)
        assert user.recv_control("opened")["limit"] < rate
        ack = user.recv_control("ack")
        assert (ack["delivered"], ack["eof"]) == (0, False)
        assert ack["limit"] > 0


def eventually_control(client: RawClient, kind: str) -> dict[str, Any]:
    """The next control of this type, past acks."""
    while True:
        control = client.recv_control()
        if control["type"] == kind:
            return control
        assert control["type"] == "ack"


def test_paced_user_breaks_the_rules_when_they_do_not_wait_for_credit(tmp_path: Path) -> None:
    """The limit that was passed on is the one that holds."""
    with relay_with(tmp_path, bytes_per_second=16 * KIB) as relay:
        user, _ = relay.open(1, limit=256 * KIB)
        for _ in range(8):
            user.send_binary(b"x" * 64 * KIB)
        message = user.recv()
        while message[0] != "text" or message[1]["type"] == "ack":
            message = user.recv()
        assert (message[1]["type"], message[1]["code"]) == ("reset", "protocol_error")


@pytest.mark.parametrize("setting", ["TUNNELS_PER_USER", "IDLE_TIMEOUT", "TRUSTED_PROXIES"])
def test_start_fails_with_one_line_when_a_limit_is_no_number(tmp_path: Path, setting: str) -> None:
    """Never silently without effect."""
    env = {f"HTTP_NETWORK_RELAY_{setting}": "many"}
    with start_server(tmp_path, wait=False, env=env) as server:
        assert server.wait(10) == 2
        assert sum(setting in line for line in server.lines) == 1
