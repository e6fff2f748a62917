"""Duplex over real sockets: every byte once, one thread at a time in TLS, abort wakes all."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from http_network_relay.leg.duplex_socket import DuplexSocket, wait_ready
from tests.support.certs import Certs
from tests.support.clock import Clock
from tests.support.pairs import Pair, exactly, tcp_pair, tls_pair
from tests.support.processes import Proc, child_environment
from tests.support.waiting import eventually

# As many bytes as fit no kernel buffer of a socketpair.
LARGE = 8 * 1024 * 1024


@pytest.fixture(params=["plain", pytest.param("tls", marks=pytest.mark.debian("openssl"))])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connected pair, plain and with TLS."""
    near, far = tcp_pair()
    if request.param == "tls":
        near, far = tls_pair(request.getfixturevalue("certs"), near, far)
    far.settimeout(5.0)
    yield near, far
    near.close()
    far.close()


def send_all(duplex: DuplexSocket, header: bytes, payload: Any) -> None:
    """As the leg's writer does: at once what goes, and then the rest."""
    rest = duplex.send_now(header, payload)
    if rest is not None:
        duplex.send(rest)


def test_both_ways_at_once_are_byte_exact(pair: Pair) -> None:
    """A reader and a writer on one socket, megabytes each way."""
    near, far = pair
    duplex = DuplexSocket(near)
    block = bytes(range(256)) * 256
    count = 32
    sums: dict[str, str] = {}

    def write() -> None:
        for _ in range(count):
            send_all(duplex, b"", block)

    def read() -> None:
        digest, got = hashlib.sha256(), 0
        while got < count * len(block):
            data = duplex.recv(256 * 1024)
            assert data
            digest.update(data)
            got += len(data)
        sums["near"] = digest.hexdigest()

    def echo() -> None:
        # Not through two threads: the far end is a plain blocking TLS socket.
        left = count * len(block)
        while left:
            data = far.recv(65536)
            left -= len(data)
            far.sendall(data)

    threads = [threading.Thread(target=each) for each in (write, read, echo)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums["near"] == hashlib.sha256(block * count).hexdigest()


@pytest.mark.parametrize(
    "parts", [(b"", b""), (b"abc", b""), (b"", b"c"), (b"a", bytearray(b"b")), (b"ab", b"c")]
)
def test_parts_are_written_in_order(pair: Pair, parts: tuple[bytes, Any]) -> None:
    """However a frame is cut into its parts, empty ones included; small ones leave no rest."""
    near, far = pair
    duplex = DuplexSocket(near)
    assert duplex.send_now(*parts) is None
    assert duplex.send_now(b"|", memoryview(b"")) is None
    whole = b"".join(parts) + b"|"
    assert exactly(far, len(whole)) == whole


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("header", [b"", b"h" * 10, b"h" * 600_000], ids=len)
def test_parts_of_every_buffer_kind_survive_a_partial_write(
    pair: Pair, header: bytes, kind: Callable[[bytes], Any]
) -> None:
    """What the kernel does not take at once is the rest, from the right byte on."""
    near, far = pair
    duplex = DuplexSocket(near)
    payload = bytes(range(256)) * 20_000
    rest = duplex.send_now(header, kind(payload))
    assert rest is not None
    # Of TLS the kernel may hold a part of the first record; OpenSSL wants all of that again.
    assert 0 < len(rest) < len(header) + len(payload) + isinstance(near, ssl.SSLSocket)
    received: list[bytes] = []
    size = len(header) + len(payload)
    reader = threading.Thread(target=lambda: received.append(exactly(far, size)))
    reader.start()
    duplex.send(rest)
    reader.join()
    assert received == [header + payload]


def test_send_now_never_waits_when_the_kernel_takes_nothing(pair: Pair) -> None:
    """Again and again: what it did not take is the rest, all of it in the end."""
    near, far = pair
    duplex = DuplexSocket(near)
    whole = bytes(range(256)) * 20_000
    begun = time.monotonic()
    before, left = len(whole), duplex.send_now(b"", whole)
    while left is not None and len(left) < before:
        before, left = len(left), duplex.send_now(b"", left)
    assert left is not None
    assert time.monotonic() - begun < 1.0
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(exactly(far, len(whole))))
    reader.start()
    duplex.send(left)
    reader.join()
    assert received == [whole]


