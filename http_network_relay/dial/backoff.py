"""The wait before the next try: exponential backoff with full jitter."""

from __future__ import annotations

import os
from collections.abc import Callable

_FIRST_S = 0.2
# A leg that lasted less, and carried nothing, counts as a failed try.
_SHORTEST_LEG_S = 1.0


def uniform(low: float, high: float) -> float:
    """Draw from low..high. Not random.uniform(), whose import costs a start 1 ms."""
    return low + (high - low) * int.from_bytes(os.urandom(7), "big") / 2**56


class Backoff:
    """The first wait is 0 s, each later one uniform in 0..b; b doubles from 0.2 s to `cap_s`."""

    def __init__(self, cap_s: float, draw: Callable[[float, float], float] = uniform) -> None:
        self._cap_s = cap_s
        self._draw = draw
        self._tries = 0

    def lasted(self, seconds: float, *, was_used: bool = False) -> None:
        """Note for how long a leg lasted, and whether the leg carried anything for a tunnel.

        The waits begin anew after a leg that was used, or that lasted for twice the last b.
        """
        if was_used or seconds >= max(_SHORTEST_LEG_S, 2 * self._bound_s()):
            self._tries = 0

    def next_s(self) -> float:
        """Return the seconds to wait before the next try."""
        self._tries += 1
        return self._draw(0.0, self._bound_s())

    def _bound_s(self) -> float:
        if self._tries <= 1:
            return 0.0
        # min() before the power, which a year of tries would make a huge number.
        return min(self._cap_s, _FIRST_S * 2.0 ** min(self._tries - 2, 16))
