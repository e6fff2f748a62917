"""Stop, restart, and what the master does about it."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.processes import TOKEN, Server, start_server, write_credentials
from tests.support.raw import CLIENT_PATH, RawClient, RawUser, client_headers, handshake_status
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

KIB = 1024
WINDOW = 4096 * KIB


def open_tunnel(client: RawClient, user: RawUser) -> int:
    user.send_open(limit=WINDOW)
    channel: int = client.recv_control("open")["channel"]
    client.send_opened(channel, limit=WINDOW)
    user.recv_control("opened")
    return channel


def wait_up(server: Server, legs: int) -> None:
    """Wait until the server serves that many legs: a peer has its answer a moment before."""
    eventually(lambda: server.text.count(" leg up ") >= legs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_every_leg_closes_with_1012_when_the_server_is_told_to_stop(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Rule 9: one drain for all three signals; the process is gone in 2 s with exit 0."""
    with (
        start_server(tmp_path, threads=8) as server,
        RawClient(server.url) as client,
        RawUser(server.url) as user,
        RawUser(server.url) as opening,
        RawUser(server.url) as idle,
    ):
        channel = open_tunnel(client, user)
        opening.send_open(tunnel_id="f" * 32)
        client.recv_control("open")
        client.send_on(channel, b"last words")

        assert user.recv_binary() == b"last words"
        wait_up(server, 4)
        begun = time.monotonic()
        server.signal(number)

        assert user.recv_control("going_away")["spread_ms"] > 0
        assert user.recv_control("detached")["code"] == "server_restart"
        assert user.recv_close(1)[0] == 1012
        assert opening.recv_control("going_away")
        assert opening.recv_control("refused")["code"] == "server_restart"
        assert opening.recv_close(1)[0] == 1000
        assert client.recv_control("going_away")
        assert client.recv_close(1)[0] == 1012
        assert idle.recv_control("going_away")
        assert idle.recv_close(1)[0] == 1012
        for peer in (user, opening, client, idle):
            peer.drop()
        assert server.wait(2) == 0
        assert time.monotonic() - begun < 1.5


def test_tunnels_go_on_for_half_a_second_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    """Time to have the next leg up; who stays is detached then, and no tunnel is reset."""
    with (
        start_server(tmp_path, threads=8) as server,
        RawClient(server.url) as client,
        RawUser(server.url) as user,
        RawUser(server.url) as leaver,
        RawUser(server.url) as opening,
    ):
        channel = open_tunnel(client, user)
        left = open_tunnel(client, leaver)
        wait_up(server, 4)
        begun = time.monotonic()
        server.terminate()
        for peer in (client, user, leaver, opening):
            peer.recv_control("going_away")

        leaver.close()
        assert client.recv_control("detached") == {
            "type": "detached",
            "channel": left,
            "code": "user_lost",
        }
        opening.send_open(tunnel_id="f" * 32)
        assert opening.recv_control("refused")["code"] == "server_restart"
        while time.monotonic() < begun + 0.3:
            user.send_binary(b"key")
            assert client.recv_on() == (channel, b"key")
            client.send_on(channel, b"echo")
            assert user.recv_binary() == b"echo"

        assert user.recv_control("detached")["code"] == "server_restart"
        assert time.monotonic() - begun > 0.45
        assert user.recv_close(1)[0] == 1012
        # Not past other messages: there are none.
        assert client.recv()[:2] == ("close", 1012)
        for last in (client, user, opening):
            last.drop()
        assert server.wait(2) == 0
        assert time.monotonic() - begun < 1.5


def test_legs_are_not_ended_when_all_of_them_leave(tmp_path: Path) -> None:
    """The half second is an offer: the server goes with the last leg, and cuts off nobody."""
    with start_server(tmp_path, threads=8) as server:
        with RawClient(server.url) as client, RawUser(server.url) as user:
            open_tunnel(client, user)
            wait_up(server, 2)
            server.terminate()
            client.recv_control("going_away")
            user.recv_control("going_away")
        assert server.wait(2) == 0
        assert server.text.count("leg down reason=") == 2
        assert "server_restart" not in server.text


