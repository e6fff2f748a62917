"""FrameSender over real sockets: whole frames in the queue's order, whoever sends them."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from tests.support.pairs import Pair, read_frame, tcp_pair, tls_pair
from tests.support.taking import put_data
from tests.support.waiting import eventually

CLOSE = Frame(OP_CLOSE, b"", b"\x03\xe8")
# What one push sends at most.
PUSH_BYTES = 256 * 1024


@pytest.fixture(params=["plain", pytest.param("tls", marks=pytest.mark.debian("openssl"))])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connected pair with small buffers, plain and with TLS."""
    near, far = tcp_pair()
    if request.param == "tls":
        near, far = tls_pair(request.getfixturevalue("certs"), near, far)
    far.settimeout(5.0)
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads switch at nearly every byte code."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def no_key() -> bytes | None:
    return None


class NotingDuplex(DuplexSocket):
    """Notes that it was aborted."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.lost = threading.Event()

    def abort(self) -> None:
        self.lost.set()
        super().abort()


class Leg:
    """A sender and its writer thread over one socket."""

    def __init__(self, sock: Any, make_key: Callable[[], bytes | None] = no_key) -> None:
        self.frame_sender = FrameSender(make_key)
        self.duplex = NotingDuplex(sock)
        self.failures: list[OSError] = []
        self._writer = threading.Thread(target=self._run, name="leg-writer:test")

    @property
    def lost(self) -> threading.Event:
        return self.duplex.lost

    def start(self) -> None:
        self.frame_sender.start(self.duplex)
        self._writer.start()

    def _run(self) -> None:
        try:
            self.frame_sender.run()
        except OSError as exc:
            self.failures.append(exc)

    def join(self) -> None:
        self._writer.join(10.0)
        assert not self._writer.is_alive()

    def stop(self) -> None:
        self.duplex.abort()
        self.frame_sender.stop()
        self.join()


class Pipe:
    """Stands for a Duplex: takes at once what it is allowed to, and notes who sent what."""

    def __init__(self, allowance: int = sys.maxsize) -> None:
        self.allowance = allowance
        self.data = bytearray()
        self.by_writer = bytearray()
        # Called at the begin of each send_now().
        self.inside: Callable[[], None] = lambda: None
        self.aborts = 0

    def send_now(self, header: bytes, payload: Any) -> memoryview | None:
        self.inside()
        whole = header + bytes(payload)
        taken = min(self.allowance, len(whole))
        self.allowance -= taken
        self.data += whole[:taken]
        return memoryview(whole)[taken:] if taken < len(whole) else None

    def send(self, data: memoryview) -> None:
        self.data += data
        self.by_writer += data

    def abort(self) -> None:
        self.aborts += 1


def lone(pipe: Pipe) -> tuple[FrameSender, list[None]]:
    """A sender without a writer thread, and the calls for one."""
    calls: list[None] = []
    frame_sender = FrameSender(call=lambda: calls.append(None))
    frame_sender.start(pipe)  # type: ignore[arg-type]
    # So that the next call is noted.
    assert frame_sender.push_all()
    calls.clear()
    return frame_sender, calls


def text(name: str) -> Frame:
    return Frame(OP_TEXT, b"", name.encode())


def frames(data: bytes | bytearray) -> list[tuple[int, bytes]]:
    """Unmasked frames taken apart: opcode and payload. All must be whole."""
    found, at = [], 0
    while at < len(data):
        size, start = data[at + 1], at + 2
        if size >= 126:
            start += {126: 2, 127: 8}[size]
            size = int.from_bytes(data[at + 2 : start], "big")
        assert data[at] & 0xF0 == 0x80
        assert start + size <= len(data)
        found.append((data[at] & 0xF, bytes(data[start : start + size])))
        at = start + size
    return found


def put(frame_sender: FrameSender, channel: int, data: bytes) -> None:
    put_data(frame_sender, channel, channel.to_bytes(4, "big"), data)


# Many who send.


@pytest.mark.parametrize("masks", [False, True], ids=["unmasked", "masked"])
@pytest.mark.usefixtures("fast_switching")
def test_frames_stay_whole_and_in_order_while_many_push_and_the_peer_reads_slowly(
    pair: Pair, masks: bool
) -> None:
    """Pushers, puts that call the writer, and a reader at work: no frame stands in another."""
    near, far = pair
    keys = iter(range(1, 1 << 20))
    leg = Leg(near, (lambda: next(keys).to_bytes(4, "big")) if masks else no_key)
    sizes = [1, 124, 20_000, 3, 5_000, 125, 70]
    blocks, pushers = 12, 3
    sent = {
        channel: b"".join(
            bytes([channel * 16 + number]) * sizes[(channel + number) % len(sizes)]
            for number in range(blocks)
        )
        for channel in range(1, pushers + 1)
    }
    firsts = [100 + number for number in range(blocks)]

    def push(channel: int) -> None:
        for number in range(blocks):
            size = sizes[(channel + number) % len(sizes)]
            put(leg.frame_sender, channel, bytes([channel * 16 + number]) * size)
            leg.frame_sender.push()

    def call() -> None:
        for channel in firsts:
            leg.frame_sender.put_first(channel, text(str(channel)))

    echoed = threading.Event()
    echo_bytes = 20 * 100

    def read() -> None:
        got = 0
        while got < echo_bytes:
            got += len(leg.duplex.recv(65536))
        echoed.set()

    threads = [threading.Thread(target=push, args=(channel,)) for channel in sent]
    threads += [threading.Thread(target=call), threading.Thread(target=read)]
    leg.start()
    for thread in threads:
        thread.start()
    received = {channel: bytearray() for channel in sent}
    seen: list[int] = []
    echoes = 0
    while len(seen) < blocks or any(len(received[each]) < len(sent[each]) for each in sent):
        opcode, payload = read_frame(far)
        if opcode == OP_BINARY:
            received[int.from_bytes(payload[:4], "big")] += payload[4:]
        else:
            seen.append(int(payload))
        if echoes < 20:
            echoes += 1
            far.sendall(b"e" * 100)
    far.sendall(b"e" * 100 * (20 - echoes))
    assert echoed.wait(5.0)
    for thread in threads:
        thread.join()
    leg.frame_sender.close(CLOSE)
    assert read_frame(far) == (OP_CLOSE, CLOSE.payload)
    assert not leg.lost.is_set()
    leg.stop()
    assert received == sent
    assert seen == firsts
    assert not leg.failures


def note_taken(frame_sender: FrameSender) -> list[Frame]:
    """In which order frames are taken from now on."""
    taken: list[Frame] = []
    real = frame_sender._queue.take

    def take(*, with_close: bool = False) -> Frame | None:
        frame = real(with_close=with_close)
        if frame is not None:
            taken.append(frame)
        return frame

    frame_sender._queue.take = take  # type: ignore[method-assign]
    return taken


@pytest.mark.usefixtures("fast_switching")
def test_order_is_the_outboxs_when_eight_threads_push(pair: Pair) -> None:
    """What is taken first is on the wire first, by whichever thread."""
    near, far = pair
    leg = Leg(near)
    ordered = leg.frame_sender
    taken = note_taken(ordered)
    leg.start()
    count = 12

    def push(channel: int) -> None:
        for number in range(count):
            if number % 4 == 3:
                ordered.put_leg(f"{channel}:{number}", text(f"{channel}:{number}"))
            else:
                put(ordered, channel, b"%d:%d;" % (channel, number))
            ordered.push()

    threads = [threading.Thread(target=push, args=(channel,)) for channel in range(1, 9)]
    for thread in threads:
        thread.start()
    received: list[tuple[int, bytes]] = []

    def read() -> None:
        while not received or received[-1][0] != OP_CLOSE:
            received.append(read_frame(far))

    reader = threading.Thread(target=read)
    reader.start()
    for thread in threads:
        thread.join()
    ordered.close(CLOSE)
    reader.join()
    leg.stop()
    assert received == [(frame.opcode, frame.head + frame.payload) for frame in taken]
    data = b"".join(payload[4:] for opcode, payload in received if opcode == OP_BINARY)
    assert data.count(b";") == 8 * (count - count // 4)


def test_nothing_is_lost_when_a_push_finds_the_lock_taken() -> None:
    """It leaves at once; the one inside looks again after it has let go."""
    pipe = Pipe()
    frame_sender, _calls = lone(pipe)
    put(frame_sender, 1, b"one")
    real = frame_sender._queue.take

    def take(*, with_close: bool = False) -> Frame | None:
        frame = real(with_close=with_close)
        if frame is None and not late:
            # Found nothing more, and has not let go: now another comes.
            late.append(1)
            put(frame_sender, 2, b"two")
            thread = threading.Thread(target=frame_sender.push)
            thread.start()
            thread.join(5.0)
            assert not thread.is_alive()
        return frame

    late: list[int] = []
    frame_sender._queue.take = take  # type: ignore[method-assign]
    frame_sender.push()
    assert late
    assert frames(pipe.data) == [(OP_BINARY, b"\0\0\0\1one"), (OP_BINARY, b"\0\0\0\2two")]
    assert not frame_sender.has_frames
    assert not frame_sender._send_lock.locked()


@pytest.mark.usefixtures("fast_switching")
def test_nothing_is_left_when_all_pushes_have_returned() -> None:
    """Without a writer's help: many threads, again and again."""

    def put_and_push(frame_sender: FrameSender, channel: int) -> None:
        put(frame_sender, channel, b"x")
        frame_sender.push()

    for _ in range(20):
        pipe = Pipe()
        frame_sender, calls = lone(pipe)
        threads = [
            threading.Thread(target=put_and_push, args=(frame_sender, channel))
            for channel in range(1, 5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not frame_sender.has_frames
        assert len(frames(pipe.data)) == 4
        assert not calls


# What the socket does not take.


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9])
def test_rest_of_a_frame_is_the_writers_and_goes_first(taken: int) -> None:
    """Later frames and pushes wait behind it, the fast lane too."""
    pipe = Pipe(allowance=taken)
    frame_sender, calls = lone(pipe)
    put(frame_sender, 1, b"first")
    frame_sender.push()
    assert len(pipe.data) == taken
    assert calls
    put(frame_sender, 2, b"second")
    frame_sender.put_ack(1, text("ack"))
    pipe.allowance = sys.maxsize
    frame_sender.push()
    assert len(pipe.data) == taken, "a push sent before the rest"
    frame_sender.close(CLOSE)
    frame_sender.run()
    assert frames(pipe.data) == [
        (OP_BINARY, b"\0\0\0\1first"),
        (OP_TEXT, b"ack"),
        (OP_BINARY, b"\0\0\0\2second"),
        (OP_CLOSE, CLOSE.payload),
    ]
    assert len(pipe.by_writer) == 11 - taken, "only the rest was waited for"


