"""Tokens that come at a rate, by key: bytes, opens, failed logins. No I/O.

A key without a bucket has a full one. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass
class _Bucket:
    """Tokens at a point in time; below 0 is a debt."""

    tokens: float
    since: float


class TokenBuckets(Generic[KeyT]):
    """One bucket for each key; all have the same rate and size."""

    def __init__(
        self,
        rate: float,
        size: float,
        *,
        debt: float = 0.0,
        keys_at_most: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the table, without a bucket.

        Args:
            rate: Tokens a second.
            size: Tokens of a full bucket, which a pause of `size / rate` seconds fills.
            debt: Tokens that may be owed.
            keys_at_most: Beyond it the least recently used bucket is deleted. 0: no bound.
            clock: The time in seconds.
        """
        self._rate = rate
        self._size = size
        self._debt = debt
        self._keys_at_most = keys_at_most
        self._clock = clock
        # Guards _buckets.
        self._lock = threading.Lock()
        # The least recently used stands first.
        self._buckets: OrderedDict[KeyT, _Bucket] = OrderedDict()

    def take(self, key: KeyT, wanted: int) -> int:
        """Take whole tokens, `wanted` at most; return how many. Debt counts as tokens."""
        with self._lock:
            bucket = self._refilled_locked(key)
            size = max(0, min(wanted, int(bucket.tokens + self._debt)))
            bucket.tokens -= size
            self._delete_needless_locked(bucket)
        return size

    def refund(self, key: KeyT, size: int) -> None:
        """Give tokens back that were taken and not used."""
        with self._lock:
            self._refilled_locked(key).tokens += size

    def level(self, key: KeyT) -> float:
        """Return how many tokens there are."""
        with self._lock:
            return self._refilled_locked(key).tokens

    def discard_full(self, key: KeyT) -> bool:
        """Delete the key's bucket if it is full; return whether it was."""
        with self._lock:
            is_full = self._refilled_locked(key).tokens >= self._size
            if is_full:
                del self._buckets[key]
        return is_full

    def __len__(self) -> int:
        with self._lock:
            return len(self._buckets)

    def _refilled_locked(self, key: KeyT) -> _Bucket:
        assert self._lock.locked()
        now = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(self._size, now))
        self._buckets.move_to_end(key)
        bucket.tokens = self._tokens_at(bucket, now)
        bucket.since = now
        return bucket

    def _tokens_at(self, bucket: _Bucket, now: float) -> float:
        return min(self._size, bucket.tokens + (now - bucket.since) * self._rate)

    def _delete_needless_locked(self, used: _Bucket) -> None:
        """Delete buckets that are full again from the oldest on, and what is beyond the bound."""
        assert self._lock.locked()
        while True:
            key, oldest = next(iter(self._buckets.items()))
            is_excess = 0 < self._keys_at_most < len(self._buckets)
            is_full = self._tokens_at(oldest, used.since) >= self._size
            if oldest is used or not (is_excess or is_full):
                return
            del self._buckets[key]
