"""The states of the server's tunnels and legs: drawn as they are, and left as they are drawn."""

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from server.legs.user_leg import USER_LEG_TRANSITIONS, UserLegState
from server.tunnels.tunnel import Tunnel
from server.tunnels.tunnel_state import TUNNEL_TRANSITIONS, TunnelState
from tests.support.controls import from_dict
from tests.support.pages import section
from tests.support.processes import ROOT
from tests.support.server.fake_legs import OPEN, FakeClientLeg, FakeUserLeg

Table = Mapping[Any, frozenset[Any]]
# The heading of each drawing -> the states and their table.
DRAWN: dict[str, tuple[type[Enum], Table]] = {
    "### A tunnel at the server": (TunnelState, TUNNEL_TRANSITIONS),
    "### A user leg": (UserLegState, USER_LEG_TRANSITIONS),
}


@pytest.mark.parametrize("heading", DRAWN)
def test_drawing_shows_the_table_of_transitions(heading: str) -> None:
    """Each arrow is a transition in the code, and each transition is an arrow."""
    _, table = DRAWN[heading]
    text = section((ROOT / "docs" / "architecture.md").read_text("utf-8"), heading)
    arrows = re.findall(r"^ *(\w+) --> (\w+)", text, re.MULTILINE)
    assert len(arrows) == len(set(arrows))
    assert set(arrows) == {(old.name, new.name) for old in table for new in table[old]}


@pytest.mark.parametrize("heading", DRAWN)
def test_every_state_is_in_the_table_and_can_be_reached(heading: str) -> None:
    """From the first one; no state is left that nothing leads to."""
    states, table = DRAWN[heading]
    assert set(table) == set(states)
    first, *others = states
    assert set(others) == {new for following in table.values() for new in following}
    assert first not in {new for following in table.values() for new in following}


def test_step_that_is_not_drawn_is_a_bug_of_ours() -> None:
    """An ended tunnel opens no more, whatever calls."""
    client = FakeClientLeg()
    tunnel = Tunnel(client, FakeUserLeg(), from_dict(OPEN), "u", "*")
    with client.channels.lock:
        tunnel.assign_locked(2**20)
    tunnel.user_lost()
    with client.channels.lock, pytest.raises(AssertionError):
        tunnel._go_locked(TunnelState.OPEN)