def test_push_sends_again_after_the_rest_has_gone() -> None:
    """The writer waits then, and whoever puts sends by himself."""
    pipe = Pipe(allowance=4)
    frame_sender, _calls = lone(pipe)
    writer = threading.Thread(target=frame_sender.run)
    put(frame_sender, 1, b"first")
    frame_sender.push()
    pipe.allowance = sys.maxsize
    writer.start()
    eventually(lambda: len(frames(pipe.data)) == 1 if len(pipe.data) == 11 else False)
    eventually(lambda: not frame_sender._send_lock.locked() and frame_sender._rest is None)
    pushed_by: list[str] = []
    pipe.inside = lambda: pushed_by.append(threading.current_thread().name)
    put(frame_sender, 1, b"second")
    frame_sender.push()
    assert pushed_by == [threading.current_thread().name]
    frame_sender.close(CLOSE)
    writer.join(5.0)
    assert [opcode for opcode, _ in frames(pipe.data)] == [OP_BINARY, OP_BINARY, OP_CLOSE]


def test_slow_peer_gets_every_byte_by_the_writer(pair: Pair) -> None:
    """A push returns at once, whatever the peer does."""
    near, far = pair
    leg = Leg(near)
    leg.start()
    block = bytes(range(256)) * 256
    begun = time.monotonic()
    for _ in range(40):
        put(leg.frame_sender, 1, block)
        leg.frame_sender.push()
    assert time.monotonic() - begun < 2.0
    leg.frame_sender.close(CLOSE)
    received = bytearray()
    while (frame := read_frame(far))[0] != OP_CLOSE:
        received += frame[1][4:]
    leg.stop()
    assert received == block * 40


