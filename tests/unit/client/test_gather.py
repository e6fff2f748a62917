"""When bytes of a source are let come together."""

from __future__ import annotations

import pytest

from client.gather import Gather

WANTED = 65_536
WAIT_S = 0.0025


def waits(pieces: list[tuple[int, float]], wanted: int = WANTED) -> list[float]:
    """The waits after reads of so many bytes, each so long after it could have come."""
    gather, now, told = Gather(), 100.0, []
    for size, after_s in pieces:
        now += after_s
        told.append(gather.wait_s(size, wanted, now))
        now += told[-1]
    return told


def test_small_pieces_in_quick_succession_are_gathered() -> None:
    """From the fifth on: 16 KiB at 200 Mbit/s come every 0.65 ms."""
    assert waits([(16_384, 0.00065)] * 8) == [0.0] * 4 + [WAIT_S] * 4


@pytest.mark.parametrize(
    ("size", "after_s"),
    [(4_095, 0.0001), (16_384, 0.0011), (WANTED, 0.0001)],
    ids=["keystrokes", "slow", "as fast as we are"],
)
def test_nothing_waits_otherwise(size: int, after_s: float) -> None:
    """Keystrokes and their echoes, pieces that come slowly, and a source that is never empty."""
    assert waits([(size, after_s)] * 20) == [0.0] * 20


def test_a_pause_or_a_keystroke_begins_anew() -> None:
    """What waits goes on for as long as it comes like that."""
    quick, pause, key = (16_384, 0.0005), (16_384, 0.01), (36, 0.0005)
    assert waits([quick] * 6 + [pause] + [quick] * 5)[4:] == [WAIT_S] * 2 + [0.0] * 4 + [WAIT_S] * 2
    assert waits([quick] * 6 + [key] + [quick] * 4)[6:] == [0.0] * 4 + [WAIT_S]


def test_a_read_that_was_filled_does_not_wait_and_breaks_nothing() -> None:
    """There is more to read at once."""
    quick, full = (16_384, 0.0005), (WANTED, 0.0005)
    assert waits([quick] * 5 + [full, quick])[4:] == [WAIT_S, 0.0, WAIT_S]
