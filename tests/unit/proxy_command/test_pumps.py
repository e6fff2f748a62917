"""The two pumps over real pipes: stdin up, stdout down, and the user who goes away."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from http_network_relay.end.channel import Channel
from http_network_relay.end.stream import Position
from http_network_relay.end.user_end import UserEnd
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.proxy_command import pumps, stdio, wakeup
from http_network_relay.proxy_command.pumps import Pumps
from http_network_relay.proxy_command.stdio import QuickStdout
from http_network_relay.proxy_command.wakeup import Wakeup
from http_network_relay.wire.constants import MIN_WINDOW_BYTES, OP_BINARY
from http_network_relay.wire.controls import Ack
from http_network_relay.wire.errors import RelayError
from tests.support.processes import ROOT, child_environment
from tests.support.taking import take
from tests.support.waiting import eventually

LOST = RelayError("leg_lost", "lost")
WINDOW = MIN_WINDOW_BYTES
# Linux's numbers, for which Python 3.9 has no names.
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032


class Desk:
    """Pumps on two pipes of the test's, the leg's frames collected by a thread."""

    def __init__(
        self, *, limit: int = WINDOW, grace_s: float = 0, stdout: int | None = None
    ) -> None:
        self.stdin_r, self.stdin_w = os.pipe()
        self.stdout_r, self.stdout_w = os.pipe()
        self.frame_sender = FrameSender()
        self.wakeup = Wakeup()
        self.channel = Channel(self.frame_sender)
        self.end = UserEnd(self.channel, WINDOW, self.wakeup.wake)
        fd = self.stdout_w if stdout is None else stdout
        self.pumps = Pumps(self.end, self.wakeup, self.stdin_r, fd)
        self.end.on_open(limit, grace_s)
        # Guards what was sent; woken at each frame.
        self._changed = threading.Condition()
        self.up = bytearray()
        self.controls: list[dict[str, Any]] = []
        self._taker = threading.Thread(target=self._take)

    def start(self) -> None:
        self._taker.start()
        self.pumps.start()

    def _take(self) -> None:
        while (frame := take(self.frame_sender)) is not None:
            with self._changed:
                if frame.opcode == OP_BINARY:
                    # Behind an end nothing may come.
                    assert not any(each["type"] == "reset" for each in self.controls)
                    self.up += frame.payload
                else:
                    self.controls.append(json.loads(frame.payload))
                self._changed.notify_all()

    def wait(self, predicate: Callable[[], Any], timeout_s: float = 5.0) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, timeout_s), (bytes(self.up), self.controls)

    def kinds(self) -> list[str]:
        with self._changed:
            return [control["type"] for control in self.controls]

    def close(self, *fds: int) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def end_all(self) -> None:
        self.end.on_end(LOST)
        self.close(self.stdin_w)
        # A pump that is stuck in stdout: take what it writes.
        poll = select.poll()
        with contextlib.suppress(OSError):
            poll.register(self.stdout_r, select.POLLIN)
            while self.pumps._down.is_alive():
                if dict(poll.poll(5)).get(self.stdout_r, 0) & select.POLLIN:
                    os.read(self.stdout_r, 65536)
        self.pumps.join(5.0)
        self.frame_sender.stop()
        self._taker.join()
        self.close(self.stdin_r, self.stdout_r, self.stdout_w)
        self.close(self.wakeup.reader, self.wakeup._writer)


@pytest.fixture
def make_desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    """Desks whose pipes are stdin and stdout."""
    desks: list[Desk] = []

    def make(*, starts: bool = True, **options: Any) -> Desk:
        desk = Desk(**options)
        # These tests fill stdout: with so little as it has.
        monkeypatch.setattr(stdio, "PIPE_BYTES", 0)
        if starts:
            desk.start()
            desks.append(desk)
        return desk

    yield make
    for desk in desks:
        desk.end_all()


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    """One desk, at work."""
    return make_desk()


def read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        assert piece, f"the end after {len(data)} of {size}"
        data += piece
    return data


# Carrying.


def test_stdin_goes_up_and_its_end_is_an_eof(desk: Desk) -> None:
    """At once, and with its count."""
    os.write(desk.stdin_w, b"abc")
    desk.wait(lambda: desk.up == b"abc")
    desk.close(desk.stdin_w)
    desk.wait(lambda: desk.controls)
    assert desk.controls == [{"type": "eof", "count": 3}]
    # The other direction lives on.
    desk.end.inbound.on_data(desk.channel, b"answer")
    assert read_exactly(desk.stdout_r, 6) == b"answer"


def test_what_came_goes_to_stdout_and_its_end_closes_it(desk: Desk) -> None:
    """The reader sees the end while stdin is still open; then the ack says eof."""
    desk.end.inbound.on_data(desk.channel, b"answer")
    desk.end.inbound.on_eof(desk.channel, 6)
    assert read_exactly(desk.stdout_r, 6) == b"answer"
    assert os.read(desk.stdout_r, 1) == b""
    desk.wait(lambda: desk.controls)
    assert desk.controls[-1]["type"] == "ack"
    assert (desk.controls[-1]["delivered"], desk.controls[-1]["eof"]) == (6, True)
    os.write(desk.stdin_w, b"still up")
    desk.wait(lambda: desk.up == b"still up")
    assert desk.wakeup.exit_code is None


def test_clean_end_ends_both_pumps(desk: Desk) -> None:
    """Both eofs and both acks: nobody is asked for an exit code."""
    desk.close(desk.stdin_w)
    desk.wait(lambda: desk.controls)
    desk.end.inbound.on_eof(desk.channel, 0)
    desk.end.outbound.on_ack(desk.channel, Ack(0, WINDOW, True))
    desk.pumps.join(5.0)
    assert desk.end.is_finished
    assert not desk.pumps._up.is_alive()
    assert not desk.pumps._down.is_alive()
    assert desk.wakeup.exit_code is None


def test_stdin_is_left_alone_without_credit(make_desk: Callable[..., Desk]) -> None:
    """What is not read stays in the pipe, where its writer waits; an ack goes on with it."""
    desk = make_desk(limit=10)
    os.write(desk.stdin_w, b"0123456789abcdef")
    desk.wait(lambda: len(desk.up) == 10)
    poll = select.poll()
    poll.register(desk.stdin_r, select.POLLIN)
    assert poll.poll(0)
    desk.end.outbound.on_ack(desk.channel, Ack(10, 13, False))
    desk.wait(lambda: len(desk.up) == 13)
    desk.end.outbound.on_ack(desk.channel, Ack(13, 100, False))
    desk.wait(lambda: desk.up == b"0123456789abcdef")


def test_stdout_that_somebody_made_non_blocking_is_waited_for(desk: Desk) -> None:
    """ssh shares its pipes; EAGAIN is no error."""
    os.set_blocking(desk.stdout_w, False)
    data = bytes(range(256)) * 1000
    for start in range(0, len(data), 64_000):
        desk.end.inbound.on_data(desk.channel, data[start : start + 64_000])
    assert read_exactly(desk.stdout_r, len(data)) == data
    assert desk.end.ended is None


def test_stuck_stdout_does_not_hold_stdin_up(desk: Desk) -> None:
    """Its reader sleeps; what is typed still goes."""
    desk.end.inbound.on_data(desk.channel, bytes(60_000))
    desk.end.inbound.on_data(desk.channel, bytes(60_000))
    os.write(desk.stdin_w, b"typed")
    desk.wait(lambda: desk.up == b"typed")


def test_ack_says_what_was_written_and_not_what_came(desk: Desk) -> None:
    """Bytes in a queue are not delivered."""
    for _ in range(4):
        desk.end.inbound.on_data(desk.channel, bytes(64 * 1024))
    # A pipe takes 64 KiB; more is not acked before somebody reads.
    desk.wait(lambda: desk.controls)
    assert all(ack["delivered"] <= 2 * 64 * 1024 for ack in desk.controls)
    read_exactly(desk.stdout_r, 4 * 64 * 1024)
    desk.wait(lambda: desk.controls[-1]["delivered"] == 4 * 64 * 1024)


# At once, by the leg's reader.

QUICK_PIPE = pytest.mark.skipif(
    sys.platform != "linux", reason="a second description of a pipe needs /proc"
)


class Stdout:
    """A pipe or a socket as stdout."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "pipe":
            self.reader, self.fd = os.pipe()
        else:
            ours, theirs = socket.socketpair()
            self.reader, self.fd = ours.detach(), theirs.detach()
        self.flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        for fd in (self.reader, self.fd):
            if fd >= 0:
                os.close(fd)


