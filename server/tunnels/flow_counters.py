"""Counts and windows of a tunnel at the server (docs/protocol.md, "Streams and credit").

Counters only: no I/O, clock, thread or log. The lock of the client leg guards them.
"""

from __future__ import annotations

from http_network_relay.wire.constants import MAX_DATA_BYTES, MIN_WINDOW_BYTES
from http_network_relay.wire.errors import TunnelError

# The part of a budget that no window grows into: each new tunnel needs the smallest window at
# once, or would be refused because of other tunnels' downloads. A quarter is 64 new tunnels.
_NEWCOMERS_SHARE = 4
# The first credit of a paced tunnel each way, where its user does not owe too much: a message,
# so that a login does not wait for a download of the same user.
FIRST_CREDIT_BYTES = MAX_DATA_BYTES


class WindowBudget:
    """Window bytes that all tunnels of a client leg may hold, in one direction."""

    def __init__(self, total_bytes: int) -> None:
        self.free = total_bytes
        self._newcomers = total_bytes // _NEWCOMERS_SHARE

    @property
    def growth(self) -> int:
        """Bytes that windows above the smallest may still take."""
        return max(0, self.free - self._newcomers)


class FlowCounters:
    """One direction of a tunnel as the server counts it. Guarded by the lock of the channels.

    Every method raises TunnelError for what the peer may not do, and then changes nothing.
    """

    def __init__(
        self,
        budget: WindowBudget,
        cap_bytes: int,
        received: int = 0,
        delivered: int = 0,
        *,
        is_paced: bool = False,
    ) -> None:
        self.start_at(received, delivered)
        self._budget = budget
        self._cap = cap_bytes
        # Only begin() and raise_by() raise the limit then.
        self._is_paced = is_paced
        # The part of the budget that this direction has: its window, at least the smallest.
        self._reserved = MIN_WINDOW_BYTES
        budget.free -= MIN_WINDOW_BYTES
        self._asked = 0
        self.limit = 0
        self.eof_count: int | None = None
        self.eof_acked = False

    def start_at(self, received: int, delivered: int) -> None:
        """Count from the counts of the receiving end, which are not 0 after a resume."""
        if delivered > received:
            raise TunnelError(f"{delivered} bytes delivered, but {received} received")
        self.begun_at = received
        self.forwarded = received
        self.delivered = delivered

    def on_data(self, size: int) -> None:
        """Count `size` bytes before they are queued onward."""
        if not 0 < size <= MAX_DATA_BYTES:
            raise TunnelError(f"a data message of {size} bytes, not 1 to {MAX_DATA_BYTES}")
        if self.eof_count is not None:
            raise TunnelError("data after eof")
        if self.forwarded + size > self.limit:
            raise TunnelError(f"window overrun: {self.forwarded + size} over {self.limit}")
        self.forwarded += size

    def on_eof(self, count: int) -> None:
        """Check and note the sender's eof."""
        if self.eof_count is not None:
            raise TunnelError("a second eof")
        if count != self.forwarded:
            raise TunnelError(f"eof after {count} bytes, {self.forwarded} came")
        self.eof_count = count

    def on_ack(self, delivered: int, limit: int, eof: bool) -> int:
        """Check and note the receiver's ack; return the limit for the sender."""
        if not self.delivered <= delivered <= self.forwarded:
            raise TunnelError(
                f"ack of {delivered} bytes after {self.delivered}, {self.forwarded} were sent"
            )
        if limit < self._asked:
            raise TunnelError(f"limit fell from {self._asked} to {limit}")
        if eof and delivered != self.eof_count:
            raise TunnelError("ack of an eof that is not due")
        self.delivered = delivered
        self.eof_acked = self.eof_acked or eof
        return self.raise_limit(limit)

    def raise_limit(self, asked: int) -> int:
        """Return the limit for the sender: as the receiver asks, as far as the budget goes.

        The limit is never below `delivered` + the smallest window, which was reserved at the
        start, and never falls. Where bytes are paced the limit stays as it is: see begin().
        """
        self._asked = asked
        return self._set_limit(self.limit if self._is_paced else self._highest())

    def ask_first(self, asked: int) -> int:
        """Note the receiver's first limit; return the credit that begin() can use."""
        self._asked = asked
        return max(0, min(self._highest() - self.forwarded, FIRST_CREDIT_BYTES))

    def begin(self, credit: int) -> int:
        """Return the first limit of a paced direction: `credit` bytes, or fewer, from here."""
        return self._set_limit(min(self._highest(), self.forwarded + credit))

    @property
    def headroom(self) -> int:
        """By how much the limit of a paced direction might rise now."""
        is_ended = self.eof_count is not None
        return 0 if is_ended else max(0, self._highest() - self.limit)

    def raise_by(self, size: int) -> int:
        """Raise the limit of a paced direction by `size` at most; return by how much it rose."""
        rise = min(size, self.headroom)
        self._set_limit(self.limit + rise)
        return rise

    def _highest(self) -> int:
        """Return the limit that the receiver and the budget allow."""
        # At least the smallest window; and a limit that was sent stays when `delivered` rises.
        reach = max(MIN_WINDOW_BYTES, min(self._cap, self._reserved + self._budget.growth))
        return min(self._asked, max(self.delivered + reach, self.limit))

    def _set_limit(self, limit: int) -> int:
        self.limit = limit
        needed = max(MIN_WINDOW_BYTES, self.limit - self.delivered)
        self._budget.free += self._reserved - needed
        self._reserved = needed
        return self.limit

    def release(self) -> None:
        """Give this direction's part of the budget back; the tunnel is over."""
        self._budget.free += self._reserved
        self._reserved = 0
