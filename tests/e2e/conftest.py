"""What the end-to-end tests share: no coverage of programs, and their logs in reports."""

from collections.abc import Generator, Iterator

import pytest

from tests.support import processes
from tests.support.processes import Proc

_LINES_SHOWN = 60


@pytest.fixture(scope="package", autouse=True)
def _programs_not_measured() -> Iterator[None]:
    """Start the programs without coverage, which counts the unit and integration tests alone.

    A measured program also starts late, and these tests measure times.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the output of the fixtures' programs; the harness shows those of the test itself."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            parts = [value] + [
                getattr(value, name, None) for name in ("server", "client", "process")
            ]
            for process in parts:
                if isinstance(process, Proc) and process not in processes.started:
                    text = "\n".join(process.lines[-_LINES_SHOWN:])
                    report.sections.append((repr(process), text))
    return report