@pytest.fixture(params=[pytest.param("pipe", marks=QUICK_PIPE), "socket"])
def stdout(request: pytest.FixtureRequest) -> Iterator[Stdout]:
    """Each of the two kinds that can be written without waiting."""
    made = Stdout(request.param)
    yield made
    made.close()


def write_quickly(quick: Any, data: bytes) -> int:
    """As the end does: what would have to wait took nothing."""
    try:
        return int(quick.write(data))
    except BlockingIOError:
        return 0


def test_quick_stdout_writes_at_once_and_leaves_the_shared_description_alone(
    stdout: Stdout,
) -> None:
    """Whoever shares it, ssh or a shell, must not meet O_NONBLOCK."""
    quick = QuickStdout(stdout.fd)
    assert quick.write(b"abc") == 3
    assert quick.write(memoryview(b"def")) == 3
    assert read_exactly(stdout.reader, 6) == b"abcdef"
    assert fcntl.fcntl(stdout.fd, fcntl.F_GETFL) == stdout.flags
    assert os.get_blocking(stdout.fd)
    quick.close()
    assert fcntl.fcntl(stdout.fd, fcntl.F_GETFL) == stdout.flags
    os.write(stdout.fd, b"still open")
    assert read_exactly(stdout.reader, 10) == b"still open"


