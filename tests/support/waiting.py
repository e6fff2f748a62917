"""The one place in which a test polls. All other waits use a Condition or an Event."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Short against every deadline of the relay; long enough that polling costs little CPU.
_POLL_S = 0.005


def eventually(
    predicate: Callable[[], T], timeout_s: float = 5.0, *, message: str | None = None
) -> T:
    """Call `predicate` until its value is true, and return the value.

    Raises AssertionError with `message` (or the predicate's last value) after `timeout_s`.
    An AssertionError out of the predicate counts as "not yet"; the last one is chained.
    """
    never = threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        problem: AssertionError | None = None
        value: T | None = None
        try:
            value = predicate()
            if value:
                return value
        except AssertionError as exc:
            problem = exc
        if time.monotonic() >= deadline:
            what = message or f"still {problem or value!r}"
            raise AssertionError(f"{what}, after {timeout_s} s") from problem
        never.wait(_POLL_S)
