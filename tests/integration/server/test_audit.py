"""The audit log of a running server: one line per event, and never in a tunnel's way."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import CLIENT_SECRET, TOKEN, start_server
from tests.support.raw import CLIENT_PATH, RawClient, RawUser, client_headers, handshake_status
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

RESUME_TOKEN = "5ec7e7" + "0" * 58
WRONG_SECRET = secret_of("cs-wrong")


def settings(path: Path | str, **more: str) -> dict[str, str]:
    return {"HTTP_NETWORK_RELAY_AUDIT_LOG": str(path), **more}


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_each_event_is_one_line_with_who_what_and_why(tmp_path: Path) -> None:
    """A client, a tunnel that opens, is resumed and ends, refusals, a wrong secret."""
    path = tmp_path / "audit.jsonl"
    with start_server(tmp_path, env=settings(path)) as server, ExitStack() as stack:
        handshake_status(server.url + CLIENT_PATH, client_headers(secret=WRONG_SECRET))
        source = {"X-Forwarded-For": "203.0.113.7"}
        offline = stack.enter_context(RawUser(server.url, headers=source))
        offline.send_open(host="::1", resume_token=RESUME_TOKEN)
        offline.recv_control("refused")
        offline.recv_close()
        offline.close()
        server.wait_for_line("leg down reason=client_offline")
        client = stack.enter_context(RawClient(server.url, headers=source))
        user = stack.enter_context(RawUser(server.url, headers=source))
        user.send_open(tunnel_id="a" * 32, resume_token=RESUME_TOKEN)
        client.send_opened(client.recv_control("open")["channel"])
        user.recv_control("opened")
        user.send_binary(b"12345")
        assert client.recv_on() == (1, b"12345")
        client.send_on(1, b"123")
        assert user.recv_binary() == b"123"
        user.drop()
        client.recv_control("detached")
        again = stack.enter_context(RawUser(server.url, resumes="a" * 32))
        again.send_resume(tunnel_id="a" * 32, received=3, delivered=3, resume_token=RESUME_TOKEN)
        client.send_resumed(client.recv_control("resume")["channel"], received=5, delivered=5)
        again.recv_control("resumed")
        again.send_binary(b"67")
        assert client.recv_on() == (2, b"67")
        again.send_control({"type": "reset", "code": "user_gone", "message": ""})
        client.recv_control("reset")
        dialled = stack.enter_context(RawUser(server.url))
        dialled.send_open(tunnel_id="b" * 32, host="db.lan", port=5432)
        channel = client.recv_control("open")["channel"]
        client.send_control_on(channel, "refused", code="target_refused", message="no")
        dialled.recv_control("refused")
        client.close()
        eventually(lambda: '"client_down"' in path.read_text())
    told = events(path)
    for event in told:
        assert event.pop("time").endswith("Z")
        for name in ("secs", "user"):
            event.pop(name, None)
    ask = {"client": "device", "rule": "*"}
    tunnel = {**ask, "tunnel": "a" * 32, "target": "127.0.0.1:22"}
    far, near = {"address": "203.0.113.7"}, {"address": "127.0.0.1"}
    zero = {**ask, "rule": None, "tunnel": "0" * 31 + "1", "target": "[::1]:22"}
    other = {**ask, "tunnel": "b" * 32, "target": "db.lan:5432"}
    wanted: list[dict[str, Any]] = [
        {"event": "login_failed", "kind": "client", "name": "device", "reason": "unauthorized"}
        | near,
        {"event": "tunnel_refused", "reason": "client_offline"} | zero | far,
        {"event": "client_up", "client": "device"} | far,
        {"event": "tunnel_opened"} | tunnel | far,
        {"event": "tunnel_closed", "up": 5, "down": 3, "reason": "user_lost"} | tunnel | far,
        {"event": "tunnel_resumed"} | tunnel | near,
        {"event": "tunnel_closed", "up": 2, "down": 0, "reason": "user_gone"} | tunnel | near,
        {"event": "tunnel_refused", "reason": "target_refused"} | other | near,
        {"event": "client_down", "client": "device", "reason": "closed"} | far,
    ]
    assert told == wanted
    text = path.read_text()
    for secret in (TOKEN, CLIENT_SECRET, RESUME_TOKEN, WRONG_SECRET):
        assert secret not in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_go_to_stdout_when_the_path_says_so(tmp_path: Path) -> None:
    """Between the lines of the log; the user is called as there."""
    with start_server(tmp_path, env=settings("-")) as server, RawUser(server.url) as user:
        user.send_open()
        user.recv_control("refused")
        user.close()
        event = json.loads(server.wait_for_line('"event":"tunnel_refused"'))
        server.wait_for_line(f"leg down .*user={event['user']} ")


@pytest.mark.parametrize("kind", ["full", "fifo"])
def test_tunnel_works_and_the_server_stops_in_time_when_nothing_can_be_written(
    tmp_path: Path, kind: str
) -> None:
    """A full disk, and a FIFO that nobody reads, are the writer's problem alone."""
    path = Path("/dev/full")
    if kind == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    with start_server(tmp_path, env=settings(path)) as server, ExitStack() as stack:
        client = stack.enter_context(RawClient(server.url))
        user = stack.enter_context(RawUser(server.url))
        for _ in range(3):
            handshake_status(server.url + CLIENT_PATH, client_headers(secret=WRONG_SECRET))
        user.send_open()
        client.send_opened(client.recv_control("open")["channel"])
        user.recv_control("opened")
        user.send_binary(b"12345")
        assert client.recv_on() == (1, b"12345")
        server.wait_for_line("WARNING audit log cannot be written")
        server.terminate()
        assert server.wait(2.5) == 0
        assert "process ended hard" not in server.text
        assert "audit lines lost at the end count=" in server.text


def test_last_lines_are_written_when_the_server_stops(tmp_path: Path) -> None:
    """What ended by the stop itself is told too."""
    path = tmp_path / "audit.jsonl"
    with start_server(tmp_path, env=settings(path)) as server, ExitStack() as stack:
        client = stack.enter_context(RawClient(server.url))
        user = stack.enter_context(RawUser(server.url))
        user.send_open()
        client.send_opened(client.recv_control("open")["channel"])
        user.recv_control("opened")
        server.terminate()
        assert server.wait(2.5) == 0
    told = [(event["event"], event.get("reason")) for event in events(path)]
    assert told[:2] == [("client_up", None), ("tunnel_opened", None)]
    assert sorted(told[2:]) == [
        ("client_down", "server_restart"),
        ("tunnel_closed", "server_restart"),
    ]


def test_file_is_made_anew_when_it_was_rotated_away(tmp_path: Path) -> None:
    """logrotate without a signal."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    with start_server(tmp_path, env=settings(path)) as server:
        with RawClient(server.url):
            eventually(lambda: path.exists() and path.stat().st_size)
            path.rename(old)
        eventually(lambda: path.exists() and path.stat().st_size)
    assert [event["event"] for event in events(old)] == ["client_up"]
    assert [event["event"] for event in events(path)] == ["client_down"]
