"""Connect, register, serve, reconnect: the only retry loop of the client."""

from __future__ import annotations

import base64
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable

from client.config import ClientConfig
from client.leg import Leg
from client.tunnel_table import TunnelTable
from http_network_relay.dial.backoff import Backoff, uniform
from http_network_relay.dial.connection import Connection, connect
from http_network_relay.timer import Timer
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import INSTANCE_HEADER
from http_network_relay.wire.errors import RelayError

# The longest wait between two tries; also the wait after a refusal that a retry cannot cure.
CAP_S = 30.0
# The retry interval after `going_away`, and its duration (docs/protocol.md, "Resume").
_RESTART_RETRY_S = (0.1, 0.3)
_RESTART_S = 3.0
# The timer's period without a leg; wake() ends the period early.
_IDLE_TICK_S = 60.0

log = logging.getLogger("http_network_relay.client")


class _Run:
    """A leg that is up, and its reader thread."""

    def __init__(self, connection: Connection, leg: Leg, serve: Callable[[_Run], None]) -> None:
        self.connection = connection
        self.leg = leg
        self.begun = time.monotonic()
        self.code: int = CloseCode.INTERNAL_ERROR
        self.thread = threading.Thread(target=serve, args=(self,), name="leg-reader")


class Agent:
    """Runs until stop(). One thread connects; each leg has a reader thread."""

    def __init__(
        self,
        config: ClientConfig,
        draw: Callable[[float, float], float] = uniform,
        on_signal: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._draw = draw
        self._backoff = Backoff(CAP_S, draw)
        self._tunnels = TunnelTable(config.max_window_bytes, config.grace_s, config.allow)
        # Random per process: distinguishes a reconnect from another machine with the same name.
        self._instance = os.urandom(16).hex()
        self._stopping = threading.Event()
        # Guards the replacement of _runs, so that stop() never misses a new leg. Two legs
        # are up while the server restarts: the old one and the next.
        self._lock = threading.Lock()
        self._runs: tuple[_Run, ...] = ()
        self._timer = Timer(self._tick, on_signal)
        self._thread = threading.Thread(target=self._run, name="connect")
        # Used only by the connecting thread, which joins the readers.
        self._readers: list[threading.Thread] = []
        self._restart_until = 0.0

    def start(self, signals: Iterable[int] = ()) -> None:
        """Start the timer and connect. Main thread; the caller MUST call stop() and join()."""
        self._timer.start(signals)
        self._thread.start()

    def stop(self) -> None:
        """Reset all tunnels with a reason and close every leg with a close frame."""
        self._stopping.set()
        with self._lock:
            runs = self._runs
        self._tunnels.reset_all(
            RelayError("client_stopped", "the client on the device was stopped")
        )
        for run in runs:
            run.connection.close(1001, "client stopped")
            run.leg.is_leaving.set()
        self._timer.wake()

    def join(self, deadline: float) -> bool:
        """Join all threads until the deadline; return whether all have ended."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        is_over = self._tunnels.join(deadline)
        self._timer.stop()
        return is_over and not self._thread.is_alive()

    def _tick(self, now: float, slept: bool) -> float:
        due = [run.connection.tick(now, slept=slept) for run in self._runs]
        return min(due, default=now + _IDLE_TICK_S)

    # The connecting thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                wait_s = self._serve_once()
            except Exception:
                # A bug, or no more threads. Exit is no option: no supervisor may exist to restart.
                log.exception("client failed, next try in %d s", CAP_S)
                wait_s = CAP_S
            self._wait(wait_s)
        for reader in self._readers:  # Bounded: the timer ends a leg that does not close.
            reader.join()

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _serve_once(self) -> float:
        """Run one leg until the next is due; return the seconds to wait before the next."""
        try:
            connection = self._connect()
        except RelayError as exc:
            return self._note_failure(exc)
        run = self._start(connection)
        leg = run.leg
        leg.is_leaving.wait()
        if leg.spread_s is not None and not self._stopping.is_set():
            # Do not join the reader: the next leg connects while this one still works.
            self._restart_until = time.monotonic() + leg.spread_s + _RESTART_S
            self._note_leg(run)
            return self._draw(0.0, leg.spread_s)
        run.thread.join()
        self._note_leg(run)
        return CAP_S if run.code == CloseCode.REPLACED_BY_OTHER else self._backoff.next_s()

    def _start(self, connection: Connection) -> _Run:
        run = _Run(connection, Leg(connection, self._tunnels), self._serve)
        self._change_runs(add=run)
        try:
            connection.start("client")
            log.info("registered client=%s server=%s", self._config.name, self._config.endpoint.url)
            run.thread.start()
            self._readers = [*filter(threading.Thread.is_alive, self._readers), run.thread]
        except BaseException:
            self._change_runs(drop=run)
            connection.stop()
            raise
        self._timer.wake()
        if self._stopping.is_set():
            self.stop()
        return run

    def _change_runs(self, *, add: _Run | None = None, drop: _Run | None = None) -> None:
        with self._lock:
            runs = [run for run in self._runs if run is not drop]
            self._runs = (*runs, add) if add is not None else tuple(runs)

    def _connect(self) -> Connection:
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
            if time.monotonic() < self._restart_until:
                return self._draw(*_RESTART_RETRY_S)
            return max(self._backoff.next_s(), exc.retry_after_s or 0.0)
        # Retry all the same: the operator may correct the cause, and no supervisor may exist.
        log.error("connect refused reason=%s, next try in %d s: %s", exc.code, CAP_S, exc)
        return CAP_S

    def _note_leg(self, run: _Run) -> None:
        self._backoff.lasted(time.monotonic() - run.begun, was_used=run.leg.was_used)

    # A leg's reader.

    def _serve(self, run: _Run) -> None:
        try:
            run.code = run.leg.serve()
        except Exception:
            log.exception("leg failed")
        finally:
            self._change_runs(drop=run)
            run.connection.stop()
        self._log_end(run, time.monotonic() - run.begun)

    def _log_end(self, run: _Run, secs: float) -> None:
        if self._stopping.is_set():
            log.info("leg closed reason=client_stopped secs=%.1f", secs)
        elif run.code == CloseCode.REPLACED_BY_OTHER:
            log.error(
                "leg closed: another machine registered as %s; give each its own name,"
                " next try in %d s",
                self._config.name,
                CAP_S,
            )
        else:
            why = run.connection.gave_up or f"close code {run.code}"
            is_expected = run.code == CloseCode.REPLACED_BY_SELF or run.leg.spread_s is not None
            level = logging.INFO if is_expected else logging.WARNING
            log.log(level, "leg lost secs=%.1f: %s", secs, why)
