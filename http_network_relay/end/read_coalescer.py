"""When to let a source's bytes come together before they are read.

A source that writes small pieces in quick succession costs three programs a wake-up for each,
which is most of what such a stream costs. No thread and no I/O: it only says how long to wait.
"""

from __future__ import annotations

# Pieces smaller than this may be keystrokes and their echoes, which never wait.
_LEAST_BYTES = 4 * 1024
# The next piece came so soon, so many times in a row: it goes on like this.
_SOON_S = 0.001
_TIMES = 4
# For so long bytes come together at first, and at most: two messages at 200 Mbit/s.
_FIRST_GATHER_S = 0.0025
_LONGEST_GATHER_S = 0.005
# What a read should find, of what it could: lest a small one follow each full one.
_AIM = 7 / 8
# A read that was filled does not tell how much there was: next time wait such a part.
_SHORTER = 0.75
# A source that fills a read sooner is fast, and might stand still while we wait: a pipe holds
# no more than one message. It is left alone for so many reads.
_SHORTEST_S = 0.0005
_HOLD_OFF = 1000


class ReadCoalescer:
    """Watches the reads of one source. Used by the thread that reads it."""

    def __init__(self, read_bytes: int) -> None:
        """`read_bytes`: what a read asks for, if there is credit for so much."""
        self._read_bytes = read_bytes
        # Since when the next read was possible.
        self._ready_at = float("-inf")
        # Quick small pieces in a row; below 0, how many more reads are left alone.
        self._times = 0
        self._gather_s = _FIRST_GATHER_S
        # What comes later than this was not quick.
        self._soon_s = _SOON_S

    def wait_s(self, size: int, wanted: int, now: float) -> float:
        """Return the seconds to wait before the next read, after one of `size` bytes at `now`.

        `wanted` is what was asked for: less than a whole read if there was no credit for one.
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
        # A sleep may take far longer than was asked for, which is not the source's doing.
        self._soon_s = max(_SOON_S, waits_s)
        return waits_s
