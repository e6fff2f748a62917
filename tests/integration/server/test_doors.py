"""What happens before a WebSocket: refusals, slots, and peers that only cost."""

import json
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import websocket

from tests.support.processes import CLIENT_SECRET, TOKEN, Server, start_server, thread_count
from tests.support.raw import (
    CLIENT_PATH,
    USER_PATH,
    RawClient,
    RawUser,
    client_headers,
    handshake_status,
    upgrade_request,
    user_headers,
)
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all refusals: none of them may harm it."""
    with start_server(tmp_path_factory.mktemp("server"), threads=8) as running:
        yield running


def ask(server: Server, request: bytes) -> bytes:
    """Send `request` on a new connection and return all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request)
        data = b""
        while more := sock.recv(65536):
            data += more
        return data


U, C = user_headers(), client_headers()
# path, headers beside those of a good upgrade, status, code, a word of the message
REFUSALS = {
    "no token": (USER_PATH, {}, 401, "unauthorized", "token"),
    "wrong token": (USER_PATH, user_headers(secret_of("pu-wrong")), 401, "unauthorized", "token"),
    "a client's secret": (USER_PATH, user_headers(CLIENT_SECRET), 401, "unauthorized", "token"),
    "wrong scheme": (USER_PATH, C, 401, "unauthorized", "token"),
    "no name": (CLIENT_PATH, {**C, "Authorization": ""}, 401, "unauthorized", "name or secret"),
    "wrong secret": (
        CLIENT_PATH,
        client_headers(secret=secret_of("cs-wrong")),
        401,
        "unauthorized",
        "name or",
    ),
    "unknown name": (CLIENT_PATH, client_headers(name="x"), 401, "unauthorized", "name or"),
    "not base64": (CLIENT_PATH, {**C, "Authorization": "Basic %"}, 401, "unauthorized", "name"),
    "no instance": (CLIENT_PATH, {**C, "HTTP-Network-Relay-Instance": ""}, 400, "bad_request", "-"),
    "odd instance": (CLIENT_PATH, client_headers(instance="A" * 32), 400, "bad_request", "hex"),
    "no version": (
        *(USER_PATH, {**U, "Sec-WebSocket-Protocol": ""}),
        *(426, "version_unsupported", "upgrade the proxy command"),
    ),
    "older version": (
        *(CLIENT_PATH, {**C, "Sec-WebSocket-Protocol": "http-network-relay.v0"}),
        *(426, "version_unsupported", "upgrade the client"),
    ),
    "newer version": (
        *(CLIENT_PATH, {**C, "Sec-WebSocket-Protocol": "http-network-relay.v2"}),
        *(426, "version_unsupported", "upgrade the relay"),
    ),
    "no upgrade": (USER_PATH, {**U, "Upgrade": ""}, 400, "bad_request", "upgrade"),
    "no connection": (USER_PATH, {**U, "Connection": "close"}, 400, "bad_request", "upgrade"),
    "no key": (USER_PATH, {**U, "Sec-WebSocket-Key": ""}, 400, "bad_request", "upgrade"),
    "short key": (USER_PATH, {**U, "Sec-WebSocket-Key": "abc"}, 400, "bad_request", "upgrade"),
    "old websocket": (USER_PATH, {**U, "Sec-WebSocket-Version": "8"}, 400, "bad_request", "13"),
    "unknown path": ("/nothing", U, 404, "not_found", "/healthz"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_upgrade_is_refused_with_code_and_header_when_it_is_wrong(
    server: Server, case: str
) -> None:
    """A true HTTP status, JSON of code and message, and the header that says who answered."""
    path, headers, status, code, word = REFUSALS[case]

    answer = handshake_status(server.url + path, headers)

    assert (answer.status, answer.json["code"]) == (status, code)
    assert set(answer.json) == {"code", "message"}
    assert word in answer.json["message"]
    assert answer.headers["http-network-relay"] == "v1"


def test_refusal_is_the_same_when_name_or_secret_is_wrong(server: Server) -> None:
    """Nobody learns which client names exist."""
    unknown = handshake_status(server.url + CLIENT_PATH, client_headers(name="nobody"))
    wrong = handshake_status(server.url + CLIENT_PATH, client_headers(secret=secret_of("cs-wrong")))
    assert unknown.body == wrong.body
    assert unknown.status == wrong.status


def test_upgrade_chooses_our_version_and_no_extension_when_more_are_offered(
    server: Server,
) -> None:
    """A list of versions is looked through, permessage-deflate is never agreed to."""
    offered = {
        "Sec-WebSocket-Protocol": "http-network-relay.v2, http-network-relay.v1",
        "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
    }

    answer = handshake_status(server.url + USER_PATH, {**U, **offered})

    assert answer.status == 101
    assert answer.headers["sec-websocket-protocol"] == "http-network-relay.v1"
    assert "sec-websocket-extensions" not in answer.headers
    assert answer.headers["http-network-relay"] == "v1"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + TOKEN.encode() + b"\x00\r\n\r\n",
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_request_that_is_no_http_is_answered_or_dropped_at_once(
    server: Server, request_bytes: bytes
) -> None:
    """No thread waits for more of it, and its bytes are in no log line and no answer."""
    begun = time.monotonic()
    answer = ask(server, request_bytes)

    assert time.monotonic() - begun < 1
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    assert not answer or b"HTTP-Network-Relay: v1\r\n" in answer
    assert TOKEN.encode() not in answer
    assert TOKEN not in server.text
    assert server.health() == 200


def test_body_is_ignored_when_a_request_has_one(server: Server) -> None:
    """The answer does not wait for a body that never comes, and is not cut by one that does."""
    head = b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    for request in (head, head + b"x" * 20_000):
        begun = time.monotonic()
        assert ask(server, request).startswith(b"HTTP/1.1 405 ")
        assert time.monotonic() - begun < 1


def test_head_is_dropped_when_it_is_too_large(server: Server) -> None:
    """A head without an end is not collected without a bound."""
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"reset|pipe"):
        ask(server, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1_000_000)
    assert time.monotonic() - begun < 5


def test_relay_answers_503_and_health_when_all_slots_are_taken(tmp_path: Path) -> None:
    """Rule 1: one leg too many is told so within a second; slots come back at once."""
    with ExitStack() as stack:
        full = stack.enter_context(start_server(tmp_path, threads=8))
        client = stack.enter_context(RawClient(full.url))
        users = [stack.enter_context(RawUser(full.url)) for _ in range(7)]

        begun = time.monotonic()
        answer = handshake_status(full.url + USER_PATH, U)
        assert (answer.status, answer.json["code"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) > 0
        assert full.health(timeout_s=1) == 200
        assert time.monotonic() - begun < 1

        # The client takes its own slot over, though nothing is free.
        with RawClient(full.url):
            assert client.recv_close(1)[0] == 4408
            users[0].close()
            users[1].drop()
            begun = time.monotonic()
            for _ in range(2):
                eventually(lambda: stack.enter_context(_try_user(full.url)), 1.0)
            assert time.monotonic() - begun < 0.5


def _try_user(url: str) -> RawUser:
    try:
        return RawUser(url)
    except websocket.WebSocketBadStatusException as exc:
        raise AssertionError(str(exc)) from exc


def test_clients_leave_slots_to_users_when_there_are_many(tmp_path: Path) -> None:
    """Three quarters of the slots at most are the clients'."""
    credentials = {
        "clients": {f"c{n}": secret_of(f"cs-{n}") for n in range(9)},
        "proxy_users": [TOKEN],
    }
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, threads=8, credentials=credentials))
        for number in range(6):
            stack.enter_context(RawClient(server.url, f"c{number}", secret_of(f"cs-{number}")))
        answer = handshake_status(server.url + CLIENT_PATH, client_headers("c6", secret_of("cs-6")))
        assert answer.status == 503
        stack.enter_context(RawUser(server.url))