def test_push_hands_over_to_the_writer_after_256_kib() -> None:
    """A thread that pushes has its own work to do."""
    pipe = Pipe()
    frame_sender, calls = lone(pipe)
    for channel in range(1, 11):
        put(frame_sender, channel, bytes(65_536))
    frame_sender.push()
    assert len(frames(pipe.data)) == PUSH_BYTES // 65_536
    assert calls
    assert not frame_sender._send_lock.locked()
    frame_sender.close(CLOSE)
    frame_sender.run()
    assert [opcode for opcode, _ in frames(pipe.data)] == [OP_BINARY] * 10 + [OP_CLOSE]


# Ends.


def test_error_under_a_push_is_told_and_does_not_reach_the_pusher() -> None:
    """The leg's reader finds out; who puts has nothing to do with it."""

    def fail() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    pipe = Pipe()
    pipe.inside = fail
    frame_sender, _ = lone(pipe)
    put(frame_sender, 1, b"x")
    frame_sender.push()
    assert pipe.aborts == 1
    assert not frame_sender._send_lock.locked()


def test_peer_that_has_gone_is_told_by_a_push(pair: Pair) -> None:
    """Over a real socket: within a few sends."""
    near, far = pair
    leg = Leg(near)
    leg.frame_sender.start(leg.duplex)  # Without a writer.
    far.close()

    def is_lost() -> bool:
        put(leg.frame_sender, 1, b"x")
        leg.frame_sender.push()
        return leg.lost.is_set()

    eventually(is_lost)


