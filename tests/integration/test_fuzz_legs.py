"""Whole legs with their threads: pests beside a good tunnel, with input from Hypothesis."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import legs

# A message or two for each of six pests, up to some hundred.
_INPUTS = st.binary(max_size=300) | st.integers(0, 2**32).map(
    lambda seed: random.Random(seed).randbytes(1500)
)


def test_pests_harm_no_other_tunnel_and_leave_nothing_behind() -> None:
    """No thread dies or hangs, no fault of ours is logged, the good tunnel's bytes are right."""
    with legs.world() as world:

        @settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            # A world that was harmed once stays so: nothing to try again.
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(_INPUTS)
        def play(data: bytes) -> None:
            world.play(data)

        play()
