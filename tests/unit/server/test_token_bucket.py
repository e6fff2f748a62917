"""Tokens by key: what may be taken or owed, and what time gives back."""

import sys
import threading
from collections.abc import Iterator

import pytest

from server.limits.token_bucket import TokenBuckets
from tests.support.clock import Clock

RATE = 1000.0
UP = ("u", True)


def made(clock: Clock, size: float = RATE) -> TokenBuckets[tuple[str, bool]]:
    """Buckets that may owe as much as they hold, as those of a user's bytes."""
    return TokenBuckets(RATE, size, debt=size, clock=clock)


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
    buckets = made(clock)
    assert [buckets.take(UP, 700) for _ in range(4)] == [700, 700, 600, 0]
    assert buckets.level(UP) == -RATE
    clock.advance(0.5)
    assert buckets.take(UP, 700) == 500
    # Each user and each way has its own.
    assert buckets.take(("u", False), 700) == buckets.take(("other", True), 700) == 700
    clock.advance(3600)
    assert buckets.level(UP) == RATE


def test_size_counts_when_the_rate_is_low() -> None:
    """A pause gives as much as the bucket holds, and as much may be owed."""
    buckets = made(Clock(), 5000)
    assert buckets.take(UP, 12_000) == 10_000


def test_bucket_is_deleted_when_it_is_full_again() -> None:
    """And not before: the debt would be forgiven."""
    clock = Clock()
    buckets = made(clock)
    buckets.take(UP, 10)
    assert not buckets.discard_full(UP)
    clock.advance(1)
    assert buckets.discard_full(UP)
    assert len(buckets) == 0


@pytest.mark.usefixtures("_switching")
def test_nobody_takes_beyond_the_debt_when_threads_race() -> None:
    """To the byte: nothing is given twice, and no refund is lost."""
    for _ in range(100):
        buckets = made(Clock())
        barrier = threading.Barrier(4)
        taken: list[int] = []

        def take() -> None:
            barrier.wait()  # noqa: B023
            for _ in range(50):
                taken.append(buckets.take(UP, 15))  # noqa: B023
                buckets.refund(UP, buckets.take(UP, 5))  # noqa: B023

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(taken) <= 2 * RATE
        assert buckets.level(UP) == RATE - sum(taken)


def test_nothing_is_owed_when_no_debt_is_allowed() -> None:
    """Whole tokens only: a rest of one is kept."""
    clock = Clock()
    buckets: TokenBuckets[str] = TokenBuckets(2.0, 3.0, clock=clock)
    assert [buckets.take("u", 1) for _ in range(4)] == [1, 1, 1, 0]
    clock.advance(0.4)
    assert buckets.take("u", 1) == 0
    clock.advance(0.1)
    assert buckets.take("u", 1) == 1


def test_oldest_bucket_is_deleted_when_there_are_too_many() -> None:
    """And a full one at once: nothing would be forgiven."""
    clock = Clock()
    buckets: TokenBuckets[int] = TokenBuckets(1.0, 1.0, keys_at_most=3, clock=clock)
    for key in (1, 2, 3, 1, 4):
        buckets.take(key, 1)
    assert len(buckets) == 3
    # 2 was deleted, so it has a token; 1 was used again, and has none.
    assert [buckets.take(key, 1) for key in (1, 4, 2)] == [0, 0, 1]
    clock.advance(1)
    buckets.take(5, 1)
    assert len(buckets) == 1
