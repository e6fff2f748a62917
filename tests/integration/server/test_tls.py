"""The server with its own certificate: heads, legs and ends over TLS."""

import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.support.certs import Certs
from tests.support.processes import Server, start_server
from tests.support.raw import CLIENT_PATH, RawClient, RawUser, handshake_status

pytestmark = pytest.mark.debian("openssl")

KIB = 1024
WINDOW = 4096 * KIB


@pytest.fixture(scope="module")
def check_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checking TLS socket writes a line if two threads were inside at once."""
    return tmp_path_factory.mktemp("tls") / "violations"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, certs: Certs, check_file: Path
) -> Iterator[Server]:
    """One server with a certificate and the checking TLS socket in its processes."""
    folder = tmp_path_factory.mktemp("server")
    with start_server(
        folder, threads=8, tls=(certs.cert, certs.key), checking_tls_file=check_file
    ) as running:
        yield running
        assert running.is_running
        assert not check_file.exists(), check_file.read_text()


def test_bytes_are_exact_when_both_directions_are_busy(server: Server, certs: Certs) -> None:
    """32 MiB each way at once: equal digests, and never two threads in one TLS object."""
    size = 32 * 1024 * KIB
    ca = str(certs.ca)
    with RawClient(server.url, ca_file=ca) as client, RawUser(server.url, ca_file=ca) as user:
        user.send_open(limit=2**40)
        channel = client.recv_control("open")["channel"]
        client.send_opened(channel, limit=2**40)
        user.recv_control("opened")
        results: dict[str, bool] = {}
        # One thread a peer: over TLS a test must not read and write at once either.
        ends = [
            threading.Thread(
                target=_exchange, args=(client, channel, size, results, "client"), name="client"
            ),
            threading.Thread(target=_exchange, args=(user, 0, size, results, "user"), name="user"),
        ]
        for end in ends:
            end.start()
        for end in ends:
            end.join()
        assert results == {"client": True, "user": True}


def _exchange(
    peer: RawClient | RawUser, channel: int, size: int, results: dict[str, bool], name: str
) -> None:
    """Send and receive `size` bytes in turns, within half the smallest window of acks."""
    prefix = channel.to_bytes(4, "big") if channel else b""
    sending, expected = Random(name), hashlib.sha256()
    other = Random("user" if name == "client" else "client")
    got = hashlib.sha256()
    sent = received = acked = delivered = 0
    while sent < size or received < size or delivered < size:
        while sent < size and sent - delivered < 1024 * KIB:
            peer.send_binary(prefix + sending.randbytes(32 * KIB))
            sent += 32 * KIB
        message = peer.recv(20)
        if message[0] == "binary":
            data = message[1][len(prefix) :]
            got.update(data)
            # Messages may be merged on the way; the generator gives the same bytes in any cut.
            expected.update(other.randbytes(len(data)))
            received += len(data)
            if received - acked >= 256 * KIB or received == size:
                control = {"type": "ack", "delivered": received, "limit": 2**40, "eof": False}
                peer.send_control(control | ({"channel": channel} if channel else {}))
                acked = received
        elif message[0] == "text" and message[1]["type"] == "ack":
            delivered = message[1]["delivered"]
        else:
            return
    results[name] = got.digest() == expected.digest()


def test_frames_stay_whole_when_pings_come_while_a_send_is_stuck(
    server: Server, certs: Certs
) -> None:
    """As over plain TCP; a stopped TLS write goes on with the very same bytes."""
    ca = str(certs.ca)
    payload = Random(3).randbytes(WINDOW)
    with RawClient(server.url, ca_file=ca) as client, RawUser(server.url, ca_file=ca) as user:
        user.send_open(limit=WINDOW)
        channel = client.recv_control("open")["channel"]
        client.send_opened(channel)
        user.recv_control("opened")
        for at in range(0, WINDOW, 64 * KIB):
            client.send_on(channel, payload[at : at + 64 * KIB])
        for _ in range(200):
            user.ping(b"x")
        got = b"".join(user.recv_binary() for _ in range(WINDOW // (64 * KIB)))
        assert got == payload
        assert user.pongs_seen >= 1


def test_refusal_and_health_come_over_tls(server: Server, certs: Certs) -> None:
    """Answers before the upgrade are whole."""
    answer = handshake_status(server.url + CLIENT_PATH, ca_file=str(certs.ca))
    assert (answer.status, answer.json["code"]) == (401, "unauthorized")
    assert server.health() == 200


def test_health_answers_when_peers_stall_in_the_handshake(server: Server, certs: Certs) -> None:
    """Half a ClientHello, plain HTTP, or a handshake without a head take no thread."""
    socks = []
    try:
        for number in range(60):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            socks.append(sock)
            if number % 3 == 0:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            elif number % 3 == 1:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        context = ssl.create_default_context(cafile=str(certs.ca))
        shaken = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        socks.append(context.wrap_socket(shaken, server_hostname="127.0.0.1"))
        for _ in range(5):
            assert server.health(timeout_s=1) == 200
    finally:
        for sock in socks:
            sock.close()


def test_legs_close_with_1012_when_the_server_stops(tmp_path: Path, certs: Certs) -> None:
    """The drain over TLS: the close frame arrives, the process is gone in 2 s."""
    ca = str(certs.ca)
    with (
        start_server(tmp_path, threads=8, tls=(certs.cert, certs.key)) as server,
        RawClient(server.url, ca_file=ca) as client,
        RawUser(server.url, ca_file=ca) as stuck,
    ):
        stuck.send_open(limit=WINDOW)
        channel = client.recv_control("open")["channel"]
        client.send_opened(channel)
        for _ in range(WINDOW // (64 * KIB)):
            client.send_on(channel, bytes(64 * KIB))
        begun = time.monotonic()
        server.terminate()
        client.recv_control("going_away")
        assert client.recv_close(1)[0] == 1012
        assert server.wait(2) == 0
        assert time.monotonic() - begun < 2
