"""Every decoder, and both ends' handling of messages, with input from Hypothesis."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import decoders, machines, streams
from tests.fuzz.__main__ import LEGS, TARGETS

_MODULES = (decoders, streams, machines)
_ALL = {name: play for module in _MODULES for name, play in module.DECODERS.items()}
_SEEDS = {name: seeds for module in _MODULES for name, seeds in module.SEEDS.items()}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with streams.quieted():
        yield


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Bytes of any kind; a seed with some bytes replaced; many random bytes."""
    edits = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=5)
    return (
        st.binary(max_size=400)
        | st.builds(_edited, st.sampled_from(_SEEDS[name]), edits)
        | st.integers(0, 2**32).map(lambda seed: random.Random(seed).randbytes(400))
    )


def _edited(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for at, piece in edits:
        data = data[:at] + piece + data[at + 1 :]
    return data


@pytest.mark.parametrize("name", _ALL)
def test_any_input_is_taken_or_refused_as_documented(name: str) -> None:
    """Nothing else is raised, and good tunnels beside the input go on."""
    for seed in _SEEDS[name]:
        _ALL[name](seed)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(inputs(name))
    def play(data: bytes) -> None:
        _ALL[name](data)

    play()


def test_long_form_has_all_of_these_targets() -> None:
    """`make fuzz` forgets none, and names none that is not there."""
    assert {*TARGETS} == {*_ALL, LEGS}
    assert all(name in module.DECODERS for module in _MODULES for name in module.SEEDS)