def test_nobody_sends_after_stop() -> None:
    """The socket is freed then, and its number may be another's."""
    pipe = Pipe()
    frame_sender, _calls = lone(pipe)
    frame_sender.stop()
    put(frame_sender, 1, b"x")
    frame_sender.push()
    assert pipe.data == b""


def test_stop_waits_for_the_one_who_sends() -> None:
    """When it returns nobody is inside."""
    inside, go_on = threading.Event(), threading.Event()
    pipe = Pipe()

    def wait() -> None:
        inside.set()
        assert go_on.wait(5.0)

    pipe.inside = wait
    frame_sender, _calls = lone(pipe)
    put(frame_sender, 1, b"x")
    put(frame_sender, 2, b"y")
    pusher = threading.Thread(target=frame_sender.push)
    pusher.start()
    assert inside.wait(5.0)
    stopper = threading.Thread(target=frame_sender.stop)
    stopper.start()
    stopper.join(0.05)
    assert stopper.is_alive()
    go_on.set()
    stopper.join(5.0)
    pusher.join(5.0)
    size = len(pipe.data)
    frame_sender.push()
    assert len(pipe.data) == size


def test_close_goes_out_by_the_writer_alone_and_behind_everything() -> None:
    """A push leaves it where it is."""
    pipe = Pipe()
    frame_sender, _calls = lone(pipe)
    put(frame_sender, 1, b"last")
    frame_sender.close(CLOSE)
    frame_sender.push()
    assert frames(pipe.data) == [(OP_BINARY, b"\0\0\0\1last")]
    frame_sender.push()
    assert len(frames(pipe.data)) == 1
    frame_sender.run()
    assert frames(pipe.data) == [(OP_BINARY, b"\0\0\0\1last"), (OP_CLOSE, CLOSE.payload)]
    put(frame_sender, 1, b"late")
    frame_sender.push()
    assert len(frames(pipe.data)) == 2