def test_process_is_gone_in_two_seconds_when_everything_is_stuck(tmp_path: Path) -> None:
    """Peers that read nothing and close nothing, and half a request head, hold nobody up."""
    with start_server(tmp_path, threads=8) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(RawClient(server.url))
        users = [stack.enter_context(RawUser(server.url)) for _ in range(6)]
        channels = [open_tunnel(client, user) for user in users]
        for user, channel in zip(users, channels, strict=True):
            for _ in range(WINDOW // (64 * KIB)):
                client.send_on(channel, bytes(64 * KIB))
                user.send_binary(bytes(64 * KIB))
        head = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        head.sendall(b"GET / HT")
        worker = server.worker_pid

        begun = time.monotonic()
        server.terminate()

        assert server.wait(3) == 0
        assert time.monotonic() - begun < 2
        assert not Path(f"/proc/{worker}").exists()
        assert "SIGKILL" not in server.text


def test_newcomers_are_refused_when_the_server_drains(tmp_path: Path) -> None:
    """The listener is closed first: nobody is accepted by the backlog and never served."""
    with start_server(tmp_path, threads=8) as server, RawUser(server.url) as user:
        wait_up(server, 1)
        server.terminate()
        user.recv_control("going_away")
        with pytest.raises(OSError, match=r"refused|reset"):
            handshake_status(server.url + CLIENT_PATH, client_headers())
        assert server.wait(2) == 0


def test_new_worker_serves_when_the_master_gets_sighup(tmp_path: Path) -> None:
    """The rolling path: no request fails, the old worker's legs close with 1012."""
    with start_server(tmp_path, threads=8) as server, RawClient(server.url) as client:
        old = server.worker_pid
        wait_up(server, 1)
        server.signal(signal.SIGHUP)
        client.recv_control("going_away")
        assert client.recv_close(1)[0] == 1012
        # Right away: the listener was never closed.
        with RawClient(server.url) as again, RawUser(server.url) as user:
            open_tunnel(again, user)
            eventually(lambda: server.worker_pid != old, 3)
            user.send_binary(b"x")
            assert again.recv_on()[1] == b"x"


def test_old_worker_goes_on_when_sighup_finds_bad_credentials(tmp_path: Path) -> None:
    """A typing error in the file must not end the relay; the next SIGHUP takes the right file."""
    with start_server(tmp_path, threads=8) as server, RawClient(server.url) as client:
        worker = server.worker_pid
        write_credentials(tmp_path, "{")
        server.signal(signal.SIGHUP)
        server.wait_for_line("ERROR.* not reloaded, .*credentials.json: line 1: not JSON")
        with RawUser(server.url) as user:
            open_tunnel(client, user)
        assert server.worker_pid == worker

        write_credentials(
            tmp_path, {"clients": {"new": secret_of("cs-new")}, "proxy_users": [TOKEN]}
        )
        server.signal(signal.SIGHUP)
        assert client.recv_close(3)[0] == 1012
        with RawClient(server.url, "new", secret_of("cs-new")):
            pass


def test_second_worker_is_not_started_when_the_master_gets_sigttin(tmp_path: Path) -> None:
    """Two workers would have two registries."""
    with start_server(tmp_path, threads=8) as server:
        worker = server.worker_pid
        server.signal(signal.SIGTTIN)
        server.wait_for_line("SIGTTIN is ignored")
        server.signal(signal.SIGTTOU)
        server.wait_for_line("Handling signal: ttou")
        assert server.worker_pid == worker
        assert server.health() == 200


def test_worker_drains_when_its_master_is_killed(tmp_path: Path) -> None:
    """An orphan does not go on serving beside its successor."""
    with start_server(tmp_path, threads=8) as server, RawUser(server.url) as user:
        worker = server.worker_pid
        wait_up(server, 1)
        server.signal(signal.SIGKILL)
        assert user.recv_close(3)[0] == 1012
        eventually(lambda: _is_gone(worker), 3)


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    return True


def test_worker_comes_back_when_it_is_killed(tmp_path: Path) -> None:
    """The master starts another one, and peers reconnect to it."""
    with start_server(tmp_path, threads=8) as server:
        before = server.line_count
        os.kill(server.worker_pid, signal.SIGKILL)
        server.wait_for_line("relay ready", after=before)
        _serves(server)


def _serves(server: Server) -> None:
    with RawClient(server.url) as client, RawUser(server.url) as user:
        open_tunnel(client, user)