class _Pest:
    """A peer without any secret that only costs; replaced by another as soon as it is dropped."""

    def __init__(self, port: int, kind: int) -> None:
        self.kind = kind
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.sock.setblocking(False)
        if kind == 2:
            self.sock.send(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n")

    def trickle(self) -> bool:
        """Send a little more (kind 1); False when it was dropped."""
        try:
            if self.kind == 1:
                self.sock.send(b"G")
            return self.kind == 2 or self.sock.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False


def test_health_and_tunnels_answer_when_200_peers_stall(tmp_path: Path) -> None:
    """Rule 1: peers that say nothing, trickle, or take an answer and do not close cost nobody."""
    stop = threading.Event()
    with ExitStack() as stack:
        # As many tunnels a second as there can be: those of one token are limited else.
        no_limit = {"HTTP_NETWORK_RELAY_OPENS_PER_SECOND": "0"}
        server = stack.enter_context(start_server(tmp_path, threads=4, env=no_limit))
        client = stack.enter_context(RawClient(server.url))
        pests = [_Pest(server.port, number % 3) for number in range(200)]

        def keep_up() -> None:
            while not stop.wait(0.05):
                for number, pest in enumerate(pests):
                    if not pest.trickle():
                        pest.sock.close()
                        pests[number] = _Pest(server.port, pest.kind)

        thread = threading.Thread(target=keep_up, name="pests")
        thread.start()
        try:
            worst_s = 0.0
            until = time.monotonic() + 3
            while time.monotonic() < until:
                begun = time.monotonic()
                assert server.health(timeout_s=1) == 200
                with RawUser(server.url) as user:
                    user.send_open()
                    client.send_opened(client.recv_control("open", 1)["channel"])
                    user.recv_control("opened", 1)
                assert client.recv_control("detached", 1)["code"] == "user_lost"
                worst_s = max(worst_s, time.monotonic() - begun)
            assert worst_s < 1
        finally:
            stop.set()
            thread.join()
            for pest in pests:
                pest.sock.close()
        # The pool; main, timer, sender, credentials; a writer for each leg there can be.
        assert thread_count(server.worker_pid) <= (4 + 8) + 4 + 4


def test_oldest_head_gives_way_when_too_many_are_pending(tmp_path: Path) -> None:
    """Accepting never stops for heads that do not come: the oldest is dropped."""
    with start_server(tmp_path, threads=4) as server, ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            for _ in range(600)
        ]
        assert server.health(timeout_s=1) == 200
        assert socks[0].recv(1) == b""
        socks[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert socks[-1].recv(65536).startswith(b"HTTP/1.1 200 ")


def test_health_answers_when_the_open_files_are_used_up(tmp_path: Path) -> None:
    """Pending heads give way before anything else does, and the worker survives."""
    with start_server(tmp_path, threads=4) as server, ExitStack() as stack:
        pid = server.worker_pid
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        assert server.health(timeout_s=2) == 200
        with RawClient(server.url):
            pass
        assert server.worker_pid == pid


def test_head_is_dropped_when_it_takes_longer_than_ten_seconds(tmp_path: Path) -> None:
    """The deadline runs from accept, however steadily the bytes come."""
    with (
        start_server(tmp_path, threads=4) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.settimeout(0.25)
        begun = time.monotonic()
        while True:
            assert time.monotonic() - begun < 12
            try:
                sock.send(b"G")
                if sock.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 9.5 < time.monotonic() - begun < 11


def test_no_secret_is_logged_when_peers_come_and_fail(server: Server) -> None:
    """All that this module did left no secret in the log, nor on a command line."""
    request = upgrade_request(server.url + USER_PATH, {**U, "X": "y" * 9000})
    assert b" 400 " in ask(server, request).split(b"\r\n")[0]
    with RawClient(server.url), RawUser(server.url):
        pass
    server.wait_for_line("leg down .*user=token-")
    for secret in (TOKEN, CLIENT_SECRET, json.dumps(TOKEN)):
        assert secret not in server.text
    assert re.search(r"leg up user=token-[0-9a-f]{8} address=127.0.0.1", server.text)
