"""The audit log: never in anybody's way, and honest about what it lost."""

import errno
import json
import os
import re
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server import audit
from server.audit import AuditLog
from server.log_paths import why_not_writable
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer tries again soon."""
    monkeypatch.setattr(audit, "_RETRY_S", 0.02)
    monkeypatch.setattr(audit, "_POLL_S", 0.02)


@contextmanager
def running(path: Path | str, max_waiting: int = 100) -> Iterator[AuditLog]:
    log = AuditLog(str(path), max_waiting=max_waiting)
    log.start()
    try:
        yield log
    finally:
        log.stop()
        log.join(5)


@pytest.mark.parametrize("kind", ["new", "file", "fifo", "read fifo", "/dev/full", "-", "", "link"])
def test_start_is_not_held_up_when_the_log_can_be_written_or_may_be_later(
    tmp_path: Path, kind: str
) -> None:
    """No wait, nothing written, nothing left behind; who reads a FIFO is not told of an end."""
    path = tmp_path / "audit.jsonl"
    if kind == "file":
        path.write_text("old\n")
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind.endswith("fifo"):
        os.mkfifo(path)
    before = list(tmp_path.iterdir())
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if kind == "read fifo" else None
    assert why_not_writable(kind if kind[:1] in ("/", "-", "") else str(path)) is None
    assert list(tmp_path.iterdir()) == before
    if kind == "file":
        assert path.read_text() == "old\n"
    if reader is not None:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        assert poll.poll(0) == []
        os.close(reader)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("is_there", [True, False])
def test_start_is_refused_when_the_system_does_not_let_us_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_there: bool
) -> None:
    """A file of somebody else, a folder of somebody else, a disk that is read-only."""
    path = tmp_path / "audit.jsonl"
    if is_there:
        path.touch()

    def refuse(*_args: Any, **_options: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    assert why_not_writable(str(path)) == os.strerror(number)


def test_start_goes_on_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be made now can be made when there is room."""

    def refuse(*_args: Any, **_options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", refuse)
    assert why_not_writable(str(tmp_path / "audit.jsonl")) is None


def test_start_is_refused_when_the_log_is_no_file(tmp_path: Path) -> None:
    """A folder, a socket, a folder that is not there, one in which nobody makes files."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path, tmp_path / "socket"):
        assert why_not_writable(str(path)) == "not a file"
    for path in (tmp_path / "none" / "audit.jsonl", Path("/proc/audit.jsonl")):
        assert why_not_writable(str(path)) is not None


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_event_is_one_line_with_its_time(tmp_path: Path) -> None:
    """UTC with milliseconds; nobody else may read the file; a name makes no second line."""
    path = tmp_path / "audit.jsonl"
    with running(path) as log:
        log.put("client_up", client="gw\n\u2028", address="203.0.113.7")
    (event,) = events(path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {"event": "client_up", "client": "gw\n\u2028", "address": "203.0.113.7"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_lines_are_appended_when_the_file_is_there(tmp_path: Path) -> None:
    """A line that a crash has cut off spoils no other."""
    path = tmp_path / "audit.jsonl"
    path.write_text('{"event":"old"}\n{"eve')
    with running(path) as log:
        log.put("new")
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"event":"old"}', '{"eve']
    assert json.loads(lines[2])["event"] == "new"


def test_all_that_is_queued_is_written_when_the_server_stops(tmp_path: Path) -> None:
    """stop() behind the last put."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    log.start()
    for number in range(5000):
        log.put("e", number=number)
    log.stop()
    log.join(5)
    assert [event["number"] for event in events(path)] == list(range(5000))


def test_nothing_runs_when_it_is_off(tmp_path: Path) -> None:
    """No thread, no file, no queue."""
    before = threading.enumerate()
    with running("") as log:
        log.put("e")
        assert threading.enumerate() == before
    assert list(tmp_path.iterdir()) == []


def test_new_file_is_used_when_the_old_one_was_rotated_away(tmp_path: Path) -> None:
    """Renamed, or removed: the next line makes the file anew."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    with running(path) as log:
        log.put("first")
        eventually(lambda: path.exists() and path.stat().st_size)
        path.rename(old)
        log.put("second")
        eventually(lambda: path.exists() and path.stat().st_size)
        path.unlink()
        log.put("third")
        eventually(lambda: path.exists() and path.stat().st_size)
    assert [event["event"] for event in events(old)] == ["first"]
    assert [event["event"] for event in events(path)] == ["third"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def quickly(act: Callable[[], object]) -> None:
    begun = time.monotonic()
    act()
    assert time.monotonic() - begun < 1


def put_many(log: AuditLog, count: int) -> None:
    for number in range(count):
        log.put("e", number=number)


def test_nobody_waits_and_losses_are_counted_when_nobody_reads_the_fifo(tmp_path: Path) -> None:
    """From no reader, over one that does not read, to one that does."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with running(path) as log:
        quickly(lambda: put_many(log, 1000))
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(reader, "rb", buffering=0) as fifo:
            data = b""

            def lost_is_told() -> bool:
                nonlocal data
                data += fifo.read(1 << 16) or b""
                return b'"lost"' in data and data.endswith(b"\n")

            eventually(lost_is_told)
            # Now it fills the pipe, and nobody reads on.
            quickly(lambda: put_many(log, 5000))
            quickly(log.stop)
            log.join(5)
            while more := fifo.read(1 << 16):
                data += more
    told = [json.loads(line) for line in data.splitlines()[:-1]]
    (lost,) = [event["count"] for event in told if event["event"] == "lost"][:1]
    numbers = [event["number"] for event in told if event["event"] == "e"]
    # What was written and what was counted is all there was; the second lot begins at 0 again.
    # A line may have found room behind lost ones: the writer takes one out to try it.
    first = numbers[: 1000 - lost]
    assert first[:100] == list(range(100))
    assert first == sorted(set(first))
    assert numbers[1000 - lost] == 0


def test_nobody_waits_when_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, no loop, and the stop does not wait for it."""
    assert tmp_path
    caplog.set_level("WARNING")
    with running("/dev/full") as log:
        quickly(lambda: put_many(log, 1000))
        eventually(lambda: "No space left" in caplog.text)
        begun = time.monotonic()
        log.stop()
        log.join(5)
        assert time.monotonic() - begun < 1
    assert caplog.text.count("cannot be written") == 1
    assert "audit lines lost at the end count=" in caplog.text


def test_lost_lines_are_told_as_soon_as_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full: the count is exact, and each line whole."""
    path, full = tmp_path / "audit.jsonl", threading.Event()
    full.set()
    write = os.write

    def write_a_little(fd: int, data: bytes) -> int:
        return write(fd, data[:7])

    with running(path, max_waiting=10) as log:
        # Short writes are no failure.
        monkeypatch.setattr(os, "write", write_a_little)
        log.put("e", number=-1)
        eventually(lambda: path.exists() and path.read_bytes().endswith(b"\n"))
        monkeypatch.setattr(os, "write", lambda fd, data: _no_space(full, write, fd, data))
        put_many(log, 100)
        full.clear()
        eventually(lambda: '"lost"' in path.read_text())
    told = events(path)
    numbers = [event["number"] for event in told if event["event"] == "e"]
    lost = sum(event["count"] for event in told if event["event"] == "lost")
    assert len(numbers) + lost == 101
    assert 10 <= len(numbers) < 101


def _no_space(
    full: threading.Event, write: Callable[[int, bytes], int], fd: int, data: bytes
) -> int:
    if full.is_set():
        raise OSError(28, "No space left on device")
    return write(fd, data)


def test_nobody_waits_when_the_disk_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that never returns holds the writer alone, and the stop gives it up in time."""
    blocked, release = threading.Event(), threading.Event()
    write = os.write

    def block(fd: int, data: bytes) -> int:
        blocked.set()
        release.wait()
        return write(fd, data)

    monkeypatch.setattr(os, "write", block)
    log = AuditLog(str(tmp_path / "audit.jsonl"), max_waiting=100)
    log.start()
    log.put("e")
    assert blocked.wait(5)
    quickly(lambda: put_many(log, 10_000))
    assert log._queue.qsize() <= 100
    begun = time.monotonic()
    log.stop()
    log.join(0.2)
    assert time.monotonic() - begun < 1
    release.set()
    log.join(5)


def test_no_loss_is_missed_when_threads_race(tmp_path: Path) -> None:
    """Written and lost make the sum, whoever put."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    log = AuditLog(str(path), max_waiting=50)
    log.start()
    threads = [threading.Thread(target=put_many, args=(log, 500)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(reader, "rb", buffering=0) as fifo:
        data = b""

        def all_told() -> bool:
            nonlocal data
            data += fifo.read(1 << 16) or b""
            told = [json.loads(line) for line in data.splitlines()] if data[-1:] == b"\n" else []
            return sum(int(event.get("count", 1)) for event in told) == 3000

        eventually(all_told)
        log.stop()
        log.join(5)
