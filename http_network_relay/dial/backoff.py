"""How long to wait before the next try: exponential backoff with full jitter."""

from __future__ import annotations

import os
from collections.abc import Callable

_FIRST_S = 0.2
# A leg that held less, and carried nothing, was no leg.
_SHORTEST_HELD_S = 1.0


def uniform(low: float, high: float) -> float:
    """Draw from low..high, as random.uniform(): to import that takes a start a millisecond."""
    return low + (high - low) * int.from_bytes(os.urandom(7), "big") / 2**56


class Backoff:
    """The first retry is immediate; then uniform in 0..b, b doubling from 0.2 s to `cap_s`."""

    def __init__(self, cap_s: float, draw: Callable[[float, float], float] = uniform) -> None:
        self._cap_s = cap_s
        self._draw = draw
        self._tries = 0

    def held(self, seconds: float, *, was_used: bool = False) -> None:
        """Note how long a leg held, and whether it carried anything for a tunnel.

        The waits start anew after one that was of use, or held for twice the last b.
        """
        if was_used or seconds >= max(_SHORTEST_HELD_S, 2 * self._bound_s()):
            self._tries = 0

    def next_s(self) -> float:
        """Return the seconds to wait before the next try."""
        self._tries += 1
        return self._draw(0.0, self._bound_s())

    def _bound_s(self) -> float:
        if self._tries <= 1:
            return 0.0
        # min() before the power: after a year of tries it would be a huge number.
        return min(self._cap_s, _FIRST_S * 2.0 ** min(self._tries - 2, 16))
