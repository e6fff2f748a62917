"""The soak tests measure: what they found is listed at the end of the run."""

from collections.abc import Callable

import pytest

_figures: list[str] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a line for the end of the run."""

    def add(line: str) -> None:
        _figures.append(f"{request.node.name}: {line}")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures")
    for line in _figures:
        terminalreporter.write_line(line)
