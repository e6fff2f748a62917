"""Tokens by user and direction: what may be borrowed, and what time gives back."""

import sys
import threading
from collections.abc import Iterator

import pytest

from server.limits.token_bucket import TokenBuckets
from tests.support.clock import Clock

RATE = 1000.0


@pytest.fixture(params=[0.005, 1e-6], ids=["as-usual", "switching-often"])
def _switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter changes threads seldom, or nearly everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def test_debt_ends_where_a_seconds_worth_is_owed() -> None:
    """A second's worth that was saved, one that is owed, and then what time gives."""
    clock = Clock()
    purses = TokenBuckets(RATE, 0, clock=clock)
    assert [purses.borrow("u", True, 700) for _ in range(4)] == [700, 700, 600, 0]
    assert purses.left("u", True) == -RATE
    clock.advance(0.5)
    assert purses.borrow("u", True, 700) == 500
    # Each user and each way has its own.
    assert purses.borrow("u", False, 700) == purses.borrow("other", True, 700) == 700
    clock.advance(3600)
    assert purses.left("u", True) == RATE


def test_least_burst_counts_when_the_rate_is_low() -> None:
    """One message, or no login would ever be quick."""
    purses = TokenBuckets(RATE, 5000, clock=Clock())
    assert purses.borrow("u", True, 12_000) == 10_000


def test_purse_is_forgotten_when_it_is_full_again() -> None:
    """And not before: the debt would be forgiven."""
    clock = Clock()
    purses = TokenBuckets(RATE, 0, clock=clock)
    purses.pay("u", True, 10)
    assert not purses.forget("u", True)
    clock.advance(1)
    assert purses.forget("u", True)
    assert len(purses) == 0


@pytest.mark.usefixtures("_switching")
def test_nobody_borrows_beyond_the_debt_when_threads_race() -> None:
    """To the byte: nothing is lent twice, and no payment is lost."""
    for _ in range(100):
        purses = TokenBuckets(RATE, 0, clock=Clock())
        barrier = threading.Barrier(4)
        lent: list[int] = []

        def borrow() -> None:
            barrier.wait()  # noqa: B023
            for _ in range(50):
                lent.append(purses.borrow("u", True, 15))  # noqa: B023
                purses.pay("u", True, 5)  # noqa: B023
                purses.pay("u", True, -5)  # noqa: B023

        threads = [threading.Thread(target=borrow) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lent) <= 2 * RATE
        assert purses.left("u", True) == RATE - sum(lent)
