"""The waits between two tries."""

import random

import pytest

from http_network_relay.dial.backoff import Backoff

FIRST_S = 0.2
CAP_S = 30.0


def highest(low: float, high: float) -> float:
    """Draw the upper end."""
    assert low == 0.0
    return high


def tired(tries: int, cap_s: float = CAP_S) -> Backoff:
    """After so many tries."""
    backoff = Backoff(cap_s, highest)
    for _ in range(tries):
        backoff.next_s()
    return backoff


@pytest.mark.parametrize("cap_s", [5.0, CAP_S])
def test_first_retry_is_immediate_and_the_rest_doubles_to_the_cap(cap_s: float) -> None:
    """0, then 0.2 s doubling to 5 s (a proxy command) or 30 s (a client)."""
    backoff = Backoff(cap_s, highest)
    waits = [backoff.next_s() for _ in range(12)]
    assert waits[:4] == [0.0, FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits == sorted(waits)
    assert waits[-1] == cap_s


def test_waits_are_drawn_between_zero_and_their_bound() -> None:
    """Full jitter: a fleet that lost its server does not come back in one instant."""
    bounds = Backoff(CAP_S, highest)
    most = [bounds.next_s() for _ in range(12)]
    draws: list[list[float]] = []
    for seed in range(200):
        backoff = Backoff(CAP_S, random.Random(seed).uniform)
        draws.append([backoff.next_s() for _ in range(12)])
    for number, bound in enumerate(most):
        column = [draw[number] for draw in draws]
        assert all(0.0 <= wait <= bound for wait in column)
        if bound:
            assert min(column) < bound / 10
            assert max(column) > bound * 9 / 10


def test_same_seed_gives_the_same_waits() -> None:
    """So that a test can know them."""
    first, second = (
        Backoff(CAP_S, random.Random(7).uniform),
        Backoff(CAP_S, random.Random(7).uniform),
    )
    assert [first.next_s() for _ in range(9)] == [second.next_s() for _ in range(9)]


# A leg that held.


@pytest.mark.parametrize(
    ("tries", "enough_s"),
    [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.6), (5, 3.2), (9, 51.2), (12, 60.0), (99, 60.0)],
)
def test_leg_that_held_for_twice_the_last_bound_starts_the_waits_anew(
    tries: int, enough_s: float
) -> None:
    """And for a second at least; what held less was no leg."""
    backoff, short = tired(tries), tired(tries)
    goes_on = tired(tries).next_s()
    backoff.lasted(enough_s)
    assert [backoff.next_s(), backoff.next_s()] == [0.0, FIRST_S]
    short.lasted(enough_s * 0.999)
    assert short.next_s() == goes_on


def test_leg_that_carried_something_starts_the_waits_anew_at_once() -> None:
    """However short it held: somebody waits for the tunnel that it carried."""
    backoff = tired(9)
    backoff.lasted(0.0, was_used=True)
    assert [backoff.next_s(), backoff.next_s()] == [0.0, FIRST_S]


def test_leg_that_holds_for_a_moment_each_time_does_not_stop_the_doubling() -> None:
    """A server that accepts and drops in a loop is not hammered."""
    backoff = Backoff(CAP_S, highest)
    waits = []
    for _ in range(12):
        waits.append(backoff.next_s())
        backoff.lasted(0.9)
    assert waits == sorted(waits)
    assert waits[-1] == CAP_S


def test_a_year_of_tries_overflows_nothing() -> None:
    """2**1000000 would be a number of 300,000 digits."""
    backoff = Backoff(CAP_S, highest)
    backoff._tries = 10**6
    assert backoff.next_s() == pytest.approx(CAP_S)
