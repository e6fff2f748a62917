"""Peers that stall, trickle, or stay after their answer: no other peer may notice."""

import contextlib
import errno
import random
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import CLIENT_NAME, running_relay, thread_count
from tests.support.raw import RawUser, upgrade_request
from tests.support.settings import LONG, setting
from tests.support.targets import EchoTarget

PEERS = setting("PEERS", 200)
SECONDS = setting("SECONDS", 60)
SEED = setting("SEED", 0)
SLOWEST_S = 1.0
pytestmark = LONG
# One byte of a request's head this often, for ever.
_TRICKLE_S = 0.2
# Between two looks at the server.
_LOOK_S = 0.1

KINDS = ("stall", "half head", "trickle", "takes 404", "takes 401", "reads nothing")


@dataclass(eq=False)
class Peer:
    """One bad peer."""

    kind: str
    sock: socket.socket
    rest: bytes = b""
    next_at: float = float("inf")


@dataclass
class BadPeers:
    """Keeps so many bad peers at a port: one thread, from start to stop."""

    port: int
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    begun: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._peers: set[Peer] = set()
        self.thread = threading.Thread(target=self._run, name="bad-peers")

    def _run(self) -> None:
        try:
            for number in range(PEERS):
                self._begin(KINDS[number % len(KINDS)])
            while not self._stop.is_set():
                for key, _ in self._selector.select(0.02):
                    self._read(key.data)
                now = time.monotonic()
                for peer in [each for each in self._peers if each.next_at <= now]:
                    self._trickle(peer, now)
        finally:
            for peer in self._peers:
                peer.sock.close()
            self._selector.close()

    def _begin(self, kind: str) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        code = sock.connect_ex(("127.0.0.1", self.port))
        assert code in (0, errno.EINPROGRESS), errno.errorcode[code]
        url = f"ws://127.0.0.1:{self.port}"
        wrong = {"Authorization": "Bearer wrong"}
        request = {
            "stall": b"",
            "half head": b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
            "trickle": b"GET /healthz HTTP/1.1\r\n",
            "takes 404": b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
            "takes 401": upgrade_request(f"{url}/ws_for_ssh_proxy_command", wrong),
            "reads nothing": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        }[kind]
        peer = Peer(kind, sock)
        self.begun[kind] += 1
        self._peers.add(peer)
        # Not blocking: the connection stands, or its bytes wait for the first look.
        with contextlib.suppress(BlockingIOError):
            sock.send(request)
            request = b""
        peer.rest = request
        if kind == "trickle" or request:
            peer.next_at = time.monotonic() + self.rng.uniform(0, _TRICKLE_S)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _trickle(self, peer: Peer, now: float) -> None:
        peer.next_at = now + _TRICKLE_S if peer.kind == "trickle" else float("inf")
        try:
            peer.sock.send(peer.rest or b"x")
            peer.rest = b""
        except BlockingIOError:
            peer.next_at = now + _TRICKLE_S
        except OSError:
            self._replace(peer)

    def _read(self, peer: Peer) -> None:
        try:
            if peer.sock.recv(65536):
                return  # The answer: taken, and nothing is closed.
        except BlockingIOError:
            return
        except OSError:
            pass
        self._replace(peer)

    def _replace(self, peer: Peer) -> None:
        self.dropped[peer.kind] += 1
        self._selector.unregister(peer.sock)
        self._peers.discard(peer)
        peer.sock.close()
        self._begin(peer.kind)

    def stop(self) -> None:
        self._stop.set()
        self.thread.join()


@contextmanager
def bad_peers(port: int) -> Iterator[BadPeers]:
    peers = BadPeers(port)
    peers.thread.start()
    try:
        yield peers
    finally:
        peers.stop()


def test_relay_answers_in_time_when_bad_peers_come_and_stay(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """/healthz and a new tunnel answer within a second, all the time."""
    with running_relay(tmp_path, threads=16) as relay, EchoTarget() as target:
        worker = relay.server.worker_pid
        with bad_peers(relay.server.port) as peers:
            health_s: list[float] = []
            tunnel_s: list[float] = []
            end = time.monotonic() + SECONDS
            pause = threading.Event()
            while time.monotonic() < end:
                asked_at = time.monotonic()
                assert relay.server.health(timeout_s=5) == 200
                health_s.append(time.monotonic() - asked_at)
                asked_at = time.monotonic()
                with RawUser(relay.url) as user:
                    user.send_open(
                        client=CLIENT_NAME,
                        port=target.port,
                        tunnel_id=f"{len(tunnel_s) + 1:032x}",
                    )
                    user.recv_control("opened")
                    user.send_binary(b"x")
                    assert user.recv_binary() == b"x"
                tunnel_s.append(time.monotonic() - asked_at)
                assert max(health_s[-1], tunnel_s[-1]) < SLOWEST_S
                pause.wait(_LOOK_S)
            assert peers.thread.is_alive()
            threads = thread_count(worker)
        figure(
            f"{PEERS} bad peers for {SECONDS} s, seed {SEED}: {len(health_s)} health checks,"
            f" worst {max(health_s) * 1e3:.0f} ms; {len(tunnel_s)} tunnels,"
            f" worst {max(tunnel_s) * 1e3:.0f} ms; {threads} threads;"
            f" dropped {dict(peers.dropped)}"
        )
        # Every kind was dropped by the server at some time, so that it costs nobody a place.
        if SECONDS > 20:
            assert set(peers.dropped) == set(KINDS)
        # The relay's clients did not notice either.
        assert relay.client.text.count("registered") == 1
