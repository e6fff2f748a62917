"""Connect, register, serve, reconnect: the only retry loop of the client."""

from __future__ import annotations

import base64
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable

from client.backoff import CAP_S, STABLE_S, Backoff
from client.config import ClientConfig
from client.errors import RelayError
from client.leg import Leg
from client.timer import Timer
from client.transport import Transport, connect
from client.wire import (
    CLOSE_REPLACED_BY_OTHER,
    CLOSE_REPLACED_BY_SELF,
    FLUSH_S,
    INSTANCE_HEADER,
)

# After `going_away` the server is back within seconds: so often, so long (wire, "Resume").
_RESTART_RETRY_S = (0.1, 0.3)
_RESTART_S = 3.0
# How often a timer with no leg looks at its clock; wake() makes it sooner.
_IDLE_TICK_S = 60.0

log = logging.getLogger("http_network_relay.client")


class Agent:
    """Runs until stop(). run() is the leg reader's thread."""

    def __init__(
        self,
        config: ClientConfig,
        rng: random.Random | None = None,
        on_signal: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._rng = rng or random.Random()
        self._backoff = Backoff(self._rng)
        # Random for each process: tells our own return from another machine with our name.
        self._instance = os.urandom(16).hex()
        self._stopping = threading.Event()
        # Guards _current, so that stop() never misses a leg that is just coming up.
        self._lock = threading.Lock()
        self._current: tuple[Transport, Leg] | None = None
        self._timer = Timer(self._tick, on_signal)
        self._thread = threading.Thread(target=self._run, name="leg-reader")
        # The reader's own.
        self._old_legs: list[Leg] = []
        self._restart_until = 0.0

    def start(self, signals: Iterable[int] = ()) -> None:
        """Start the timer and the reader; stop() and join() end them. Main thread."""
        self._timer.start(signals)
        self._thread.start()

    def stop(self) -> None:
        """End all tunnels with a reason and the leg with a close frame."""
        self._stopping.set()
        with self._lock:
            current = self._current
        if current is not None:
            transport, leg = current
            leg.reset_all(RelayError("client_stopped", "the client on the device was stopped"))
            transport.close(1001, "client stopped")
            self._timer.wake()

    def join(self, deadline: float) -> bool:
        """Join the reader and the timer until the deadline; whether both have ended."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._timer.stop()
        return not self._thread.is_alive()

    def _tick(self, now: float, slept: bool) -> float:
        current = self._current
        return current[0].tick(now, slept=slept) if current is not None else now + _IDLE_TICK_S

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                wait_s = self._serve_once()
            except Exception:
                # A bug of ours, or a machine out of threads: nobody is there to restart us.
                log.exception("client failed, next try in %d s", CAP_S)
                wait_s = CAP_S
            self._wait(wait_s)
        deadline = time.monotonic() + FLUSH_S
        for leg in self._old_legs:
            leg.join(deadline)

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _serve_once(self) -> float:
        """One leg from dial to end; return the seconds to wait before the next."""
        try:
            transport = self._connect()
        except RelayError as exc:
            wait_s = self._note_failure(exc)
            if exc.is_retryable and time.monotonic() < self._restart_until:
                return self._rng.uniform(*_RESTART_RETRY_S)
            return wait_s
        leg = Leg(transport, self._config.max_window_bytes)
        # Its tunnels need a second for their ends, which the next leg does not wait for.
        self._old_legs = [*(old for old in self._old_legs if not old.is_over()), leg]
        begun = time.monotonic()
        try:
            transport.start("client")
            with self._lock:
                self._current = (transport, leg)
            self._timer.wake()
            if self._stopping.is_set():
                self.stop()
            config = self._config
            log.info("registered client=%s server=%s", config.name, config.endpoint.url)
            code = leg.serve()
        finally:
            with self._lock:
                self._current = None
            transport.stop()
        wait_s = self._note_end(transport, code, time.monotonic() - begun)
        if leg.spread_s is None:
            return wait_s
        self._restart_until = time.monotonic() + leg.spread_s + _RESTART_S
        return self._rng.uniform(0.0, leg.spread_s)

    def _connect(self) -> Transport:
        config = self._config
        pair = base64.b64encode(f"{config.name}:{config.secret}".encode("ascii")).decode("ascii")
        return connect(
            config.endpoint,
            [f"Authorization: Basic {pair}", f"{INSTANCE_HEADER}: {self._instance}"],
            context=config.context,
            environ=os.environ,
            ping_interval_s=config.ping_interval_s,
            is_cancelled=self._stopping.is_set,
        )

    def _note_failure(self, exc: RelayError) -> float:
        if self._stopping.is_set():
            return 0.0
        if exc.is_retryable:
            log.warning("connect failed reason=%s: %s", exc.code, exc)
            return max(self._backoff.next_s(), exc.retry_after_s or 0.0)
        # Nobody is there to restart us, and the operator may mend it.
        log.error("connect refused reason=%s, next try in %d s: %s", exc.code, CAP_S, exc)
        return CAP_S

    def _note_end(self, transport: Transport, code: int, lasted_s: float) -> float:
        if lasted_s >= STABLE_S:
            self._backoff.reset()
        if self._stopping.is_set():
            log.info("leg closed reason=client_stopped secs=%.1f", lasted_s)
            return 0.0
        if code == CLOSE_REPLACED_BY_OTHER:
            log.error(
                "leg closed: another machine registered as %s; give each its own name,"
                " next try in %d s",
                self._config.name,
                CAP_S,
            )
            return CAP_S
        why = transport.gave_up or f"close code {code}"
        level = logging.INFO if code == CLOSE_REPLACED_BY_SELF else logging.WARNING
        log.log(level, "leg lost secs=%.1f: %s", lasted_s, why)
        return self._backoff.next_s()
