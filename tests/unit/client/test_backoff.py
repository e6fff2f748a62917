"""The waits between two tries."""

import random

import pytest

from client.backoff import CAP_S, FIRST_S, Backoff


class Highest(random.Random):
    """Always draws the upper end."""

    def uniform(self, a: float, b: float) -> float:
        assert a == 0.0
        return b


def test_first_retry_is_immediate_and_the_rest_doubles_to_the_cap() -> None:
    """0, then 0.2 s doubling to 30 s."""
    backoff = Backoff(Highest())
    waits = [backoff.next_s() for _ in range(12)]
    assert waits[:4] == [0.0, FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits == sorted(waits)
    assert waits[-1] == CAP_S == 30.0


def test_waits_are_drawn_between_zero_and_their_bound() -> None:
    """Full jitter: a fleet that lost its server does not come back in one instant."""
    bounds = Backoff(Highest())
    highest = [bounds.next_s() for _ in range(12)]
    draws: list[list[float]] = []
    for seed in range(200):
        backoff = Backoff(random.Random(seed))
        draws.append([backoff.next_s() for _ in range(12)])
    for number, bound in enumerate(highest):
        column = [draw[number] for draw in draws]
        assert all(0.0 <= wait <= bound for wait in column)
        if bound:
            assert min(column) < bound / 10
            assert max(column) > bound * 9 / 10


def test_same_seed_gives_the_same_waits() -> None:
    """So that a test can know them."""
    first, second = Backoff(random.Random(7)), Backoff(random.Random(7))
    assert [first.next_s() for _ in range(9)] == [second.next_s() for _ in range(9)]


def test_reset_starts_anew() -> None:
    """After a stable minute."""
    backoff = Backoff(Highest())
    for _ in range(9):
        backoff.next_s()
    backoff.reset()
    assert [backoff.next_s(), backoff.next_s()] == [0.0, FIRST_S]


def test_a_year_of_tries_overflows_nothing() -> None:
    """2**1000000 would be a number of 300,000 digits."""
    backoff = Backoff(Highest())
    backoff._tries = 10**6
    assert backoff.next_s() == pytest.approx(CAP_S)
