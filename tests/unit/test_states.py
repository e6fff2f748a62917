"""The states that docs/architecture.md draws are those of the code."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Mapping
from typing import Any

import pytest

from http_network_relay.end.state import END_TRANSITIONS, EndState
from server.legs.user_leg import USER_LEG_TRANSITIONS, UserLegState
from server.tunnels.tunnel import Tunnel
from server.tunnels.tunnel_state import TUNNEL_TRANSITIONS, TunnelState
from tests.support.controls import from_dict
from tests.support.processes import ROOT
from tests.support.server.fake_legs import CAP, OPEN, FakeClientLeg, FakeUserLeg

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
# The heading of each machine on the page -> its states, and its table of transitions.
MACHINES: dict[str, tuple[type[enum.Enum], Mapping[Any, Collection[Any]]]] = {
    "One end of a tunnel": (EndState, END_TRANSITIONS),
    "A tunnel at the server": (TunnelState, TUNNEL_TRANSITIONS),
    "A user leg": (UserLegState, USER_LEG_TRANSITIONS),
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


@pytest.mark.parametrize("heading", MACHINES)
def test_every_state_but_the_first_can_be_reached(heading: str) -> None:
    """No state is left that nothing leads to."""
    states, table = MACHINES[heading]
    first, *others = states
    reached = {after for following in table.values() for after in following}
    assert set(others) == reached - {first}


def test_step_of_a_tunnel_that_is_not_drawn_is_a_bug_of_ours() -> None:
    """An ended tunnel opens no more, whatever calls."""
    client = FakeClientLeg()
    tunnel = Tunnel(client, FakeUserLeg(), from_dict(OPEN), "u", "*")
    with client.channels.lock:
        tunnel.assign_locked(CAP)
    tunnel.user_lost()
    with client.channels.lock, pytest.raises(AssertionError):
        tunnel._go_locked(TunnelState.OPEN)