def test_recv_into_fills_what_it_is_given(pair: Pair) -> None:
    """At most so much, and 0 at the end of the stream."""
    near, far = pair
    duplex = DuplexSocket(near)
    far.sendall(b"0123456789")
    data = bytearray(b"." * 12)
    with memoryview(data) as view:
        assert duplex.recv_into(view[1:5]) == 4
        at = 5
        while at < 11:
            at += duplex.recv_into(view[at:11])
        assert data == b".0123456789."
        socket.socket.shutdown(far, socket.SHUT_RDWR)
        assert duplex.recv_into(view) == 0


def test_heard_at_moves_when_bytes_come(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer judges silence by it."""
    near, far = pair
    duplex = DuplexSocket(near)
    clock = Clock(duplex.heard_at)
    monkeypatch.setattr("http_network_relay.leg.duplex_socket.time.monotonic", clock)
    clock.advance(100)
    far.sendall(b"x")
    assert duplex.recv(10) == b"x"
    assert duplex.heard_at == clock.now
    clock.advance(100)
    far.sendall(b"y")
    assert duplex.recv_into(memoryview(bytearray(10))) == 1
    assert duplex.heard_at == clock.now


def blocked(thread: threading.Thread, function: str) -> bool:
    """Whether the thread is inside that function of http_network_relay/leg/duplex_socket.py now."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(
            "duplex_socket.py"
        ):
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("what", ["recv", "recv_into", "send"])
def test_abort_wakes_a_thread_that_is_blocked(pair: Pair, what: str) -> None:
    """Plain or TLS, reading or writing: within a second, with an error or the end."""
    near, _ = pair
    duplex = DuplexSocket(near)
    ends: list[Any] = []

    def work() -> None:
        try:
            calls: dict[str, Callable[[], Any]] = {
                "recv": lambda: duplex.recv(10),
                "recv_into": lambda: duplex.recv_into(memoryview(bytearray(10))),
                "send": lambda: duplex.send(memoryview(bytes(LARGE))),
            }
            ends.append(calls[what]())
        except OSError as exc:
            ends.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: blocked(thread, what))
    if what == "send":
        # Until the kernel takes no more, so that it is blocked in a wait, not in a write.
        eventually(lambda: not wait_ready(near, write=True, timeout_s=0.0))
    begun = time.monotonic()
    duplex.abort()
    thread.join(5.0)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 1.0
    # Python 3.13's TLS reports the end without a close_notify as an error.
    assert isinstance(ends[0], OSError) or ends[0] == {"recv": b"", "recv_into": 0}.get(what)


def test_abort_wakes_reader_and_writer_at_once_and_again_does_nothing(pair: Pair) -> None:
    """Both threads of a leg end; abort after abort and after close is harmless."""
    near, _ = pair
    duplex = DuplexSocket(near)

    def swallow(call: Any, *args: Any) -> None:
        with contextlib.suppress(OSError):
            call(*args)

    threads = [
        threading.Thread(target=swallow, args=(duplex.recv, 10)),
        threading.Thread(target=swallow, args=(duplex.send, memoryview(bytes(LARGE)))),
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: blocked(threads[0], "recv") and blocked(threads[1], "send"))
    duplex.abort()
    duplex.abort()
    for thread in threads:
        thread.join(5.0)
        assert not thread.is_alive()
    with pytest.raises(OSError, match=r".*"):
        duplex.send(memoryview(b"x"))
    duplex.close()
    duplex.abort()
    duplex.close()


def test_end_of_the_peer_is_the_end_of_the_stream(pair: Pair) -> None:
    """b"" and no exception, also when the peer did not say goodbye in TLS."""
    near, far = pair
    duplex = DuplexSocket(near)
    far.sendall(b"last")
    socket.socket.shutdown(far, socket.SHUT_RDWR)
    assert duplex.recv(10) == b"last"
    assert duplex.recv(10) == b""


def test_reader_goes_on_while_the_writer_is_stuck(pair: Pair) -> None:
    """A send that waits holds nothing that a read needs."""
    near, far = pair
    duplex = DuplexSocket(near)
    stuck: list[BaseException] = []

    def write() -> None:
        try:
            duplex.send(memoryview(bytes(LARGE)))
        except OSError as exc:
            stuck.append(exc)

    writer = threading.Thread(target=write)
    writer.start()
    eventually(lambda: blocked(writer, "send"))
    for _ in range(20):
        far.sendall(b"ping")
        assert duplex.recv(4) == b"ping"
    assert writer.is_alive()
    duplex.abort()
    writer.join()
    assert stuck


