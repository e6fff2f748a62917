"""What the end-to-end tests share: reports of failures show the logs of the fixtures' programs."""

from collections.abc import Generator

import pytest

from tests.support import processes
from tests.support.processes import Proc

_LINES_SHOWN = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The harness shows what a test itself started; this adds its fixtures' programs."""
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
