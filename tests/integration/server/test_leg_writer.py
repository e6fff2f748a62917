"""Who sends for a leg of the server: whoever pushes, and the sender thread for the rest."""

from __future__ import annotations

import random
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from server.access.credentials import Login
from server.legs.leg import Leg
from server.legs.sender import LegSender
from server.legs.timer import Timer
from server.legs.websocket import close_frame
from tests.support.certs import Certs
from tests.support.pairs import read_frame, tcp_pair, tls_pair
from tests.support.taking import put_data
from tests.support.waiting import eventually

LOGIN = Login("user", "tested", b"")
CLOSE = (OP_CLOSE, close_frame(CloseCode.RESTART).payload)


class OneWay:
    """In place of a Transport: the real sender on a socket; what comes in ends it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.duplex = DuplexSocket(sock)
        self.heard_at = float("inf")

    def start(self, _websocket: object, frame_sender: FrameSender) -> None:
        frame_sender.start(self.duplex)

    def receive(self) -> tuple[int, int]:
        return OP_CLOSE, CloseCode.NORMAL if self.duplex.recv(1) else ABNORMAL_CLOSURE

    def abort(self) -> None:
        self.duplex.abort()

    stop = abort

    @property
    def wants_read(self) -> bool:
        return self.duplex.wants_read

    def fileno(self) -> int:
        return self._sock.fileno()


class LegWithoutTunnels(Leg):
    def lost(self) -> None:
        """It has no tunnels."""


def new_leg(sock: socket.socket, sender: LegSender) -> LegWithoutTunnels:
    """A leg whose deadlines nobody watches."""
    return LegWithoutTunnels(OneWay(sock), LOGIN, 20.0, Timer(), sender)  # type: ignore[arg-type]


class Served:
    """A leg that is served, by its reader and a sender, and the other end."""

    def __init__(self, sender: LegSender, certs: Certs | None = None) -> None:
        """With `certs` over TLS."""
        self.near, self.far = tcp_pair()
        if certs is not None:
            self.near, self.far = tls_pair(certs, self.near, self.far)
        self.far.settimeout(10)
        self.leg = new_leg(self.near, sender)
        self.frame_sender = self.leg.frame_sender
        self._reader = threading.Thread(target=self.leg.run, args=(None,))
        self._reader.start()

    def end(self) -> None:
        """The peer says goodbye; the leg ends."""
        self.far.sendall(b"x")
        self.join()

    def join(self) -> None:
        self._reader.join(10)
        assert not self._reader.is_alive()
        self.near.close()
        self.far.close()


def text(content: str) -> Frame:
    return Frame(OP_TEXT, b"", content.encode())


@pytest.fixture
def sender() -> Iterator[LegSender]:
    made = LegSender()
    made.start()
    yield made
    made.stop()
    made.join(5)
    assert not made._thread.is_alive()
    assert [*made._full, *made._ending, *made._later, *made._calls] == []


@pytest.fixture
def served(sender: LegSender) -> Iterator[Served]:
    made = Served(sender)
    yield made
    # Nothing is left where the test has failed before its end.
    made.far.close()
    made.join()


def test_what_nobody_pushes_is_sent(served: Served) -> None:
    """Controls that nobody pushes, a ping of the timer's kind, and the close."""
    served.frame_sender.put_first(1, text("first"))
    assert read_frame(served.far) == (OP_TEXT, b"first")
    assert served.frame_sender.try_put_leg("ping", text("ping"))
    assert read_frame(served.far) == (OP_TEXT, b"ping")
    served.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    assert served.far.recv(1) == b""
    served.end()


def test_what_was_put_before_the_leg_is_served_is_sent(sender: LegSender) -> None:
    """Between the upgrade and run() a client can be reached already."""
    near, far = tcp_pair()
    leg = new_leg(near, sender)
    leg.frame_sender.put_first(1, text("early"))
    leg.frame_sender.push()
    reader = threading.Thread(target=leg.run, args=(None,))
    reader.start()
    assert read_frame(far) == (OP_TEXT, b"early")
    leg.frame_sender.close(close_frame(CloseCode.RESTART))
    assert read_frame(far) == CLOSE
    far.close()
    reader.join(5)
    near.close()


def test_rest_is_sent_when_the_peer_reads(served: Served) -> None:
    """And what is put meanwhile, in order; a push sends again at once after it."""
    for number in range(64):
        put_data(served.frame_sender, 1, b"head", bytes([number]) * 60_000)
    served.frame_sender.push()
    eventually(lambda: served.frame_sender.is_full)
    served.frame_sender.put_first(2, text("overtakes"))
    came = [read_frame(served.far) for _ in range(65)]
    came.remove((OP_TEXT, b"overtakes"))
    assert came == [(OP_BINARY, b"head" + bytes([number]) * 60_000) for number in range(64)]
    served.frame_sender.put_leg("pong", text("pushed"))
    eventually(lambda: not served.frame_sender.is_full)
    served.frame_sender.push()
    assert read_frame(served.far) == (OP_TEXT, b"pushed")
    served.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    served.end()


@pytest.mark.debian("openssl")
def test_rest_is_sent_over_tls(sender: LegSender, certs: Certs) -> None:
    """The same bytes are offered again after WANT_WRITE, else OpenSSL ends the connection."""
    served = Served(sender, certs)
    for number in range(64):
        put_data(served.frame_sender, 1, b"head", bytes([number]) * 60_000)
    served.frame_sender.push()
    eventually(lambda: sender._full)
    for number in range(64):
        assert read_frame(served.far) == (OP_BINARY, b"head" + bytes([number]) * 60_000)
    served.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    served.end()


