"""How many bytes each user may still have passed on, each way: tokens that come at a rate. No I/O.

Any thread. Whoever opens a tunnel borrows for its first credit, and the pacer pays for the
rest: were the first credit only counted later, many tunnels that begin at once would all find
nothing owed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# Tokens that are not used are kept for so long: a pause makes up for what follows. As much may
# be owed, so that a login waits for no download of the same user.
_BURST_S = 1.0


@dataclass
class _Bucket:
    """Bytes, and when it was so many; below 0 is a debt."""

    tokens: float
    since: float


class TokenBuckets:
    """The tokens of one process, by user and whether they are for bytes up."""

    def __init__(
        self, rate: float, least_burst: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = max(rate * _BURST_S, least_burst)
        self._clock = clock
        # Guards _purses.
        self._lock = threading.Lock()
        self._purses: dict[tuple[str, bool], _Bucket] = {}

    def borrow(self, user: str, is_up: bool, wanted: int) -> int:
        """Take `wanted` tokens, there or not; fewer, or none, where too many would be owed."""
        with self._lock:
            purse = self._refilled_locked(user, is_up)
            size = max(0, min(wanted, int(purse.tokens + self._burst)))
            purse.tokens -= size
        return size

    def left(self, user: str, is_up: bool) -> float:
        """Return how many tokens there are."""
        with self._lock:
            return self._refilled_locked(user, is_up).tokens

    def pay(self, user: str, is_up: bool, size: int) -> None:
        """Take so many tokens, or give them back where `size` is below 0."""
        with self._lock:
            self._refilled_locked(user, is_up).tokens -= size

    def forget(self, user: str, is_up: bool) -> bool:
        """Keep nothing of a user who owes nothing and has used nothing for a while."""
        with self._lock:
            is_full = self._refilled_locked(user, is_up).tokens >= self._burst
            if is_full:
                del self._purses[user, is_up]
        return is_full

    def __len__(self) -> int:
        with self._lock:
            return len(self._purses)

    def _refilled_locked(self, user: str, is_up: bool) -> _Bucket:
        now = self._clock()
        purse = self._purses.setdefault((user, is_up), _Bucket(self._burst, now))
        purse.tokens = min(self._burst, purse.tokens + (now - purse.since) * self._rate)
        purse.since = now
        return purse
