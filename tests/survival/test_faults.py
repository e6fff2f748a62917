"""The fault injector of the flaky-link oracle does what its script says, and says when it did."""

import collections
import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.faults import Deck, Event, FaultyLink, Tally
from tests.support.targets import (
    DuplexTarget,
    EchoTarget,
    RecordingTarget,
    pseudo_random,
    pseudo_random_sha256,
)
from tests.support.waiting import eventually

ENDLESS = 1 << 40
RATE = {"delay_ms": 2, "mbit": 200}
# The state of a connection that is over both ways, in Linux' struct tcp_info.
TCP_CLOSE = 7
UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


class Flow:
    """Sends pseudo-random bytes until it fails, and hashes what comes until its end."""

    def __init__(self, port: int, size: int = ENDLESS) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.size = size
        self.received = 0
        self.ended = ""
        self.ended_at = 0.0
        self._send_failed = False
        self._hash = hashlib.sha256()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _send(self) -> None:
        try:
            for chunk in pseudo_random(self.size, "up"):
                self.sock.sendall(chunk)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._send_failed = True

    def _receive(self) -> None:
        try:
            while data := self.sock.recv(65536):
                self.received += len(data)
                self._hash.update(data)
            # The kernel reports an RST once, and may have reported it to the sending thread.
            if self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
                self._threads[0].join()
            self.ended = "reset" if self._send_failed else "eof"
        except TimeoutError:
            self.ended = "silent"
        except OSError:
            self.ended = "reset"
        self.ended_at = time.monotonic()

    def wait(self, timeout_s: float = 5.0) -> str:
        """How the other side ended it."""
        self._threads[1].join(timeout_s)
        return self.ended

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self.sock.close()


@contextlib.contextmanager
def flowing(link: FaultyLink, size: int = ENDLESS) -> Iterator[Flow]:
    with contextlib.closing(Flow(link.port, size)) as flow:
        yield flow


def faulty(port: int, tally: Tally, kind: str, seed: int = 1, **options: Any) -> FaultyLink:
    options = {"new_weights": {"": 1}, "weights": {kind: 1}, **RATE, **options}
    return FaultyLink(port, leg="user", name="link", tally=tally, seed=seed, **options)


def strike(kind: str, *, want_end: str) -> Event:
    """One fault of `kind` in full flow; both sides must see their connection end so."""
    tally = Tally()
    with DuplexTarget(ENDLESS, "down") as target, faulty(target.port, tally, kind) as link:
        with flowing(link) as flow:
            target.conversation().wait_received(10_000)
            link.arm()
            assert flow.wait() == want_end
            eventually(lambda: target.conversation().ended == want_end)
        target.stop()
        eventually(lambda: link.half_open == 0)
    (event,) = tally.last("link")
    assert (tally.hits, tally.count(kind, "user")) == (int(event.is_hit), 1)
    return event


def test_both_sides_are_reset_when_cut() -> None:
    """With bytes inside the link both ways, which makes it a hit."""
    event = strike("cut", want_end="reset")
    assert event.up_in_flight > 0
    assert event.down_in_flight > 0


def test_both_sides_see_a_fin_when_ended_so() -> None:
    """And neither an RST, although bytes were on their way."""
    assert strike("fin", want_end="eof").is_hit


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_one_side_learns_later_when_the_end_is_delayed(seed: int) -> None:
    """By 0.1 to 0.4 s; both learn of it in the end."""
    tally = Tally()
    with (
        DuplexTarget(ENDLESS, "down") as target,
        faulty(target.port, tally, "delayed_end", seed) as link,
        flowing(link) as flow,
    ):
        conversation = target.conversation()
        conversation.wait_received(10_000)
        ends: dict[str, float] = {}

        def note() -> bool:
            if conversation.ended:
                ends.setdefault("far", time.monotonic())
            if flow.ended:
                ends.setdefault("near", flow.ended_at)
            return len(ends) == 2

        link.arm()
        eventually(note)
        assert 0.08 <= abs(ends["far"] - ends["near"]) <= 0.6


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_nobody_learns_of_it_when_half_open(seed: int) -> None:
    """Neither data nor an end arrives, and the sockets are let go when both programs do."""
    tally = Tally()
    with (
        DuplexTarget(ENDLESS, "down") as target,
        faulty(target.port, tally, "half_open", seed, unread_s=0.3) as link,
    ):
        with flowing(link) as flow:
            conversation = target.conversation()
            conversation.wait_received(10_000)
            link.arm()
            eventually(lambda: tally.count("half_open", "user") == 1)
            eventually(lambda: link.half_open == 2)

            def is_quiet() -> bool:
                # What stood in the target's own buffer may still be read.
                came = conversation.received_bytes
                flow.wait(0.2)
                return conversation.received_bytes == came

            eventually(is_quiet)
            assert (flow.ended, conversation.ended) == ("", None)
        conversation.close()
        target.stop()
        eventually(lambda: link.half_open == 0)


