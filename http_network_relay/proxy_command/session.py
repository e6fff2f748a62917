"""Session: one run of the proxy command, from the first dial to the exit code."""

from __future__ import annotations

import os
import signal
import time

from http_network_relay.dial.backoff import uniform
from http_network_relay.proxy_command.carrier import Carrier
from http_network_relay.proxy_command.leg import dial_leg
from http_network_relay.proxy_command.next_leg import RESTART_RETRY_S, RESTART_S
from http_network_relay.proxy_command.settings import Settings
from http_network_relay.proxy_command.wakeup import Wakeup
from http_network_relay.timer import Timer
from http_network_relay.wire.codes import EXIT_SIGNAL_BASE
from http_network_relay.wire.errors import RelayError

# Signals that mean: the user has gone. ssh sends SIGHUP at the end of each session.
GONE_SIGNALS = ("SIGHUP", "SIGTERM", "SIGINT")


class Session:
    """Opens the tunnel, and passes the timer's ticks and the signals on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timer = Timer(self._tick, self._on_signal)
        self._wakeup = Wakeup()
        # Written by main, read by the timer.
        self._carrier: Carrier | None = None
        self._is_carrying = False

    def run(self) -> int:
        """Return the exit code; raises RelayError for what failed before the tunnel opened."""
        names = [name for name in GONE_SIGNALS if hasattr(signal, name)]
        self._timer.start(getattr(signal, name) for name in names)
        try:
            carrier = self._open_patiently()
            # Before carry(): a signal from here on lets pump-up say goodbye, and kills nothing.
            self._is_carrying = True
            return carrier.carry()
        finally:
            if self._carrier is not None:
                self._carrier.stop()
            self._timer.stop()

    def _open_patiently(self) -> Carrier:
        """Open; try again only while the server restarts, with a new tunnel."""
        restart_until = 0.0
        while True:
            try:
                connection = dial_leg(self._settings)
                carrier = Carrier(self._settings, connection, self._wakeup, self._timer.wake)
                self._carrier = carrier
                carrier.open()
                return carrier
            except RelayError as exc:
                if self._carrier is not None:
                    self._carrier.stop()
                is_restarting = time.monotonic() < restart_until
                if exc.code == "server_restart" and not restart_until:
                    restart_until = time.monotonic() + RESTART_S
                # The client may come back to the new server a moment later than we do.
                elif not (is_restarting and exc.is_retryable):
                    raise
            time.sleep(uniform(*RESTART_RETRY_S))

    # The timer's thread: never writes to the leg, never waits for a lock.

    def _tick(self, now: float, slept: bool) -> float:
        leg = self._carrier.leg if self._carrier is not None else None
        return leg.tick(now, slept=slept) if leg is not None else now + 60.0

    def _on_signal(self, number: int) -> None:
        if not self._is_carrying:
            # Nothing is open and nothing to keep; main may be inside a name lookup.
            os._exit(EXIT_SIGNAL_BASE + number)
        self._wakeup.leave(EXIT_SIGNAL_BASE + number)
