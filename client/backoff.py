"""How long to wait before the next try: exponential backoff with full jitter."""

from __future__ import annotations

import random

FIRST_S = 0.2
CAP_S = 30.0
# A leg that held this long starts the backoff anew.
STABLE_S = 60.0


class Backoff:
    """The first retry is immediate; then uniform in 0..b, b doubling from 0.2 s to 30 s."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._tries = 0

    def reset(self) -> None:
        """Start anew, after a stable minute."""
        self._tries = 0

    def next_s(self) -> float:
        """Return the seconds to wait before the next try."""
        tries, self._tries = self._tries, self._tries + 1
        if tries == 0:
            return 0.0
        # min() before the power: after a year of tries it would be a huge number.
        return self._rng.uniform(0.0, min(CAP_S, FIRST_S * 2 ** min(tries - 1, 16)))
