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
# What comes together meanwhile: a whole message at 200 Mbit/s.
_GATHER_S = 0.0025


class Gather:
    """Watches the reads of one source. Used by the thread that reads it."""

    def __init__(self) -> None:
        # Since when the next read was possible.
        self._ready_at = float("-inf")
        self._times = 0

    def wait_s(self, size: int, wanted: int, now: float) -> float:
        """Return the seconds to wait before the next read, after one of `size` bytes at `now`.

        `wanted` is what was asked for: a source that fills it is as fast as we are.
        """
        goes_on = size >= _LEAST_BYTES and now - self._ready_at < _SOON_S
        self._times = self._times + 1 if goes_on else 0
        waits_s = _GATHER_S if self._times >= _TIMES and size < wanted else 0.0
        self._ready_at = now + waits_s
        return waits_s
