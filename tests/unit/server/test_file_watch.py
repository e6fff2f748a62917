"""The watch on the credentials file: every way to change one, and every way to break it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from http_network_relay.wire.errors import ConfigError
from server.access.file_watch import FileWatch


def content(*names: str) -> str:
    return json.dumps({"clients": {name: "x" for name in names}, "proxy_users": []})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the client `a`."""
    found = tmp_path / "credentials.json"
    found.touch(mode=0o600)
    found.write_text(content("a"))
    return found


@pytest.fixture
def watch(path: Path) -> FileWatch:
    """A watch that has loaded it, and found it unchanged once."""
    watch = FileWatch(str(path))
    assert watch.load().has_client("a")
    assert watch.poll() is None
    return watch


def has(watch: FileWatch, name: str) -> bool:
    found = watch.poll()
    return found is not None and found.has_client(name)


def error(watch: FileWatch) -> str | None:
    """The error of the next poll."""
    try:
        assert watch.poll() is None
    except ConfigError as exc:
        return str(exc)
    return None


def test_nothing_is_returned_or_read_when_nothing_changed(
    watch: FileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll of an unchanged file is one stat()."""
    monkeypatch.setattr("server.access.file_watch.read_file", lambda *_args, **_options: 1 / 0)
    assert watch.poll() is None
    assert watch.poll() is None


def test_change_is_returned_once_when_it_is_written_in_place(path: Path, watch: FileWatch) -> None:
    """As an editor, or `>`, does."""
    path.write_text(content("a", "b"))
    assert has(watch, "b")
    assert watch.poll() is None
    assert watch.poll() is None


def test_change_is_seen_when_the_file_is_replaced_by_one_of_its_size_and_time(
    path: Path, watch: FileWatch
) -> None:
    """The inode tells."""
    old = path.stat()
    other = path.with_name("other")
    other.write_text(content("b"))
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(other, path)
    assert path.stat().st_size == old.st_size
    assert has(watch, "b")


def test_change_is_seen_when_it_comes_within_one_tick_of_the_clock(
    path: Path, watch: FileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poll after a change reads again, whatever stat() says."""
    path.write_text(content("b"))
    frozen = os.stat(path)
    monkeypatch.setattr("server.access.file_watch.os.stat", lambda _path: frozen)
    assert has(watch, "b")
    path.write_text(content("c"))
    assert has(watch, "c")


def test_change_between_load_and_the_first_poll_is_seen(path: Path) -> None:
    """Nothing is lost at the start."""
    watch = FileWatch(str(path))
    watch.load()
    path.write_text(content("b"))
    assert has(watch, "b")


def test_change_is_seen_when_a_mounted_volume_turns_its_link(tmp_path: Path) -> None:
    """Kubernetes: credentials.json -> ..data/credentials.json, ..data -> ..2026_1."""
    for version, name in (("..1", "a"), ("..2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "credentials.json").write_text(content(name))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "credentials.json").symlink_to("..data/credentials.json")
    watch = FileWatch(str(tmp_path / "credentials.json"))
    assert watch.load().has_client("a")
    assert watch.poll() is None

    (tmp_path / "..data_tmp").symlink_to("..2")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")

    assert has(watch, "b")


def test_touched_file_is_no_change(path: Path, watch: FileWatch) -> None:
    """Nor is one that is replaced by its copy."""
    os.utime(path, ns=(1, 1))
    assert watch.poll() is None
    path.with_name("copy").write_text(path.read_text())
    os.replace(path.with_name("copy"), path)
    assert watch.poll() is None
    assert watch.poll() is None


def test_file_that_is_half_written_for_a_moment_is_no_error(path: Path, watch: FileWatch) -> None:
    """The next poll finds it whole."""
    path.write_text(content("a", "b")[:20])
    assert error(watch) is None
    path.write_text(content("a", "b"))
    assert has(watch, "b")


def test_file_that_is_missing_for_a_moment_is_no_error(path: Path, watch: FileWatch) -> None:
    """An editor that moves the old one away first; and the same file may come back."""
    away = path.with_name("away")
    path.rename(away)
    assert error(watch) is None
    away.rename(path)
    assert watch.poll() is None
    path.rename(away)
    assert error(watch) is None
    path.write_text(content("b"))
    assert has(watch, "b")


def test_file_that_stays_wrong_is_told_once_for_each_version(path: Path, watch: FileWatch) -> None:
    """The next version is told again; a good one ends it, even if it is the old one."""
    good = path.read_text()
    path.write_text("{")
    errors = [error(watch) for _ in range(5)]
    assert [text is not None for text in errors] == [False, True, False, False, False]
    assert str(path) in str(errors[1])
    path.write_text("[]\n")
    assert [error(watch) is not None for _ in range(4)] == [False, True, False, False]
    path.write_text(good)
    assert has(watch, "a")
    assert watch.poll() is None


def test_file_that_stays_away_is_told_once(path: Path, watch: FileWatch) -> None:
    """And comes back as a change, though its content is the old one."""
    good = path.read_text()
    path.unlink()
    errors = [error(watch) for _ in range(5)]
    assert [text is not None for text in errors] == [False, True, False, False, False]
    assert "no such file" in str(errors[1])
    path.write_text(good)
    assert has(watch, "a")


def test_file_that_turns_into_something_else_is_told(path: Path, watch: FileWatch) -> None:
    """A folder, or a FIFO that nobody writes to: no poll waits."""
    path.unlink()
    path.mkdir()
    assert [error(watch) is not None for _ in range(3)] == [False, True, False]
    path.rmdir()
    os.mkfifo(path)
    assert [error(watch) is not None for _ in range(3)] == [False, True, False]


class Reading:
    """Stands for os.open(): what the system says instead of giving the file, if anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.problem: BaseException | None = None
        self._open = os.open
        monkeypatch.setattr("server.access.file.os.open", self)

    def __call__(self, *args: Any) -> int:
        if self.problem is not None:
            raise self.problem
        return self._open(*args)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """Files can be read until a test says otherwise."""
    return Reading(monkeypatch)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_change_is_returned_when_it_could_not_be_read_for_a_while(
    path: Path, watch: FileWatch, reading: Reading, number: int
) -> None:
    """A revocation must not be lost, though nobody writes again; the log has one line of it."""
    path.write_text(content("b"))
    reading.problem = OSError(number, "not now")
    assert [error(watch) is not None for _ in range(5)] == [False, True, False, False, False]
    reading.problem = None
    assert has(watch, "b")
    assert watch.poll() is None


def test_file_is_returned_when_it_is_read_again_though_it_is_the_old_one(
    path: Path, watch: FileWatch, reading: Reading
) -> None:
    """So the log says that the trouble is over; trouble of one look is not told at all."""
    os.utime(path, ns=(1, 1))
    reading.problem = OSError(errno.EIO, "not now")
    assert [error(watch) is not None for _ in range(3)] == [False, True, False]
    reading.problem = None
    assert has(watch, "a")
    os.utime(path, ns=(2, 2))
    reading.problem = OSError(errno.EIO, "not now")
    assert error(watch) is None
    reading.problem = None
    assert watch.poll() is None
    assert watch.poll() is None


def test_mistake_is_told_once_when_the_file_could_not_be_read_before(
    path: Path, watch: FileWatch, reading: Reading
) -> None:
    """What was read is settled, be it right or wrong."""
    path.write_text("{")
    reading.problem = OSError(errno.EIO, "not now")
    assert [error(watch) is not None for _ in range(3)] == [False, True, False]
    reading.problem = None
    assert "not JSON" in str(error(watch))
    assert [error(watch) for _ in range(3)] == [None] * 3


def test_change_is_returned_when_a_look_was_broken_off(
    path: Path, watch: FileWatch, reading: Reading
) -> None:
    """Whatever it was: nobody has read the file."""
    path.write_text(content("b"))
    reading.problem = MemoryError()
    for _ in range(3):
        with pytest.raises(MemoryError):
            watch.poll()
    reading.problem = None
    assert has(watch, "b")


def test_load_raises_at_once_when_the_file_is_wrong(path: Path) -> None:
    """At the start there is nothing to keep."""
    path.write_text("{")
    with pytest.raises(ConfigError, match="line 1"):
        FileWatch(str(path)).load()
