"""Legs under stress: pings, silence, peers that do not read, takeover of a dead link."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import pytest

from tests.support.processes import TOKEN, Server, resident_bytes, start_server, thread_count
from tests.support.raw import RawClient, RawPeer, RawUser
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

KIB = 1024
WINDOW = 4096 * KIB
INTERVAL_S = 0.4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that gives a silent peer as long as any does."""
    with start_server(tmp_path_factory.mktemp("server"), threads=16) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short ping intervals: who says nothing for a second is given up."""
    folder = tmp_path_factory.mktemp("hasty")
    with start_server(folder, threads=16, ping_interval_s=INTERVAL_S) as running:
        yield running


def open_tunnel(client: RawClient, user: RawUser, limit: int = WINDOW) -> int:
    user.send_open(limit=limit)
    control = client.recv_control("open")
    channel: int = control["channel"]
    client.send_opened(channel, limit=limit)
    assert user.recv_control("opened")["limit"] == limit
    return channel


class Alive:
    """Keeps peers alive from a thread: reads what comes, answers pings."""

    def __init__(self, *peers: RawPeer) -> None:
        self._peers = list(peers)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alive")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self._peers and not self._stop.is_set():
            for peer in tuple(self._peers):
                with suppress(TimeoutError):
                    if peer.recv(0.02)[0] == "close":
                        self._peers.remove(peer)


def test_server_pings_each_leg_when_nothing_else_happens(hasty: Server) -> None:
    """Once an interval, and a leg that answers lives on."""
    with RawClient(hasty.url) as client, RawUser(hasty.url) as user:
        open_tunnel(client, user)
        until = time.monotonic() + 6 * INTERVAL_S
        with Alive(client):
            while time.monotonic() < until:
                with pytest.raises(TimeoutError):
                    user.recv(until - time.monotonic())
        assert 5 <= user.pings_seen <= 7
        assert 5 <= client.pings_seen <= 7
        user.send_binary(b"alive")
        assert client.recv_on()[1] == b"alive"


@pytest.mark.parametrize("who", ["client", "user"])
def test_leg_is_given_up_when_it_is_silent(hasty: Server, who: str) -> None:
    """Rule 7: 2.5 intervals after the last byte, give or take a tick."""
    with RawClient(hasty.url) as client, RawUser(hasty.url) as user:
        open_tunnel(client, user)
        silent, other = (client, user) if who == "client" else (user, client)
        begun = time.monotonic()
        silent.answers_pings = False
        poll = select.poll()
        poll.register(silent.sock, select.POLLRDHUP)
        with Alive(other):
            assert poll.poll(5000)
        assert 2.2 * INTERVAL_S < time.monotonic() - begun < 2.5 * INTERVAL_S + 0.3
        hasty.wait_for_line(f"leg down reason=silent .*{who}=")


def test_user_leg_is_given_up_when_it_says_nothing(tmp_path: Path) -> None:
    """It answers pings, but no `open` comes: after `--handshake-timeout` it is told, and over."""
    setting = {"HTTP_NETWORK_RELAY_HANDSHAKE_TIMEOUT": "1"}
    with start_server(tmp_path, env=setting) as server, RawUser(server.url) as user:
        begun = time.monotonic()
        refused = user.recv_control("refused", 3)
        assert refused["code"] == "no_open"
        assert "within 1 s" in refused["message"]
        assert user.recv_close(1)[0] == 1000
        assert 0.9 < time.monotonic() - begun < 2
        server.wait_for_line("leg down reason=no_open")


def test_leg_lives_when_it_sends_and_does_not_read(hasty: Server) -> None:
    """Any byte counts: an upload over an unread leg keeps it alive, then all arrives."""
    payload = Random(1).randbytes(WINDOW)
    with RawClient(hasty.url) as client, RawUser(hasty.url) as user:
        channel = open_tunnel(client, user)
        for at in range(0, WINDOW, 64 * KIB):
            client.send_on(channel, payload[at : at + 64 * KIB])
        until = time.monotonic() + 5 * INTERVAL_S
        sent = 0
        while time.monotonic() < until:
            user.send_binary(b"u")
            sent += 1
            assert client.recv_on()[1] == b"u"
            select.select([], [], [], 0.05)
        with Alive(client):
            got = b"".join(user.recv_binary() for _ in range(WINDOW // (64 * KIB)))
        assert got == payload


def test_frames_stay_whole_when_pings_come_while_a_send_is_stuck(server: Server) -> None:
    """Rule 4: the pongs of the reader's side never land inside a data frame."""
    payload = Random(2).randbytes(WINDOW)
    with RawClient(server.url) as client, RawUser(server.url) as user:
        channel = open_tunnel(client, user)
        for at in range(0, WINDOW, 64 * KIB):
            client.send_on(channel, payload[at : at + 64 * KIB])
        for number in range(200):
            user.ping(b"%d" % number)
            select.select([], [], [], 0.002)
        got = bytearray()
        with Alive(client):
            while len(got) < WINDOW:
                got += user.recv_binary()
                select.select([], [], [], 0.001)
        assert got == payload
        assert user.pongs_seen >= 1


