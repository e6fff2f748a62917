"""Failed logins, counted by address and name and, wider, by address. No I/O, no waiting.

A failure takes a token, and tokens come back with time. A failure without a token is answered
429 instead of 401. Nobody is locked out: a right secret always passes, so that an attacker
cannot shut out the owners of a name, or the others behind an address.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from server.addresses import block_of
from server.limits.token_bucket import TokenBuckets

# Entries at most; the one that failed longest ago is deleted first. 3 MB, and more addresses at
# once than a limit by address could hold off anyway.
MAX_ENTRIES = 10_000
# The limits are per minute.
_PERIOD_S = 60.0


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
        """`by_name`, `by_address`: failures a minute; 0: no limit."""
        tables = max(1, bool(by_name) + bool(by_address))

        def table(limit: int) -> TokenBuckets[tuple[str, ...]] | None:
            if not limit:
                return None
            most = max_entries // tables
            return TokenBuckets(limit / _PERIOD_S, limit, keys_at_most=most, clock=clock)

        self._by_name = table(by_name)
        self._by_address = table(by_address)

    def count(self, kind: str, name: str, address: str) -> bool:
        """Count a failure; return whether it is one too many. `name` is legal, or empty."""
        block = block_of(address)
        # In this order: an address over its limit makes no new entries by name.
        return _is_over(self._by_address, (block,)) or _is_over(self._by_name, (block, kind, name))

    def __len__(self) -> int:
        return sum(len(table) for table in (self._by_name, self._by_address) if table is not None)


def _is_over(table: TokenBuckets[tuple[str, ...]] | None, key: tuple[str, ...]) -> bool:
    # A refused failure takes nothing: a peer that stops trying is free again within seconds.
    return table is not None and not table.take(key, 1)
