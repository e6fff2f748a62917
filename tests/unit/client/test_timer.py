"""The timer of the client and the script: how signals come to it."""

import os
import queue
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client.timer import Timer

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signal_counts_from_when_it_does_not_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that comes while the others are still being set up."""
    real_signal = signal.signal

    def signal_and_raise(number: int, handler: Callable[..., Any]) -> None:
        real_signal(number, handler)
        os.kill(os.getpid(), number)

    heard: queue.SimpleQueue[int] = queue.SimpleQueue()
    timer = Timer(lambda now, _: now + 60.0, heard.put)
    monkeypatch.setattr(signal, "signal", signal_and_raise)
    timer.start(NUMBERS)
    try:
        assert [heard.get(timeout=10.0) for _ in NUMBERS] == list(NUMBERS)
    finally:
        timer.stop()