def test_quick_stdout_takes_a_part_and_then_nothing_when_it_is_full(stdout: Stdout) -> None:
    """It never waits for the reader, and goes on when that has read."""
    quick = QuickStdout(stdout.fd)
    block, total = bytes(range(256)) * 4000, 0
    begun = time.monotonic()
    while count := write_quickly(quick, block[total % 256 :]):
        total += count
    assert time.monotonic() - begun < 1.0
    assert total > 0
    assert write_quickly(quick, b"x") == 0
    assert read_exactly(stdout.reader, total) == (bytes(range(256)) * (total // 256 + 1))[:total]
    assert quick.write(b"x") == 1
    quick.close()


def pipe_bytes(fd: int) -> int:
    return fcntl.fcntl(fd, F_GETPIPE_SZ)


@QUICK_PIPE
@pytest.mark.parametrize("before", [64 * 1024, 128 * 1024])
def test_pipe_is_enlarged_as_soon_as_it_was_full(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for what fits: most sessions are a shell. And not a byte is moved by it."""
    made = Stdout("pipe")
    fcntl.fcntl(made.fd, F_SETPIPE_SZ, before)
    quick = QuickStdout(made.fd)
    data = random.Random(5).randbytes(stdio.PIPE_BYTES)
    assert quick.write(data[:before]) == before
    assert pipe_bytes(made.fd) == before
    assert write_quickly(quick, data[before:]) == 0
    assert pipe_bytes(made.fd) == stdio.PIPE_BYTES
    assert quick.write(data[before:]) == len(data) - before
    assert read_exactly(made.reader, len(data)) == data
    quick.close()
    made.close()


@QUICK_PIPE
def test_stdin_is_enlarged_as_soon_as_it_was_full(
    make_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer then need not take turns with us; a shell's stays as it is."""
    desk = make_desk(starts=False)
    monkeypatch.setattr(stdio, "PIPE_BYTES", 1024 * 1024)
    before = pipe_bytes(desk.stdin_r)
    data = random.Random(6).randbytes(1000 + before)
    os.write(desk.stdin_w, data[:1000])
    desk.start()
    try:
        desk.wait(lambda: len(desk.up) == 1000)
        assert pipe_bytes(desk.stdin_r) == before
        # Behind a write that is larger than the pipe stands its rest.
        writing = threading.Thread(target=os.write, args=(desk.stdin_w, data[1000:]))
        writing.start()
        desk.wait(lambda: len(desk.up) == len(data))
        writing.join()
        assert bytes(desk.up) == data
        assert pipe_bytes(desk.stdin_r) == 1024 * 1024
    finally:
        desk.end_all()


@QUICK_PIPE
def test_pipe_that_may_not_be_enlarged_or_is_larger_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel limits what one user has; to shrink it would be rude."""
    # No pipe may have more than 1 << 31 bytes, not even root's.
    for most in ((1 << 31) + 1, 64 * 1024):
        made = Stdout("pipe")
        monkeypatch.setattr(stdio, "PIPE_BYTES", most)
        fcntl.fcntl(made.fd, F_SETPIPE_SZ, 128 * 1024)
        quick = QuickStdout(made.fd)
        assert quick.write(bytes(1 << 20)) == 128 * 1024
        assert pipe_bytes(made.fd) == 128 * 1024
        assert write_quickly(quick, b"x") == 0
        quick.close()
        made.close()


def test_quick_stdout_tells_a_reader_that_has_gone(stdout: Stdout) -> None:
    """EPIPE, and no signal."""
    quick = QuickStdout(stdout.fd)
    stdout.close_reader()
    with pytest.raises(BrokenPipeError):
        quick.write(b"x")
    quick.close()


@QUICK_PIPE
def test_no_quick_stdout_when_a_fifo_has_no_reader(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Opening it anew is refused (ENXIO); the pump finds out as ever."""
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)
    QuickStdout(writer).close()
    os.close(reader)
    with pytest.raises(OSError, match="No such device"):
        QuickStdout(writer)
    os.close(writer)


@pytest.mark.parametrize("kind", ["null", "file", "terminal"])
def test_no_quick_stdout_for_anything_else(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's own description would have its own offset, and overwrite."""
    fds: list[int] = []
    if kind == "terminal":
        fds += os.openpty()
    else:
        path = os.devnull if kind == "null" else tmp_path / "f"
        fds.append(os.open(path, os.O_RDWR | os.O_CREAT))
    with pytest.raises(OSError, match="neither"):
        QuickStdout(fds[-1])
    for fd in fds:
        os.close(fd)


@QUICK_PIPE
def test_what_comes_is_in_stdout_when_the_reader_goes_on(desk: Desk) -> None:
    """Without pump-down."""
    desk.end.inbound.on_data(desk.channel, b"answer")
    assert desk.end.counts[1] == 6
    assert holds(desk.stdout_r)
    assert read_exactly(desk.stdout_r, 6) == b"answer"
    assert os.get_blocking(desk.stdout_w)


def test_order_is_kept_when_stdout_fills_up(desk: Desk) -> None:
    """The reader's part first, then pump-down's, then the reader's again."""
    data = random.Random(3).randbytes(180_000)
    for start in range(0, len(data), 30_000):
        desk.end.inbound.on_data(desk.channel, data[start : start + 30_000])
    assert read_exactly(desk.stdout_r, len(data)) == data
    eventually(lambda: desk.end.counts[1] == len(data))
    eventually(lambda: not desk.end.inbound._consumer_delivers)
    desk.end.inbound.on_data(desk.channel, b"more")
    assert read_exactly(desk.stdout_r, 4) == b"more"


def test_stdout_as_a_file_carries_all_the_same(
    make_desk: Callable[..., Desk], tmp_path: Any
) -> None:
    """By pump-down alone, at the offset that is shared."""
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    desk = make_desk(starts=False, stdout=fd)
    os.write(fd, b"before ")
    desk.start()
    try:
        assert desk.pumps._quick_stdout is None
        desk.end.inbound.on_data(desk.channel, b"answer")
        eventually(lambda: desk.end.counts[1] == 6)
        assert (tmp_path / "out").read_bytes() == b"before answer"
    finally:
        desk.end_all()
        os.close(fd)


SHARES = """
import sys
from http_network_relay.proxy_command.stdio import QuickStdout
quick = QuickStdout(1)
assert quick.write(b"quick") == 5
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", [pytest.param("pipe", marks=QUICK_PIPE), "socket"])
def test_parent_that_shares_fd_1_sees_no_change(kind: str) -> None:
    """The real descriptor, in a process of its own, while that writes."""
    stdout = Stdout(kind)
    command = [sys.executable, "-c", SHARES]
    with subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdin=subprocess.PIPE, stdout=stdout.fd
    ) as process:
        assert read_exactly(stdout.reader, 5) == b"quick"
        assert fcntl.fcntl(stdout.fd, fcntl.F_GETFL) == stdout.flags
        process.communicate(timeout=5)
        assert process.returncode == 0
    stdout.close()


# The user goes away.


def gone(desk: Desk) -> None:
    """The tunnel was reset as it should be, and soon."""
    desk.wait(lambda: any(each["type"] == "reset" for each in desk.controls), 1.0)
    assert desk.controls[-1]["code"] == "user_gone"
    desk.pumps.join(5.0)
    assert not desk.pumps._up.is_alive()


def test_reader_of_an_idle_stdout_that_goes_away_is_noticed(desk: Desk) -> None:
    """Nothing is written, so only POLLERR tells; it counts as SIGPIPE."""
    os.write(desk.stdin_w, b"last")
    desk.wait(lambda: desk.up == b"last")
    os.close(desk.stdout_r)
    gone(desk)
    assert desk.wakeup.exit_code == 141
    assert desk.up == b"last"


def test_reader_that_goes_away_after_the_end_of_stdin_is_noticed(desk: Desk) -> None:
    """Nothing is left to read from stdin, and stdout is still watched."""
    desk.close(desk.stdin_w)
    desk.wait(lambda: desk.controls)
    os.close(desk.stdout_r)
    gone(desk)
    assert desk.wakeup.exit_code == 141


def test_reader_that_goes_away_while_there_is_no_credit_is_noticed(
    make_desk: Callable[..., Desk],
) -> None:
    """A full upload does not make it blind."""
    desk = make_desk(limit=0)
    os.write(desk.stdin_w, b"x")
    os.close(desk.stdout_r)
    gone(desk)
    assert desk.wakeup.exit_code == 141


def test_write_to_a_reader_that_has_gone_counts_as_sigpipe(desk: Desk) -> None:
    """EPIPE, where nothing could be polled."""
    desk.pumps._watches_stdout = False
    desk.wakeup.wake()
    os.close(desk.stdout_r)
    desk.end.inbound.on_data(desk.channel, b"x")
    gone(desk)
    assert desk.wakeup.exit_code == 141


def test_what_stdin_still_holds_is_sent_after_a_signal(make_desk: Callable[..., Desk]) -> None:
    """ssh sends SIGHUP before it closes the pipe: its last words must not be lost."""
    for rounds in range(10):
        desk = make_desk(starts=False)
        data = os.urandom(60_000)
        os.write(desk.stdin_w, data)
        desk.wakeup.leave(129)
        desk.start()
        try:
            gone(desk)
            assert desk.up == data, rounds
            assert desk.wakeup.exit_code == 129
        finally:
            desk.end_all()


def test_eof_of_stdin_after_a_signal_comes_before_the_reset(make_desk: Callable[..., Desk]) -> None:
    """As every ssh session ends."""
    desk = make_desk(starts=False)
    os.write(desk.stdin_w, b"bye")
    desk.close(desk.stdin_w)
    desk.wakeup.leave(129)
    desk.start()
    try:
        gone(desk)
        assert desk.up == b"bye"
        assert desk.kinds() == ["eof", "reset"]
    finally:
        desk.end_all()


def test_what_was_taken_is_sent_after_a_signal_when_a_resume_left_it_without_credit(
    make_desk: Callable[..., Desk],
) -> None:
    """The limit of a new channel may be lower than all that is sent again."""
    desk = make_desk(grace_s=60)
    data = os.urandom(WINDOW)
    sending = threading.Thread(target=os.write, args=(desk.stdin_w, data))
    sending.start()
    desk.wait(lambda: len(desk.up) == WINDOW)
    sending.join()
    desk.end.detach(desk.channel, LOST)
    desk.up.clear()
    desk.channel = Channel(desk.frame_sender)
    desk.end.begin_resume()
    desk.end.on_resumed(desk.channel, Position(0, 0, WINDOW // 2))
    desk.wakeup.leave(143)
    desk.wait(lambda: len(desk.up) == WINDOW // 2)
    assert "reset" not in desk.kinds()
    desk.end.outbound.on_ack(desk.channel, Ack(WINDOW // 2, WINDOW, False))
    gone(desk)
    assert desk.up == data


def test_user_who_goes_away_does_not_wait_for_credit_that_never_comes(
    make_desk: Callable[..., Desk],
) -> None:
    """All of it is over within a second."""
    desk = make_desk(grace_s=60)
    os.write(desk.stdin_w, bytes(1000))
    desk.wait(lambda: len(desk.up) == 1000)
    desk.end.detach(desk.channel, LOST)
    desk.channel = Channel(desk.frame_sender)
    desk.end.begin_resume()
    desk.end.on_resumed(desk.channel, Position(0, 0, 0))
    begun = time.monotonic()
    desk.wakeup.leave(143)
    gone(desk)
    assert time.monotonic() - begun < 0.9


def test_signal_does_not_wait_for_stdin(desk: Desk) -> None:
    """Open and silent: nothing to take."""
    begun = time.monotonic()
    desk.wakeup.leave(143)
    gone(desk)
    assert time.monotonic() - begun < 0.5
    assert desk.wakeup.exit_code == 143


def test_signal_when_both_eofs_are_there_lets_the_tunnel_finish(desk: Desk) -> None:
    """Only the acks are missing: a clean end stays one."""
    desk.close(desk.stdin_w)
    desk.end.inbound.on_eof(desk.channel, 0)
    desk.wait(lambda: len(desk.controls) == 2)
    desk.wakeup.leave(129)
    eventually(lambda: desk.wakeup.exit_code == 129)
    desk.end.outbound.on_ack(desk.channel, Ack(0, WINDOW, True))
    desk.pumps.join(5.0)
    assert desk.end.is_finished
    assert "reset" not in desk.kinds()


def test_first_reason_is_the_exit_code(desk: Desk) -> None:
    """A second signal changes nothing."""
    desk.wakeup.leave(129)
    desk.wakeup.leave(143)
    gone(desk)
    assert desk.wakeup.exit_code == 129


def test_leave_never_waits(desk: Desk) -> None:
    """However often, and from a timer that must not stop."""
    begun = time.monotonic()
    for _ in range(100_000):
        desk.wakeup.wake()
    desk.wakeup.leave(130)
    assert time.monotonic() - begun < 2.0
    gone(desk)


@pytest.mark.parametrize("which", ["stdin", "stdout"])
def test_broken_descriptor_is_an_internal_error(
    make_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A sentence that says which, and no traceback."""
    desk = make_desk(starts=False)
    real_read, real_write = os.read, os.write

    def read(fd: int, size: int) -> bytes:
        if fd == desk.stdin_r:
            raise OSError(5, "Input/output error")
        return real_read(fd, size)

    def write(fd: int, data: Any) -> int:
        if fd == desk.stdout_w:
            raise OSError(28, "No space left on device")
        return real_write(fd, data)

    def write_now(self: Any, data: Any) -> int:
        return write(desk.stdout_w, data)

    monkeypatch.setattr(QuickStdout, "write", write_now)
    monkeypatch.setattr(
        os, "read" if which == "stdin" else "write", read if which == "stdin" else write
    )
    desk.start()
    try:
        if which == "stdin":
            real_write(desk.stdin_w, b"x")
        else:
            desk.end.inbound.on_data(desk.channel, b"x")
        desk.wait(lambda: desk.controls)
        assert desk.controls[-1]["code"] == "internal_error"
        assert which in desk.controls[-1]["message"]
        assert desk.wakeup.exit_code is None
    finally:
        monkeypatch.undo()
        desk.end_all()


# Without a leg.


NOTHING = Position(0, 0, WINDOW)


def lose(desk: Desk) -> None:
    """The leg is lost; what the pumps are told, they have been told."""
    assert desk.end.detach(desk.channel, LOST)
    desk.channel = Channel(desk.frame_sender)


def come_back(desk: Desk, peer: Position = NOTHING) -> Position:
    """Resume on a new link, into the same frame_sender; what the end says of itself."""
    position = desk.end.begin_resume()
    desk.end.on_resumed(desk.channel, peer)
    return position


def holds(fd: int) -> bool:
    """Whether there is something to read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_stdin_is_left_alone_while_there_is_no_leg(make_desk: Callable[..., Desk]) -> None:
    """It waits in the pipe, and goes on when the tunnel is resumed."""
    desk = make_desk(grace_s=60)
    os.write(desk.stdin_w, b"before")
    desk.wait(lambda: desk.up == b"before")
    lose(desk)
    # The pump has looked at what it was woken for, and waits again.
    eventually(lambda: not holds(desk.wakeup.reader))
    os.write(desk.stdin_w, b" meanwhile")
    desk.wakeup.wake()
    eventually(lambda: not holds(desk.wakeup.reader))
    assert desk.end.counts[0] == 6
    assert holds(desk.stdin_r)
    come_back(desk, Position(6, 6, WINDOW))
    desk.wait(lambda: desk.up == b"before meanwhile")


def test_end_of_stdin_without_a_leg_is_told_by_the_next(make_desk: Callable[..., Desk]) -> None:
    """Behind the bytes that are sent again."""
    desk = make_desk(grace_s=60)
    os.write(desk.stdin_w, b"abc")
    desk.wait(lambda: desk.up == b"abc")
    lose(desk)
    desk.close(desk.stdin_w)
    assert desk.kinds() == []
    come_back(desk, Position(1, 1, WINDOW))
    desk.wait(lambda: desk.kinds() == ["eof"])
    assert desk.controls[-1]["count"] == 3
    assert desk.up == b"abcbc"


def test_what_came_goes_to_stdout_without_a_leg(make_desk: Callable[..., Desk]) -> None:
    """And the resume says so; the eof is handed on at once, and acked when it comes again."""
    desk = make_desk(grace_s=60)
    data = os.urandom(200_000)
    for start in range(0, len(data), 50_000):
        desk.end.inbound.on_data(desk.channel, data[start : start + 50_000])
    desk.end.inbound.on_eof(desk.channel, len(data))
    lose(desk)
    assert read_exactly(desk.stdout_r, len(data)) == data
    assert os.read(desk.stdout_r, 1) == b""
    eventually(lambda: desk.end.counts[1] == len(data) and desk.end.stream.into.eof_delivered)
    position = come_back(desk)
    assert (position.received, position.delivered) == (len(data), len(data))
    desk.end.inbound.on_eof(desk.channel, len(data))
    desk.wait(lambda: desk.controls and desk.controls[-1].get("eof"))


@pytest.mark.parametrize("how", ["signal", "stdout", "epipe"])
def test_user_who_goes_away_without_a_leg_ends_the_tunnel_at_once(
    make_desk: Callable[..., Desk], how: str
) -> None:
    """There is nobody to tell, and nobody waits for the grace."""
    desk = make_desk(grace_s=60)
    if how == "epipe":
        desk.pumps._watches_stdout = False
    lose(desk)
    begun = time.monotonic()
    if how == "signal":
        desk.wakeup.leave(129)
    else:
        os.close(desk.stdout_r)
    if how == "epipe":
        desk.end.inbound._queue.append(b"x")  # Came before the loss, and is written now.
        with desk.end.changed:
            desk.end.changed.notify_all()
    desk.pumps.join(5.0)
    assert time.monotonic() - begun < 0.9
    assert desk.end.is_over
    assert desk.end.ended is not None
    assert desk.end.ended.code == "user_gone"
    assert desk.wakeup.exit_code == (129 if how == "signal" else 141)
    assert desk.controls == []


def test_tunnel_that_expires_ends_pump_down(make_desk: Callable[..., Desk]) -> None:
    """Main wakes the other one."""
    desk = make_desk(grace_s=0.05)
    lose(desk)
    desk.pumps._down.join(5.0)
    assert not desk.pumps._down.is_alive()
    assert desk.end.ended is LOST
    desk.wakeup.wake()
    desk.pumps.join(5.0)
    assert not desk.pumps._up.is_alive()


# Where there is no poll.


def test_pumps_carry_without_poll(
    make_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows: a thread in read(), an Event for the rest."""
    desk = make_desk(starts=False, limit=10)
    for module in (pumps, wakeup):
        monkeypatch.setattr(module, "CAN_POLL", False)
    desk.pumps._watches_stdout = False
    desk.start()
    try:
        os.write(desk.stdin_w, b"0123456789more")
        desk.wait(lambda: desk.up == b"0123456789")
        desk.end.outbound.on_ack(desk.channel, Ack(10, 100, False))
        desk.wait(lambda: desk.up == b"0123456789more")
        desk.end.inbound.on_data(desk.channel, b"down")
        assert read_exactly(desk.stdout_r, 4) == b"down"
        desk.close(desk.stdin_w)
        desk.wait(lambda: desk.kinds() == ["eof"])
        desk.wakeup.leave(130)
        gone(desk)
    finally:
        desk.end_all()


# Closing stdout, in a process of its own: the descriptors are the real ones.

CLOSES = """
import os, sys
from http_network_relay.proxy_command.stdio import close_stdout
close_stdout(1)
# Then go on with stdin: the other direction.
sys.exit(0 if os.read(0, 10) == b"go on" else 1)
"""


def child(**streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CLOSES]
    return subprocess.Popen(command, cwd=ROOT, env=child_environment(), **streams)


def test_closing_stdout_closes_a_stderr_that_is_the_same_pipe() -> None:
    """`2>&1`: the reader of the pipe sees the end while the process lives."""
    reader, writer = os.pipe()
    with child(stdin=subprocess.PIPE, stdout=writer, stderr=writer) as process:
        os.close(writer)
        assert os.read(reader, 100) == b""
        assert process.poll() is None
        process.communicate(b"go on", timeout=5)
        assert process.returncode == 0
    os.close(reader)


def test_closing_stdout_leaves_a_stderr_of_its_own() -> None:
    """The last line of an error still has to get out."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with child(**streams) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == b""
        poll = select.poll()
        poll.register(process.stderr, select.POLLIN)
        assert poll.poll(0) == []
        process.communicate(b"go on", timeout=5)
        assert process.returncode == 0


def test_closing_a_stdout_that_is_the_same_socket_as_stdin_ends_one_way() -> None:
    """inetd and socat do so: FIN, and stdin goes on."""
    ours, theirs = socket.socketpair()
    with ours, child(stdin=theirs, stdout=theirs, stderr=theirs) as process:
        theirs.close()
        ours.settimeout(5.0)
        assert ours.recv(100) == b""
        assert process.poll() is None
        ours.sendall(b"go on")
        assert process.wait(5) == 0


@pytest.mark.parametrize("kind", ["null", "file"])
def test_closing_a_stdout_that_is_no_pipe_is_no_error(kind: str, tmp_path: Any) -> None:
    """/dev/null and a file."""
    path = os.devnull if kind == "null" else tmp_path / "out"
    with open(path, "wb") as out, child(stdin=subprocess.PIPE, stdout=out) as process:
        process.communicate(b"go on", timeout=5)
        assert process.returncode == 0