class Recorder:
    """Stands before a TLS socket: what each write offered, and stops every other one."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.offers: list[tuple[bytes, str]] = []

    def send(self, data: Any) -> int:
        offered = bytes(data)
        if len(self.offers) % 2 == 0:
            self.offers.append((offered, "stopped"))
            raise ssl.SSLWantWriteError
        self.offers.append((offered, "taken"))
        sent: int = self._sock.send(data)
        return sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.debian("openssl")
def test_same_bytes_are_offered_again_after_want_write(certs: Certs) -> None:
    """OpenSSL insists: other bytes would end the connection with BAD_LENGTH."""
    near, far = tls_pair(certs, *socket.socketpair())
    far.settimeout(5.0)
    duplex = DuplexSocket(near)
    recorder = Recorder(near)
    duplex._sock = recorder  # type: ignore[assignment]
    sent = bytes(range(256)) * 300
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(exactly(far, len(sent))))
    reader.start()
    with near, far:
        duplex.send(memoryview(sent))
        reader.join()
    assert received == [sent]
    assert len(recorder.offers) > 8
    for (stopped, first), (taken, second) in zip(
        recorder.offers[::2], recorder.offers[1::2], strict=True
    ):
        assert (first, second) == ("stopped", "taken")
        assert stopped == taken
        assert len(taken) <= 16 * 1024


@pytest.mark.debian("openssl")
def test_rest_of_send_now_is_what_openssl_was_offered_last(certs: Certs) -> None:
    """Whoever sends it on, with the same slice."""
    near, far = tls_pair(certs, *socket.socketpair())
    far.settimeout(5.0)
    duplex = DuplexSocket(near)
    recorder = Recorder(near)
    duplex._sock = recorder  # type: ignore[assignment]
    sent = bytes(range(256)) * 300
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(exactly(far, len(sent))))
    reader.start()
    with near, far:
        rest = duplex.send_now(sent[:100], sent[100:])
        assert rest == sent
        duplex.send(rest)
        reader.join()
    assert received == [sent]
    (first, stopped), (second, taken) = recorder.offers[:2]
    assert (stopped, taken) == ("stopped", "taken")
    assert first == second


SHARED = """
import hashlib, socket, ssl, sys, threading
sys.setswitchinterval(1e-6)
from http_network_relay.leg.duplex_socket import DuplexSocket
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain({cert!r}, {key!r})
trusting = ssl.create_default_context(cafile={ca!r})
left, right = socket.socketpair()
for sock in (left, right):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
far = server.wrap_socket(right, server_side=True, do_handshake_on_connect=False)
shaker = threading.Thread(target=far.do_handshake)
shaker.start()
near = trusting.wrap_socket(left, server_hostname="127.0.0.1")
shaker.join()
ends = [DuplexSocket(near), DuplexSocket(far)]
block = bytes(range(256)) * 64
count = 60
sums = []
def write(end):
    for number in range(count):
        rest = end.send_now(b"head", block)
        if rest is not None:
            end.send(rest)
def read(end):
    digest, left = hashlib.sha256(), count * (len(block) + 4)
    while left:
        data = end.recv(5000)
        digest.update(data)
        left -= len(data)
    sums.append(digest.hexdigest())
threads = [threading.Thread(target=job, args=(end,)) for job in (read, write) for end in ends]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sums == [hashlib.sha256((b"head" + block) * count).hexdigest()] * 2, sums
for end in ends:
    end.abort()
    end.close()
print("finished", flush=True)
"""


@pytest.mark.debian("openssl")
def test_no_two_threads_are_ever_inside_one_tls_object(certs: Certs, tmp_path: Path) -> None:
    """Reader and writer at both ends under the checking socket, in a process of its own."""
    code = SHARED.format(cert=str(certs.cert), key=str(certs.key), ca=str(certs.ca))
    check_file = tmp_path / "shared"
    env = child_environment(checking_tls_file=check_file)
    with Proc([sys.executable, "-c", code], env=env) as proc:
        status = proc.wait(20)
        shared = check_file.read_text() if check_file.exists() else ""
        assert (status, shared) == (0, ""), proc.text
        assert "finished" in proc.text