@pytest.mark.usefixtures("fast_switching")
def test_close_is_the_last_frame_while_others_push(pair: Pair) -> None:
    """Whatever was put before it has gone out, and nothing comes behind."""
    near, far = pair
    leg = Leg(near)
    leg.start()
    before = b"x" * 30_000
    put(leg.frame_sender, 9, before)
    closing = threading.Event()

    def push(channel: int) -> None:
        for _ in range(40):
            put(leg.frame_sender, channel, b"d" * 500)
            leg.frame_sender.push()
        closing.set()
        for _ in range(40):
            put(leg.frame_sender, channel, b"d" * 500)
            leg.frame_sender.push()

    threads = [threading.Thread(target=push, args=(channel,)) for channel in (1, 2)]
    received: list[tuple[int, bytes]] = []

    def read() -> None:
        while not received or received[-1][0] != OP_CLOSE:
            received.append(read_frame(far))

    reader = threading.Thread(target=read)
    for thread in [*threads, reader]:
        thread.start()
    assert closing.wait(5.0)
    leg.frame_sender.close(CLOSE)
    for thread in [*threads, reader]:
        thread.join()
    leg.join()
    leg.frame_sender.stop()
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    of_nine = [payload[4:] for _, payload in received if payload[:4] == b"\0\0\0\x09"]
    assert b"".join(of_nine) == before
    sizes = [
        sum(len(payload) - 4 for _, payload in received if payload[:4] == bytes((0, 0, 0, channel)))
        for channel in (1, 2)
    ]
    assert max(sizes) >= 40 * 500


# Keys.


def test_each_frame_has_a_key_of_its_own() -> None:
    """And the payload that was put is left as it was."""
    keys = [b"\1\2\3\4", bytes(4), b"\xff\0\0\0"]
    left = iter(keys)
    pipe = Pipe()
    frame_sender = FrameSender(lambda: next(left))
    frame_sender.start(pipe)  # type: ignore[arg-type]
    mine = bytearray(b"abcdefg")
    for channel in (1, 2, 3):
        frame_sender.put_first(channel, Frame(OP_BINARY, b"head", mine))
    frame_sender.push()
    assert mine == b"abcdefg"
    at = 0
    for key in keys:
        assert pipe.data[at : at + 2] == bytes((0x82, 0x80 | 11))
        assert pipe.data[at + 2 : at + 6] == key
        body = pipe.data[at + 6 : at + 17]
        assert bytes(b ^ key[i % 4] for i, b in enumerate(body)) == b"headabcdefg"
        at += 17
    assert at == len(pipe.data)


class SlowDuplex:
    """Holds the first who sends inside, until it is let go."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.is_inside = threading.Event()
        self.may_leave = threading.Event()

    def send_now(self, _header: bytes, payload: bytes) -> None:
        self.said.append(("begin", bytes(payload)))
        self.is_inside.set()
        assert self.may_leave.wait(5)
        self.said.append(("end", bytes(payload)))


class WatchedLock:
    """A lock that tells when somebody is willing to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_wanted = threading.Event()

    def acquire(self, blocking: bool = True) -> bool:
        if blocking:
            self.is_wanted.set()
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_writer_waits_for_the_end_of_a_frame_that_another_thread_sends() -> None:
    """Rule 4: the lock is held from a frame's first byte to its last."""
    frame_sender, duplex = FrameSender(), SlowDuplex()
    frame_sender.start(duplex)  # type: ignore[arg-type]
    lock = frame_sender._send_lock = WatchedLock()  # type: ignore[assignment]
    writer = threading.Thread(target=frame_sender.run)
    put_data(frame_sender, 1, b"", b"data")
    pusher = threading.Thread(target=frame_sender.push)
    pusher.start()
    assert duplex.is_inside.wait(5)
    frame_sender.put_first(2, text("first"))  # It calls the writer.
    frame_sender.close(CLOSE)
    writer.start()
    assert lock.is_wanted.wait(5)
    assert duplex.said == [("begin", b"data")]
    duplex.may_leave.set()
    for thread in (pusher, writer):
        thread.join(5)
        assert not thread.is_alive()
    payloads = [b"data", text("first").payload, CLOSE.payload]
    assert duplex.said == [(what, payload) for payload in payloads for what in ("begin", "end")]
