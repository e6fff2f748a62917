"""The harness's link does to a connection what it says."""

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.link import Link
from tests.support.targets import (
    DuplexTarget,
    EchoTarget,
    RecordingTarget,
    pseudo_random,
    pseudo_random_sha256,
)
from tests.support.waiting import eventually


@contextlib.contextmanager
def connected(link: Link) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", link.port), timeout=5) as sock:
        yield sock


def test_link_delays_each_way_when_told() -> None:
    """An echo takes twice the one-way delay."""
    with EchoTarget() as target, Link(target.port, delay_ms=20) as link, connected(link) as sock:
        started = time.monotonic()
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        assert 0.040 <= time.monotonic() - started < 0.2


def test_link_keeps_every_byte_in_order_when_it_jitters() -> None:
    """Jitter moves bytes in time, never past each other."""
    size = 300_000
    with (
        RecordingTarget() as target,
        Link(target.port, delay_ms=1, jitter_ms=10, seed=7) as link,
        connected(link) as sock,
    ):
        for chunk in pseudo_random(size, "jitter"):
            sock.sendall(chunk)
        sock.shutdown(socket.SHUT_WR)
        conversation = target.conversation()
        assert conversation.wait_ended() == "eof"
        assert conversation.received_sha256 == pseudo_random_sha256(size, "jitter")
        assert link.forwarded[0] == size


def test_link_holds_the_rate_when_set() -> None:
    """250 kB at 10 Mbit/s take 0.2 s."""
    with RecordingTarget() as target, Link(target.port, mbit=10) as link, connected(link) as sock:
        started = time.monotonic()
        sock.sendall(bytes(250_000))
        target.conversation().wait_received(250_000)
        assert 0.19 <= time.monotonic() - started < 0.6


def test_link_forwards_a_half_close_and_lets_go_when_both_ended() -> None:
    """FIN goes through one way at a time."""
    with DuplexTarget(1000) as target, Link(target.port) as link, connected(link) as sock:
        received = b""
        while more := sock.recv(4096):
            received += more
        assert len(received) == 1000
        assert target.conversation().ended is None
        sock.shutdown(socket.SHUT_WR)
        assert target.conversation().wait_ended() == "eof"
        eventually(lambda: link.open_connections == 0)


def test_link_resets_both_sides_when_cut_with_bytes_in_flight() -> None:
    """A cut loses what was inside, and says how much that was."""
    with (
        RecordingTarget() as target,
        Link(target.port, delay_ms=60_000) as link,
        connected(link) as sock,
    ):
        target.conversation().send(b"12345")
        sock.sendall(b"678")
        eventually(lambda: link.in_flight == (3, 5))
        cut = link.cut()
        assert (cut.connections, cut.up_bytes, cut.down_bytes) == (1, 3, 5)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert target.conversation().wait_ended() == "reset"
        assert link.in_flight == (0, 0)


def test_link_refuses_connections_when_it_stays_down() -> None:
    """After cut(stay_down=True) newcomers are reset until restore()."""
    with EchoTarget() as target, Link(target.port) as link:
        link.cut(stay_down=True)
        # Around the connect too: the RST may come before it has returned.
        with pytest.raises(ConnectionResetError), connected(link) as sock:
            sock.recv(1)
        link.restore()
        with connected(link) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_link_is_mute_when_frozen_and_goes_on_when_thawed() -> None:
    """A freeze loses nothing and tells nobody, not even of a FIN."""
    with RecordingTarget() as target, Link(target.port) as link, connected(link) as sock:
        sock.sendall(b"a")
        conversation = target.conversation()
        conversation.wait_received(1)
        link.freeze()
        sock.sendall(b"b")
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(AssertionError):
            conversation.wait_received(2, timeout_s=0.05)
        link.thaw()
        assert conversation.wait_ended() == "eof"
        assert conversation.received == b"ab"


def test_link_serves_newcomers_when_frozen_with_accept_new() -> None:
    """The half-open old connection does not keep the same peer from returning."""
    with EchoTarget() as target, Link(target.port) as link, connected(link) as old:
        old.sendall(b"x")
        assert old.recv(1) == b"x"
        link.freeze(accept_new=True)
        with connected(link) as new:
            new.sendall(b"y")
            assert new.recv(1) == b"y"
        old.settimeout(0.02)
        old.sendall(b"z")
        with pytest.raises(TimeoutError):
            old.recv(1)


def test_link_loses_nothing_when_the_far_side_is_slow() -> None:
    """A full sink stops the source by TCP, not by loss."""
    size = 20_000_000
    with DuplexTarget(size, "down") as target, Link(target.port, delay_ms=1) as link:
        with connected(link) as sock:
            eventually(lambda: link.in_flight[1] > 1_000_000)  # nobody reads yet
            count = 0
            while more := sock.recv(1 << 20):
                count += len(more)
        assert count == size
