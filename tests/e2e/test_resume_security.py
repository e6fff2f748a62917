"""Who may resume a tunnel, with the real server and client, and users who speak by hand.

Each case is an attempt on a living tunnel. It is refused, and the tunnel does not notice.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import (
    CLIENT_SECRET,
    TOKEN,
    Server,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import TUNNEL_HEADER, USER_PATH, RawUser, handshake_status, user_headers
from tests.support.targets import EchoTarget

OTHER_TOKEN = "pu-Zk2bV8sLq5nH1xWd7tRy4mCj9gPeFuAo"
CREDENTIALS = {
    "clients": {"device": CLIENT_SECRET, "other-device": CLIENT_SECRET + "2"},
    "proxy_users": [TOKEN, OTHER_TOKEN],
}
TUNNEL_ID, RESUME_TOKEN = "a" * 32, "b" * 64
GONE_S = 5.0


@dataclass
class World:
    """A server, two clients, an echo, and a tunnel of TOKEN's user at `device`."""

    server: Server
    port: int
    user: RawUser
    sent: int = 0
    attempt: int = 0
    opening: dict[str, Any] = field(default_factory=dict)

    def echo(self, data: bytes) -> None:
        """What a tunnel that is well does."""
        self.user.send_binary(data)
        received = b""
        while len(received) < len(data):
            received += self.user.recv_binary()
        assert received == data
        self.sent += len(data)

    def resume(self, user: RawUser, attempt: int, **fields: Any) -> dict[str, Any]:
        """Send a `resume` with what the echo has brought; return the answer."""
        counts = {"received": self.sent, "delivered": self.sent, "limit": self.sent + 262_144}
        user.send_resume(**{**self.opening, **counts, "attempt": attempt, **fields})
        answer: dict[str, Any] = user.recv_control()
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two clients and two users."""
    with (
        start_server(tmp_path_factory.mktemp("server"), credentials=CREDENTIALS) as running,
        start_client(running.url),
        start_client(running.url, name="other-device", secret=CLIENT_SECRET + "2"),
    ):
        yield running


@contextmanager
def living_tunnel(server: Server, tunnel_id: str = TUNNEL_ID) -> Iterator[World]:
    with EchoTarget() as target, RawUser(server.url) as user:
        world = World(server, target.port, user)
        world.opening = {
            "port": target.port,
            "tunnel_id": tunnel_id,
            "resume_token": RESUME_TOKEN,
            "grace_s": 60,
        }
        user.send_open(**world.opening)
        assert user.recv_control("opened")["grace_s"] > 0
        world.echo(b"before")
        yield world
        user.send_control({"type": "reset", "code": "user_gone", "message": ""})


ATTEMPTS: dict[str, tuple[str, dict[str, Any], str]] = {
    # what is tried -> whose token, what differs in the `resume`, how it is refused
    "wrong resume token": (TOKEN, {"resume_token": "c" * 64}, "unknown_tunnel"),
    "almost the resume token": (TOKEN, {"resume_token": "b" * 63 + "c"}, "unknown_tunnel"),
    "another user": (OTHER_TOKEN, {}, "unknown_tunnel"),
    "another client": (TOKEN, {"client": "other-device"}, "unknown_tunnel"),
    "another tunnel": (TOKEN, {"tunnel_id": "d" * 32}, "unknown_tunnel"),
    "another host": (TOKEN, {"host": "127.0.0.2"}, "unknown_tunnel"),
    "another port": (TOKEN, {"port": 1}, "unknown_tunnel"),
    "an unknown client": (TOKEN, {"client": "nobody"}, "client_unknown"),
    "counts that cannot be true": (TOKEN, {"received": 1 << 40}, "protocol_error"),
    "counts that fall": (TOKEN, {"received": 0, "delivered": 0}, "protocol_error"),
    "no attempt": (TOKEN, {"attempt": 0}, "superseded"),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_resume_is_refused_when_it_is_not_ours(server: Server, name: str) -> None:
    """Refused by its code, in the same words whatever is wrong; the tunnel goes on."""
    token, fields, code = ATTEMPTS[name]
    number = f"{list(ATTEMPTS).index(name):032x}"
    with living_tunnel(server, number) as world, RawUser(server.url, token) as thief:
        world.user.send_control(
            {"type": "ack", "delivered": world.sent, "limit": 1 << 20, "eof": False}
        )
        world.echo(b"acked")
        answer = world.resume(thief, **{"attempt": 1, **fields})
        assert (answer["type"], answer["code"]) == ("refused", code)
        if code == "unknown_tunnel":
            with RawUser(server.url, token) as again:
                nothing: dict[str, Any] = {"tunnel_id": "e" * 32, "attempt": 1}
                assert world.resume(again, **nothing)["message"] == answer["message"]
        world.echo(b"still there")


def test_old_resume_is_refused_when_it_is_replayed(server: Server) -> None:
    """What somebody recorded is of no use once a newer one was accepted."""
    with living_tunnel(server, "1" * 32) as world:
        first = world.user
        with RawUser(server.url) as second:
            assert world.resume(second, attempt=7)["type"] == "resumed"
            assert first.recv_control("reset")["code"] == "superseded"
            world.user = second
            world.echo(b"on the second leg")
            for attempt in (7, 6):
                with RawUser(server.url) as thief:
                    answer = world.resume(thief, attempt=attempt)
                    assert (answer["type"], answer["code"]) == ("refused", "superseded")
            world.echo(b"still there")


def test_tunnel_lives_on_when_a_thief_resumes_and_resets_at_once(server: Server) -> None:
    """Before `resumed` nobody has shown the token, so a reset must not reach the tunnel."""
    closed = r"tunnel closed reason=(protocol_error|unknown_tunnel) .*tunnel=22222222"
    with living_tunnel(server, "2" * 32) as world:
        # The client may refuse before the reset is there: then it tells nothing.
        for _ in range(50):
            seen = world.server.line_count
            counts = {"received": world.sent, "delivered": world.sent}
            with RawUser(server.url, OTHER_TOKEN) as thief:
                thief.send_resume(**{**world.opening, **counts, "resume_token": "c" * 64})
                thief.send_control({"type": "reset", "code": "protocol_error", "message": ""})
                # A `reset` would be in the client's frame_sender by now, before the echo's bytes.
                line = world.server.wait_for_line(closed, after=seen)
            world.echo(b"still there")
            if "protocol_error" in line:
                return
        pytest.fail("the client was always quicker than the reset")


def test_tunnel_is_not_resumed_when_its_user_was_revoked(tmp_path: Path) -> None:
    """The token is taken out: the tunnel ends, its next leg gets 401; another user's goes on."""
    with (
        start_server(tmp_path, credentials=CREDENTIALS) as server,
        start_client(server.url),
        EchoTarget() as target,
        start_proxy(server.url, port=target.port) as proxy,
        start_proxy(server.url, port=target.port, token=OTHER_TOKEN) as other,
    ):
        for tunnel in (proxy, other):
            tunnel.send(b"before")
            assert tunnel.receive_exactly(6) == b"before"
        left = {**CREDENTIALS, "proxy_users": [OTHER_TOKEN]}
        server.credentials_file.write_text(json.dumps(left))
        assert proxy.wait(GONE_S) == 1
        assert len(proxy.lines) == 1
        assert "was revoked" in proxy.text
        again = {**user_headers(TOKEN), TUNNEL_HEADER: TUNNEL_ID}
        assert handshake_status(f"{server.url}{USER_PATH}", again).status == 401
        other.send(b"after")
        assert other.receive_exactly(5) == b"after"