def test_nobody_else_waits_when_a_user_does_not_read(server: Server) -> None:
    """Rule 3: a stuck user costs its window and delays no tunnel of the same client."""
    before = resident_bytes(server.worker_pid)
    with RawClient(server.url) as client, ExitStack() as stack:
        stuck = [stack.enter_context(RawUser(server.url)) for _ in range(4)]
        channels = [open_tunnel(client, user) for user in stuck]
        live = stack.enter_context(RawUser(server.url))
        channel = open_tunnel(client, live)
        for each in channels:
            for _ in range(WINDOW // (64 * KIB)):
                client.send_on(each, bytes(64 * KIB))
        for _ in range(50):
            begun = time.monotonic()
            client.send_on(channel, b"key")
            assert live.recv_binary() == b"key"
            live.send_binary(b"echo")
            assert client.recv_on() == (channel, b"echo")
            assert time.monotonic() - begun < 0.5
        assert resident_bytes(server.worker_pid) - before < 4 * WINDOW + 24 * 1024 * KIB


def test_nobody_else_waits_when_a_client_does_not_read(tmp_path: Path) -> None:
    """A leg whose peer stopped reading delays no other client's tunnels."""
    secrets = {name: secret_of(f"cs-{name}") for name in ("a", "b")}
    credentials = {"clients": secrets, "proxy_users": [TOKEN]}
    with (
        start_server(tmp_path, threads=8, credentials=credentials) as server,
        RawClient(server.url, "a", secrets["a"]) as stuck,
        RawClient(server.url, "b", secrets["b"]) as client,
        RawUser(server.url) as uploader,
        RawUser(server.url) as user,
    ):
        uploader.send_open(client="a")
        stuck.send_opened(stuck.recv_control("open")["channel"], limit=2**40)
        assert uploader.recv_control("opened")["limit"] == WINDOW
        for _ in range(WINDOW // (64 * KIB)):
            uploader.send_binary(bytes(64 * KIB))
        user.send_open(client="b")
        channel = client.recv_control("open")["channel"]
        client.send_opened(channel)
        user.recv_control("opened")
        for _ in range(50):
            begun = time.monotonic()
            user.send_binary(b"key")
            assert client.recv_on() == (channel, b"key")
            assert time.monotonic() - begun < 0.5
        # The uploader's ack and end still find their way out, too.
        uploader.send_control({"type": "reset", "code": "user_gone", "message": ""})
        server.wait_for_line("tunnel closed reason=user_gone")


def test_keystroke_overtakes_when_another_tunnel_downloads(server: Server) -> None:
    """Rule 5: on a client's leg channels take turns, one message each."""
    with RawClient(server.url) as client, ExitStack() as stack:
        # Else the kernel may take all of it, and nothing is left to overtake.
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        bulk = stack.enter_context(RawUser(server.url))
        typing = stack.enter_context(RawUser(server.url))
        bulk_channel, typing_channel = open_tunnel(client, bulk), open_tunnel(client, typing)
        for _ in range(WINDOW // (64 * KIB)):
            bulk.send_binary(bytes(64 * KIB))
        # All of it waits in the server and the kernel, for the client does not read yet.
        bulk.settle()
        typing.send_binary(b"key")
        typing.send_control({"type": "ack", "delivered": 0, "limit": WINDOW, "eof": False})
        # And so does the key, before the first byte is taken.
        typing.settle()
        before = 0
        while True:
            message = client.recv()
            if message[0] != "binary":
                continue
            if message[1][:4] == typing_channel.to_bytes(4, "big"):
                break
            assert message[1][:4] == bulk_channel.to_bytes(4, "big")
            before += len(message[1])
        # What was in the kernel's buffers already; of our queue only its turn.
        assert before < WINDOW // 2


def test_client_is_reachable_when_it_has_its_answer(server: Server) -> None:
    """A proxy user that comes in the same instant finds it, however busy the machine is."""
    with RawUser(server.url) as waiting:
        waiting.ping()
        for number in range(50):
            with RawClient(server.url) as client, RawUser(server.url) as user:
                user.send_open(tunnel_id=f"{number:032x}")
                assert client.recv_control("open")["tunnel_id"] == f"{number:032x}"


def test_client_is_replaced_at_once_when_its_link_died_without_a_word(server: Server) -> None:
    """The old leg is stuck in a send to nobody, and still gives way, slot and thread."""
    with ExitStack() as stack:
        dead = stack.enter_context(RawClient(server.url))
        user = stack.enter_context(RawUser(server.url))
        open_tunnel(dead, user)
        for _ in range(WINDOW // (64 * KIB)):
            user.send_binary(bytes(64 * KIB))

        begun = time.monotonic()
        new = stack.enter_context(RawClient(server.url))
        assert user.recv_control("detached", 1)["code"] == "client_replaced"
        other = stack.enter_context(RawUser(server.url))
        open_tunnel(new, other)
        assert time.monotonic() - begun < 0.5
        server.wait_for_line("leg down reason=replaced", timeout_s=1)


def test_threads_and_memory_are_flat_when_legs_come_and_go(server: Server) -> None:
    """500 tunnels later the worker has the threads of its idle pool, and no leg's."""
    with RawClient(server.url) as client:
        for number in range(500):
            with RawUser(server.url) as user:
                channel = open_tunnel(client, user)
                user.send_control({"type": "reset", "code": "user_gone", "message": ""})
                assert client.recv_control("reset")["channel"] == channel
            if number == 100:
                before = resident_bytes(server.worker_pid)
        assert resident_bytes(server.worker_pid) - before < 4 * 1024 * KIB
        # The pool's 24, the client's writer, the timer and the main thread.
        eventually(lambda: thread_count(server.worker_pid) <= 24 + 3)
