"""The states that docs/architecture.md draws are those of the code."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from http_network_relay.end.state import END_TRANSITIONS, EndState
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
# The heading of each machine on the page -> its states, and its table of transitions.
MACHINES: dict[str, tuple[type[enum.Enum], Mapping[Any, Sequence[Any]]]] = {
    "One end of a tunnel": (EndState, END_TRANSITIONS),
}


def drawn(heading: str) -> list[tuple[str, str]]:
    """The arrows below a heading."""
    text = PAGE.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"(?m)^([A-Z_]+) +--> ([A-Z_]+)\b", text)


@pytest.mark.parametrize("heading", MACHINES)
def test_page_draws_each_transition_of_the_table_once(heading: str) -> None:
    """No arrow is missing, and none is drawn that the code forbids."""
    _, table = MACHINES[heading]
    listed = [(state.name, after.name) for state, others in table.items() for after in others]
    assert sorted(drawn(heading)) == sorted(listed)


@pytest.mark.parametrize("heading", MACHINES)
def test_every_state_has_a_row_in_the_table(heading: str) -> None:
    """A state without a way out has an empty row."""
    states, table = MACHINES[heading]
    assert set(table) == set(states)
