"""Rules for every test: it leaves no thread and no process, and each skip is reported."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support import debian, processes
from tests.support.certs import Certs, make_certs
from tests.support.processes import Relay, running_relay
from tests.support.waiting import eventually

# Set by .ci/run, where every package is installed: a skipped test fails the run.
NO_SKIP = os.environ.get("RELAY_TESTS_NO_SKIP") == "1"

# A stopped thread may take a moment to end; a longer time means that nobody joined it.
_THREADS_END_S = 1.0

_NEEDS = "needs "
_skipped: list[pytest.TestReport] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Fail a test that leaves a thread (daemon or not) or a process behind."""
    before = set(threading.enumerate())
    processes.started.clear()
    yield
    left = [process for process in processes.started if process.is_running]
    for process in left:
        process.close()
    assert not left, f"processes left behind: {left}"
    eventually(
        lambda: set(threading.enumerate()) <= before,
        _THREADS_END_S,
        message=f"threads left behind: {sorted(set(threading.enumerate()) - before, key=str)}",
    )


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    """A private CA and a certificate for 127.0.0.1. Mark the test `debian("openssl")`."""
    return make_certs(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """A running server and the client `device`, with the settings of the harness."""
    with running_relay(tmp_path) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        wanted = [name for mark in item.iter_markers("debian") for name in mark.args]
        missing = debian.missing_packages(wanted)
        if missing:
            item.add_marker(pytest.mark.skip(reason=_NEEDS + " ".join(missing)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for process in processes.started:
            report.sections.append((repr(process), "\n".join(process.lines[-100:])))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With several test processes, this also runs in the process that started them.
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if NO_SKIP and _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _skipped:
        return
    reasons = sorted({_reason(report) for report in _skipped})
    line = f"{len(_skipped)} skipped"
    needs = [reason.removeprefix(_NEEDS) for reason in reasons if reason.startswith(_NEEDS)]
    if needs:
        missing = sorted({name for names in needs for name in names.split()})
        line += f"; not installed: {' '.join(missing)} (run `make setup-debian`)"
    others = [reason for reason in reasons if not reason.startswith(_NEEDS)]
    if others:
        line += f"; other reasons: {'; '.join(others)}"
    if NO_SKIP:
        line += "; this run allows none, so it failed"
    terminalreporter.write_line(line, red=NO_SKIP, yellow=not NO_SKIP)


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
