"""Failed logins, counted by address and name and, wider, by address. No I/O, no waiting.

A leaky count for each: it rises by one with each failure, and falls with time. Above the limit
a failure is answered 429 instead of 401. Nobody is locked out: a right secret always passes, so
that an attacker cannot shut out those whose names or whose address they share.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from server.addresses import block_of

# Entries at most; the one that failed longest ago goes first. 3 MB, and more addresses at once
# than a limit by address could hold off anyway.
MAX_ENTRIES = 10_000
# The limits are per minute.
_PERIOD_S = 60.0

_Key = tuple[str, ...]


class FailedLogins:
    """The counts of one process. Any thread."""

    def __init__(
        self,
        by_name: int,
        by_address: int,
        *,
        max_entries: int = MAX_ENTRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._by_name = by_name
        self._by_address = by_address
        self._max_entries = max_entries
        self._clock = clock
        # Guards _levels.
        self._lock = threading.Lock()
        # key -> (level, when it was so). The least recently failed stands first.
        self._levels: OrderedDict[_Key, tuple[float, float]] = OrderedDict()

    def count(self, kind: str, name: str, address: str) -> bool:
        """Count a failure; whether it is one too many. `name` is legal, or empty."""
        block = block_of(address)
        now = self._clock()
        with self._lock:
            # In this order: an address over its limit makes no new entries by name.
            return self._is_over_locked((block,), self._by_address, now) or self._is_over_locked(
                (block, kind, name), self._by_name, now
            )

    def __len__(self) -> int:
        with self._lock:
            return len(self._levels)

    def _is_over_locked(self, key: _Key, limit: int, now: float) -> bool:
        if not limit:
            return False
        level, since = self._levels.get(key, (0.0, now))
        level = max(0.0, level - (now - since) * limit / _PERIOD_S)
        is_over = level + 1 > limit
        # Those that are refused do not count: who stops trying is free again within seconds.
        self._levels[key] = (level if is_over else level + 1, now)
        self._levels.move_to_end(key)
        while len(self._levels) > self._max_entries:
            self._levels.popitem(last=False)
        return is_over
