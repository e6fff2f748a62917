"""Changes of the credentials while something is on its way: a held `resume`, a leg let in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from tests.support.processes import Server, start_server
from tests.support.raw import RawClient, RawUser, handshake_status, user_headers
from tests.support.secrecy import note_credentials, secret_of

ID = "ab" * 16
RULE = "gw:127.0.0.1:22"
CREDENTIALS: dict[str, Any] = {
    "clients": {
        "gw": {"secrets": [secret_of("cs-gw")]},
        "other": {"secrets": [secret_of("cs-other")]},
    },
    "proxy_users": {
        "ops": {"secrets": [secret_of("pu-ops")], "allow": [RULE, "other:127.0.0.1:22"]},
        "neighbour": {"secrets": [secret_of("pu-neighbour")], "allow": [RULE]},
    },
}
RELOADED_S = 5.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One for each test: they take things away."""
    with start_server(tmp_path, credentials=CREDENTIALS) as running:
        yield running


def reload(server: Server, kind: str, name: str, **values: Any) -> None:
    """Give an entry other values, or take it out, and wait until that is in force."""
    new = json.loads(json.dumps(CREDENTIALS))
    if values:
        new[kind][name].update(values)
    else:
        del new[kind][name]
    note_credentials(new)
    mark = server.line_count
    server.credentials_file.write_text(json.dumps(new))
    server.wait_for_line("credentials reloaded", RELOADED_S, after=mark)


CHANGES: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    # what happens while a `resume` of ops at gw is held -> whose entry, what, how it is refused
    "user revoked": (("proxy_users", "ops"), {}, "revoked"),
    "secret rotated away": (("proxy_users", "ops"), {"secrets": [secret_of("pu-new")]}, "revoked"),
    "user expired": (("proxy_users", "ops"), {"expires": "2020-01-01"}, "revoked"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_held_resume_is_refused_when_its_user_loses_access(server: Server, name: str) -> None:
    """At once, not when the client comes; the neighbour's is held on and then passed on."""
    entry, values, code = CHANGES[name]
    with (
        RawUser(server.url, secret_of("pu-ops"), resumes=ID) as user,
        RawUser(server.url, secret_of("pu-neighbour"), resumes=ID) as neighbour,
    ):
        for held in (user, neighbour):
            held.send_resume(client="gw", tunnel_id=ID)
        reload(server, *entry, **values)
        assert user.recv_control("refused")["code"] == code
        assert user.recv_close()[0] == 1000
        with RawClient(server.url, "gw", secret_of("cs-gw")) as client:
            resume = client.recv_control("resume")
            assert (resume["user"], resume["channel"]) == ("neighbour", 1)
            client.expect_nothing(0.2)
            client.send_resumed(1)
            neighbour.recv_control("resumed")


def test_held_resume_is_denied_when_its_rule_goes_before_the_client_comes(server: Server) -> None:
    """The question is asked again when the tunnel is opened; the client hears nothing of it."""
    with RawUser(server.url, secret_of("pu-ops"), resumes=ID) as user:
        user.send_resume(client="gw", tunnel_id=ID)
        reload(server, "proxy_users", "ops", allow=["other:127.0.0.1:22"])
        with RawClient(server.url, "gw", secret_of("cs-gw")) as client:
            assert user.recv_control("refused")["code"] == "denied"
            client.expect_nothing(0.2)


def test_open_on_its_way_is_reset_when_the_user_is_revoked(server: Server) -> None:
    """Before the client has said `opened`: the client hears a `reset`, the user why."""
    with (
        RawClient(server.url, "gw", secret_of("cs-gw")) as client,
        RawUser(server.url, secret_of("pu-ops")) as user,
    ):
        user.send_open(client="gw", tunnel_id=ID)
        channel = client.recv_control("open")["channel"]
        reload(server, "proxy_users", "ops")
        assert client.recv_control("reset")["code"] == "revoked"
        client.send_opened(channel)
        answer = user.recv_control()
        assert (answer["type"], answer["code"]) == ("refused", "revoked")
        assert user.recv_close()[0] == 1000


def test_silent_leg_ends_when_its_user_is_revoked(server: Server) -> None:
    """One that has asked for nothing yet."""
    with (
        RawUser(server.url, secret_of("pu-ops")) as user,
        RawUser(server.url, secret_of("pu-neighbour")) as neighbour,
    ):
        reload(server, "proxy_users", "ops")
        assert user.recv_control("refused")["code"] == "revoked"
        assert user.recv_close()[0] == 1000
        neighbour.send_open(client="gw", tunnel_id=ID)
        assert neighbour.recv_control("refused")["code"] == "client_offline"


def test_client_leg_is_closed_with_1008_when_its_secret_is_revoked(server: Server) -> None:
    """Its tunnels are reset `revoked`, its next upgrade is a 401; the other client stays."""
    with (
        RawClient(server.url, "gw", secret_of("cs-gw")) as client,
        RawClient(server.url, "other", secret_of("cs-other")) as other,
        RawUser(server.url, secret_of("pu-ops")) as user,
    ):
        user.send_open(client="gw", tunnel_id=ID, grace_s=60)
        client.send_opened(client.recv_control("open")["channel"], grace_s=60)
        user.recv_control("opened")
        reload(server, "clients", "gw", secrets=[secret_of("cs-new")])
        assert user.recv_control("reset")["code"] == "revoked"
        assert client.recv_close()[0] == 1008
        with pytest.raises(websocket.WebSocketBadStatusException) as caught:
            RawClient(server.url, "gw", secret_of("cs-gw"))
        assert caught.value.status_code == 401
        with (
            RawClient(server.url, "gw", secret_of("cs-new")),
            RawUser(server.url, secret_of("pu-ops")) as again,
        ):
            again.send_open(client="other", tunnel_id=ID)
            other.recv_control("open")


def test_login_is_refused_when_the_token_was_revoked(server: Server) -> None:
    """The same answer as to a token that never was."""
    url = f"{server.url}/ws_for_ssh_proxy_command"
    reload(server, "proxy_users", "ops")
    answers = [
        handshake_status(url, user_headers(token))
        for token in (secret_of("pu-ops"), secret_of("pu-never"))
    ]
    assert [answer.status for answer in answers] == [401, 401]
    assert answers[0].body == answers[1].body
