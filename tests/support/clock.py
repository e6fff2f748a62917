"""A clock for tests: time passes when a test says so."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest


class Clock:
    """Seconds that pass when a test says so. A call returns them, as time.monotonic() does."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds

    def replace_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Stand in for `time` in these modules until the test ends. Only monotonic() is there."""
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=self))
