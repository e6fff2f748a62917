"""Who sends for a leg of the server: the sender, and a writer from when it is needed."""

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
from http_network_relay.wire.codes import CLOSE_NORMAL, CLOSE_RESTART
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from server.access.credentials import Login
from server.legs import leg as leg_module
from server.legs.leg import Helpers, Leg
from server.legs.sender import LegSender
from server.legs.websocket import close_frame
from tests.support.pairs import read_frame, tcp_pair
from tests.support.taking import put_data
from tests.support.waiting import eventually

CLOSE = (OP_CLOSE, close_frame(CLOSE_RESTART).payload)


class OneWay:
    """In place of a Transport: the real sender on a socket; what comes in ends it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.duplex = DuplexSocket(sock)
        self.heard_at = float("inf")

    def start(self, _websocket: object, outbox: FrameSender) -> None:
        outbox.start(self.duplex)

    def receive(self) -> tuple[int, int]:
        return OP_CLOSE, CLOSE_NORMAL if self.duplex.recv(1) else ABNORMAL_CLOSURE

    def finish_sending(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        self.duplex.abort()

    stop = abort


TESTED = Login("client", "tested", b"")


class LegWithoutTunnels(Leg):
    def lost(self) -> None:
        """It has no tunnels."""


class Served:
    """A leg that is served, by its reader and perhaps a sender, and the other end."""

    def __init__(self, sender: LegSender | None) -> None:
        self.near, self.far = tcp_pair()
        self.far.settimeout(10)
        helpers = Helpers(lambda _: None, sender.call if sender is not None else lambda _: None)
        self.leg = LegWithoutTunnels(OneWay(self.near), TESTED, 20.0, helpers)  # type: ignore[arg-type]
        self.outbox = self.leg.outbox
        self._reader = threading.Thread(target=self.leg.run, args=(None,))
        self._reader.start()

    def end(self) -> None:
        """The peer says goodbye; the leg ends."""
        self.far.sendall(b"x")
        self.join()

    def join(self) -> None:
        self._reader.join(10)
        assert not self._reader.is_alive()
        assert writers() == []
        self.near.close()
        self.far.close()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("leg-writer")]


def text(content: str) -> Frame:
    return Frame(OP_TEXT, b"", content.encode())


@pytest.fixture
def sender() -> Iterator[LegSender]:
    made = LegSender()
    made.start()
    yield made
    made.stop()
    made.join(5)


@pytest.fixture
def served(sender: LegSender) -> Iterator[Served]:
    made = Served(sender)
    yield made
    # Nothing is left where the test has failed before its end.
    made.far.close()
    made.join()


def test_no_writer_is_needed_for_what_the_socket_takes(served: Served) -> None:
    """Controls that nobody pushes, a ping of the timer's kind, and the close."""
    served.outbox.put_first(1, text("first"))
    assert read_frame(served.far) == (OP_TEXT, b"first")
    assert served.outbox.try_put_leg("ping", text("ping"))
    assert read_frame(served.far) == (OP_TEXT, b"ping")
    served.leg.end(CLOSE_RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    assert served.far.recv(1) == b""
    assert writers() == []
    served.end()


def test_what_was_put_before_the_leg_is_served_is_sent(sender: LegSender) -> None:
    """Between the upgrade and run() a client can be reached already."""
    near, far = tcp_pair()
    leg = LegWithoutTunnels(OneWay(near), TESTED, 20.0, Helpers(lambda _: None, sender.call))  # type: ignore[arg-type]
    leg.outbox.put_first(1, text("early"))
    leg.outbox.push()
    reader = threading.Thread(target=leg.run, args=(None,))
    reader.start()
    assert read_frame(far) == (OP_TEXT, b"early")
    leg.outbox.close(close_frame(CLOSE_RESTART))
    assert read_frame(far) == CLOSE
    far.close()
    reader.join(5)
    near.close()
    assert writers() == []


def test_writer_comes_when_the_socket_is_full_and_stays(served: Served) -> None:
    """Nothing is lost on the way from one to the other."""
    for number in range(64):
        put_data(served.outbox, 1, b"head", bytes([number]) * 60_000)
    served.outbox.push()
    (writer,) = eventually(writers)
    for number in range(64):
        assert read_frame(served.far) == (OP_BINARY, b"head" + bytes([number]) * 60_000)
    served.outbox.put_first(2, text("by the writer"))
    assert read_frame(served.far) == (OP_TEXT, b"by the writer")
    assert writers() == [writer]
    served.leg.end(CLOSE_RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    served.end()


def test_call_of_a_writer_is_left_to_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender comes late: were it to hear that call, the writer would sleep on."""
    put_data(served.outbox, 1, b"head", bytes(1_000_000))
    served.outbox.push()
    # Not when it runs, but when the sender has left the outbox to it.
    eventually(lambda: served.leg._writer is not None)
    heard: list[str] = []
    monkeypatch.setattr(served.outbox, "push_all", lambda: heard.append("by the sender"))
    served.leg.send_waiting()
    assert heard == []
    assert len(read_frame(served.far)[1]) == 1_000_004
    served.leg.end(CLOSE_RESTART, "server_restart")
    assert read_frame(served.far) == CLOSE
    served.end()


def test_leg_that_ends_before_the_sender_comes_sends_what_waits() -> None:
    """Its reader does, up to the close."""
    served = Served(None)
    served.outbox.put_first(1, text("last words"))
    served.leg.end(CLOSE_RESTART, "server_restart")
    served.far.sendall(b"x")
    assert read_frame(served.far) == (OP_TEXT, b"last words")
    assert read_frame(served.far) == CLOSE
    assert served.far.recv(1) == b""
    served.join()


def test_leg_whose_writer_cannot_start_ends(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine out of threads: that leg is lost, and told in the log."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(leg_module.threading, "Thread", NoThread)
    for _ in range(64):
        put_data(served.outbox, 1, b"head", bytes(60_000))
    served.outbox.push()
    served.join()
    assert served.leg.reason == "internal_error"
    assert "leg has no writer" in caplog.text


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
            put_data(served.outbox, channel, b"ch%d" % channel, b"%04d" % number + bytes(size))
            if kind < 10:
                served.outbox.push()
            elif kind == 10:
                served.outbox.call_writer()
        served.outbox.call_writer()

    putters = [threading.Thread(target=put, args=(channel,)) for channel in range(3)]
    for thread in putters:
        thread.start()
    if draws[0][2] < 0.5:
        for thread in putters:
            thread.join()
    served.leg.end(CLOSE_RESTART, "server_restart")
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