def test_full_sockets_cost_no_thread_and_delay_nobody(sender: LegSender) -> None:
    """Thirty peers that do not read; another leg is served as if they were not there."""
    before = threading.active_count()
    stuck = [Served(sender) for _ in range(30)]
    other = Served(sender)
    for each in stuck:
        for _ in range(64):
            put_data(each.frame_sender, 1, b"head", bytes(60_000))
        each.frame_sender.push()
    eventually(lambda: len(sender._full) == len(stuck))
    # The readers of the legs alone.
    assert threading.active_count() == before + len(stuck) + 1
    other.frame_sender.put_first(1, text("first"))
    assert read_frame(other.far) == (OP_TEXT, b"first")
    other.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(other.far) == CLOSE
    other.end()
    for each in stuck:
        each.leg.abort("stuck")
        each.join()
    assert not sender._full


def test_long_queue_of_one_leg_lets_others_have_their_turn(sender: LegSender) -> None:
    """The peer reads all the time, so its socket is never full for long."""
    bulk, other = Served(sender), Served(sender)
    blocks = 40
    received: list[int] = []

    def read() -> None:
        while (frame := read_frame(bulk.far)) != CLOSE:
            received.append(len(frame[1]))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(blocks):
        put_data(bulk.frame_sender, 1, b"head", bytes(65_536))
    bulk.frame_sender.call_writer()
    other.frame_sender.put_first(1, text("first"))
    assert read_frame(other.far) == (OP_TEXT, b"first")
    bulk.leg.end(CloseCode.RESTART, "server_restart")
    reader.join(10)
    assert received == [65_540] * blocks
    for each in (bulk, other):
        each.leg.end(CloseCode.RESTART, "server_restart")
        each.end()


def test_leg_that_ends_before_the_sender_comes_sends_what_waits() -> None:
    """Up to the close; its reader waits for that."""
    sender = LegSender()
    served = Served(sender)
    served.frame_sender.put_first(1, text("last words"))
    served.leg.end(CloseCode.RESTART, "server_restart")
    served.far.sendall(b"x")
    sender.start()
    assert read_frame(served.far) == (OP_TEXT, b"last words")
    assert read_frame(served.far) == CLOSE
    assert served.far.recv(1) == b""
    served.join()
    sender.stop()
    sender.join(5)


def test_leg_that_ends_with_a_full_socket_waits_for_the_peer_or_its_deadline(
    sender: LegSender,
) -> None:
    """The descriptor is not given back while the sender thread may write to it."""
    served = Served(sender)
    for _ in range(64):
        put_data(served.frame_sender, 1, b"head", bytes(60_000))
    served.frame_sender.push()
    eventually(lambda: sender._full)
    served.leg.end(CloseCode.RESTART, "server_restart")
    served.far.sendall(b"x")
    served._reader.join(0.1)
    assert served._reader.is_alive()
    served.leg.abort("stuck")
    served.join()
    assert not sender._full


def test_leg_whose_sending_fails_by_a_bug_still_ends(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told in the log, and the sender goes on for the others."""

    def fail() -> bool:
        raise ValueError("broken")

    monkeypatch.setattr(served.frame_sender, "push_all", fail)
    served.end()
    assert "sender failed" in caplog.text


def test_call_that_is_served_after_the_end_touches_no_socket(
    sender: LegSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor may be another's by then."""
    served, other = Served(sender), Served(sender)
    served.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    served.end()
    touched: list[str] = []
    for name in ("send_now", "finish_sending"):
        duplex = served.leg._transport.duplex  # type: ignore[attr-defined]
        monkeypatch.setattr(duplex, name, lambda *_, name=name: touched.append(name))
    sender.call(served.leg)
    other.leg.end(CloseCode.RESTART, "server_restart")
    assert read_frame(other.far) == CLOSE
    other.end()
    assert touched == []


@pytest.mark.parametrize("seed", range(5))
def test_every_frame_comes_once_and_whole_whoever_sends(sender: LegSender, seed: int) -> None:
    """Three threads put, push or leave it to others; the end comes in between."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(20):
            _crowd(Served(sender), random.Random(seed * 100 + number))
    finally:
        sys.setswitchinterval(before)


def _crowd(served: Served, chance: random.Random) -> None:
    draws = [(chance.randrange(20), chance.choice((10, 3000)), chance.random()) for _ in range(60)]

    def put(channel: int) -> None:
        for number, (kind, size, _) in enumerate(draws):
            put_data(
                served.frame_sender, channel, b"ch%d" % channel, b"%04d" % number + bytes(size)
            )
            if kind < 10:
                served.frame_sender.push()
            elif kind == 10:
                served.frame_sender.call_writer()
        served.frame_sender.call_writer()

    putters = [threading.Thread(target=put, args=(channel,)) for channel in range(3)]
    for thread in putters:
        thread.start()
    if draws[0][2] < 0.5:
        for thread in putters:
            thread.join()
    served.leg.end(CloseCode.RESTART, "server_restart")
    came: dict[bytes, bytearray] = {}
    while (frame := read_frame(served.far)) != CLOSE:
        came.setdefault(frame[1][:3], bytearray()).extend(frame[1][3:])
    assert served.far.recv(1) == b""
    for thread in putters:
        thread.join()
    served.end()
    whole = b"".join(b"%04d" % number + bytes(size) for number, (_, size, _) in enumerate(draws))
    for data in came.values():
        assert whole.startswith(data)
    if draws[0][2] < 0.5:
        assert [len(data) for data in came.values()] == [len(whole)] * 3
