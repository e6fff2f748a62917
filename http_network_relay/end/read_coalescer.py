"""Computes the wait before a read, so that one read returns several small writes.

Each small write of a fast source wakes three programs; these wake-ups are most of such a
stream's cost. No thread and no I/O: the caller waits.
"""

from __future__ import annotations

# Smaller pieces may be keystrokes and their echoes, which never wait.
_LEAST_BYTES = 4 * 1024
# A source is fast after `_TIMES` pieces in a row, each within `_SOON_S` of the last.
_SOON_S = 0.001
_TIMES = 4
# The first and the longest wait; two messages take the longest at 200 Mbit/s.
_FIRST_GATHER_S = 0.0025
_LONGEST_GATHER_S = 0.005
# The intended fill of a read. At 1, a small read would follow each full one.
_AIM = 7 / 8
# The wait's factor after a full read, which does not show how many bytes were ready.
_SHORTER = 0.75
# A source that fills a read within `_SHORTEST_S` could block during a wait: a pipe holds no
# more than one message. The next `_HOLD_OFF` reads do not wait.
_SHORTEST_S = 0.0005
_HOLD_OFF = 1000


class ReadCoalescer:
    """Observes the reads of one source. For the thread that reads the source."""

    def __init__(self, read_bytes: int) -> None:
        """`read_bytes`: the size of a read with sufficient credit."""
        self._read_bytes = read_bytes
        # The time from which the next read was possible.
        self._ready_at = float("-inf")
        # Quick small pieces in a row; below 0, minus the number of reads still without a wait.
        self._times = 0
        self._gather_s = _FIRST_GATHER_S
        # A piece that takes longer than this is not quick.
        self._soon_s = _SOON_S

    def wait_s(self, size: int, wanted: int, now: float) -> float:
        """Return the seconds to wait before the next read, after one of `size` bytes at `now`.

        `wanted` is the requested size: less than a whole read if credit was short.
        """
        waits_s = 0.0
        if size < _LEAST_BYTES or now - self._ready_at >= self._soon_s:
            self._times = min(0, self._times)
        elif self._times < _TIMES:
            self._times = self._times + 1 if size < wanted or self._times < 0 else 0
            self._gather_s = _FIRST_GATHER_S
            if self._times == _TIMES:
                waits_s = self._gather_s
        elif size < wanted or wanted == self._read_bytes:
            factor = _AIM * self._read_bytes / size if size < wanted else _SHORTER
            self._gather_s = min(_LONGEST_GATHER_S, self._gather_s * factor)
            if self._gather_s < _SHORTEST_S:
                self._times = -_HOLD_OFF
            else:
                waits_s = self._gather_s
        self._ready_at = now + waits_s
        # A sleep may overrun; the overrun must not count as slowness of the source.
        self._soon_s = max(_SOON_S, waits_s)
        return waits_s