@pytest.mark.parametrize("kind", ["stall", "late", "short_reads"])
def test_no_byte_is_lost_when_it_stalls_or_dribbles(kind: str) -> None:
    """The connection goes on, again and again, with every byte in order."""
    size, tally = 1_500_000, Tally()
    with DuplexTarget(size, "down") as target, faulty(target.port, tally, kind) as link:
        with flowing(link, size) as flow:
            link.arm()
            assert flow.wait(20.0) == "eof"
            target.conversation().wait_ended()
        assert (flow.received, flow.sha256) == (size, pseudo_random_sha256(size, "down"))
        assert target.conversation().received_sha256 == pseudo_random_sha256(size, "up")
    assert tally.count(kind, "user") >= 3
    assert tally.hits == 0, "only a lost connection counts"


def test_new_connections_end_early_when_handshakes_are_cut() -> None:
    """Within the bytes of a handshake, at a place that the seed chose."""
    tally, ended_at = Tally(), set()
    with (
        EchoTarget() as target,
        faulty(target.port, tally, "cut", new_weights={"cut_handshake": 1}) as link,
    ):
        link.arm()
        for _ in range(10):
            with flowing(link, 2000) as flow:
                assert flow.wait() in ("eof", "reset")
                ended_at.add(flow.received)
    assert tally.count("cut_handshake", "user") == 10
    assert max(ended_at) <= 300 + 450
    assert len(ended_at) > 1


def test_the_byte_of_the_cut_counts_from_the_upgrade_when_a_resume_is_cut() -> None:
    """The head of the answer always arrives whole."""
    tally = Tally()
    with (
        RecordingTarget() as target,
        faulty(target.port, tally, "cut", new_weights={"cut_resume": 1}) as link,
    ):
        link.arm()
        for number in range(5):
            with socket.create_connection(("127.0.0.1", link.port), timeout=5) as sock:
                conversation = target.conversation(number)
                conversation.send(UPGRADE)
                got = b""
                while not got.endswith(b"\r\n\r\n"):
                    got += sock.recv(100)
                assert got == UPGRADE
                with contextlib.suppress(OSError):
                    while True:
                        sock.sendall(bytes(1000))
                        conversation.send(bytes(1000))
    assert tally.count("cut_resume", "user") == 5


def test_the_script_is_the_same_when_the_seed_is() -> None:
    """Kind, way and place of the faults follow from the seed and the bytes alone."""

    def run(seed: int) -> list[tuple[str, int]]:
        tally = Tally()
        with (
            DuplexTarget(ENDLESS, "down") as target,
            faulty(target.port, tally, "cut", seed, weights={"cut": 1, "fin": 1}) as link,
        ):
            for number in range(4):
                with flowing(link) as flow:
                    if not number:
                        link.arm()
                    else:
                        link.disarm()
                        link.arm()
                    assert flow.wait() in ("eof", "reset")
        return [(event.kind, event.connection) for event in tally.last("link")]

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1


def test_nothing_breaks_when_not_armed() -> None:
    """A test opens its tunnels in peace."""
    tally, size = Tally(), 500_000
    with DuplexTarget(size, "down") as target, faulty(target.port, tally, "cut") as link:
        link.arm()
        link.disarm()
        with flowing(link, size) as flow:
            assert flow.wait() == "eof"
            assert flow.sha256 == pseudo_random_sha256(size, "down")
    assert tally.last("link") == []


def test_every_kind_is_dealt_as_often_as_said_when_a_deck_is_used_up() -> None:
    """In an order of the seed's own."""
    weights = {"a": 3, "b": 1}
    deck = Deck(random.Random(1), weights)
    for _ in range(5):
        assert collections.Counter(deck.deal() for _ in range(4)) == weights
