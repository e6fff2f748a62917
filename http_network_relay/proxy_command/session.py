"""Session: one run of the proxy command, from the dial to the exit code."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable

from http_network_relay.dial.backoff import Backoff, uniform
from http_network_relay.dial.connection import Connection, connect
from http_network_relay.end.channel import Channel
from http_network_relay.end.stream import Position
from http_network_relay.end.user_end import UserEnd
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.proxy_command.messages import complain
from http_network_relay.proxy_command.next_leg import RESTART_RETRY_S, RESTART_S, NextLeg
from http_network_relay.proxy_command.pumps import Pumps
from http_network_relay.proxy_command.settings import Settings
from http_network_relay.timer import Timer
from http_network_relay.wire.codes import (
    CLOSE_NORMAL,
    CLOSE_RESTART,
    EXIT_CLEAN,
    EXIT_SIGNAL_BASE,
    EXIT_TUNNEL_LOST,
)
from http_network_relay.wire.constants import FLUSH_S, OP_BINARY, OP_CLOSE, TUNNEL_HEADER
from http_network_relay.wire.controls import (
    TO_USER,
    Ack,
    Detached,
    Eof,
    GoingAway,
    Open,
    Opened,
    Opening,
    OpenRefused,
    Reset,
    Resume,
    Resumed,
    decode_text,
    parse_control,
    type_of,
)
from http_network_relay.wire.errors import LegError, RelayError, TunnelError

# Longer than the client's own dial (10 s), so that the user reads the client's reason; and
# than the server holds a resume whose client is not back yet (10 s).
ANSWER_TIMEOUT_S = 15.0

# The longest wait between two tries to resume.
RESUME_CAP_S = 5.0

# Signals that mean: the user has gone. ssh sends SIGHUP at the end of each session.
GONE_SIGNALS = ("SIGHUP", "SIGTERM", "SIGINT")


class Session:
    """One run: dial, open, pump, resume, and the right exit code. Main's thread but where said."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timer = Timer(self._tick, self._on_signal)
        self._pumps = Pumps()
        # What the timer looks at; written by main.
        self._connection: Connection | None = None
        self._is_pumping = False
        self._answer_by = float("inf")
        self._no_answer = RelayError("open_timeout", "")
        # One tunnel: the end, its link on the present leg, and what `resume` repeats.
        self._channel = Channel(FrameSender())
        self._end = UserEnd(self._channel, settings.max_window_bytes)
        self._opening: Open | None = None
        self._attempt = 0
        self._next_leg: NextLeg | None = None
        self._server_restarts = False
        # Why the last try to resume failed.
        self._failure: RelayError | None = None

    def run(self) -> int:
        """Return the exit code; raises RelayError for what failed before the tunnel opened."""
        names = [name for name in GONE_SIGNALS if hasattr(signal, name)]
        self._timer.start(getattr(signal, name) for name in names)
        try:
            self._open_patiently()
            return self._carry()
        finally:
            unused = self._next_leg.take() if self._next_leg is not None else None
            if unused is not None:
                unused.stop()
            if self._connection is not None:
                self._leave(self._connection)
            self._timer.stop()

    # Before the tunnel is open.

    def _open_patiently(self) -> None:
        """Open; try again only while the server restarts, with a new tunnel."""
        restart_until = 0.0
        while True:
            try:
                self._open(self._connect())
                return
            except RelayError as exc:
                if self._connection is not None:
                    self._leave(self._connection)
                is_restarting = time.monotonic() < restart_until
                if exc.code == "server_restart" and not restart_until:
                    restart_until = time.monotonic() + RESTART_S
                # The client may come back to the new server a moment later than we do.
                elif not (is_restarting and exc.is_retryable):
                    raise
            time.sleep(uniform(*RESTART_RETRY_S))

    def _open(self, connection: Connection) -> None:
        """Ask for the tunnel and wait for the answer."""
        settings = self._settings
        self._channel = Channel(connection.outbox)
        self._end = UserEnd(self._channel, settings.max_window_bytes, self._on_change)
        self._opening = Open(
            client=settings.client,
            host=settings.host,
            port=settings.port,
            protocol="tcp",
            tunnel_id=os.urandom(16).hex(),
            resume_token=os.urandom(32).hex(),
            limit=self._end.first_limit,
            grace_s=settings.grace_s,
        )
        answer = self._ask(connection, self._opening, ANSWER_TIMEOUT_S)
        assert isinstance(answer, Opened)  # _ask() returns nothing else for an Open.
        if not self._end.on_open(answer.limit, min(settings.grace_s, answer.grace_s)):
            raise self._end.ended or RelayError("leg_lost", "the tunnel was lost")

    def _connect(self) -> Connection:
        """Dial one leg; also in the thread of NextLeg."""
        settings = self._settings
        headers = [f"Authorization: Bearer {settings.token}"]
        if self._end.grace_s and self._opening is not None:
            headers.append(f"{TUNNEL_HEADER}: {self._opening.tunnel_id}")
        return connect(
            settings.endpoint,
            headers,
            context=settings.context,
            environ=os.environ,
            ping_interval_s=settings.ping_interval_s,
            is_cancelled=self._is_too_late,
        )

    def _is_too_late(self) -> bool:
        """Whether a leg that is being dialled is of no use any more."""
        return self._end.is_over or (self._end.is_detached and not self._end.resume_left_s())

    def _ask(self, connection: Connection, asked: Opening, timeout_s: float) -> Opened | Resumed:
        """Send a new leg's first message; return its answer. Raises RelayError."""
        is_open = isinstance(asked, Open)
        wanted = Opened if is_open else Resumed
        answer = "opened" if is_open else "resumed"
        self._server_restarts = False
        self._connection = connection
        connection.start("user")
        channel = Channel(connection.outbox)
        channel.put_first(asked)
        channel.push()
        who = f"{self._settings.target}: " if is_open else ""
        self._no_answer = RelayError("open_timeout", f"{who}no answer from the client in time")
        self._answer_by = time.monotonic() + timeout_s
        self._timer.wake()
        try:
            # Who ends the tunnel closes the leg that it sees. From here on it sees this one.
            if self._end.is_over:
                raise RelayError("leg_lost", "the tunnel ended meanwhile")
            while True:
                opcode, payload = connection.receive()
                if opcode == OP_CLOSE:
                    raise self._lost(connection, payload)
                if opcode == OP_BINARY:
                    raise TunnelError(f"data came before {answer}")
                control = parse_control(decode_text(payload), TO_USER, has_channel=False)
                if isinstance(control, wanted):
                    return control
                if isinstance(control, OpenRefused):
                    # A resume that is refused is reported with the whole target.
                    who = f"{self._settings.client}: " if is_open else ""
                    raise RelayError(control.code, who + control.message)
                if isinstance(control, Reset):
                    raise RelayError(control.code, control.message)
                if isinstance(control, Detached):
                    raise RelayError(control.code, _detached(control.code))
                if not isinstance(control, GoingAway):
                    raise TunnelError(f"{type_of(control)} came before {answer}")
                self._server_restarts = True
        except (LegError, TunnelError) as exc:
            raise RelayError("protocol_error", f"the server broke the protocol: {exc}") from exc
        finally:
            self._answer_by = float("inf")

    # While it is open.

    def _carry(self) -> int:
        """Carry the tunnel, from leg to leg, until it is over; return the exit code."""
        end, pumps = self._end, self._pumps
        # In this order: a signal from here on lets pump-up say goodbye, and ends nothing hard.
        self._is_pumping = True
        pumps.start(end)
        backoff = Backoff(RESUME_CAP_S)
        while (connection := self._connection) is not None:
            begun, counts = time.monotonic(), end.counts
            self._read(connection)
            self._leave(connection)
            if not end.is_over:
                backoff.lasted(time.monotonic() - begun, was_used=end.counts != counts)
                self._come_back(backoff)
        pumps.wake()  # A tunnel that expires tells nobody.
        # What came before the end may still be handed on, for a second.
        if pumps.exit_code is None:
            pumps.join(FLUSH_S)
        if end.is_finished:
            return EXIT_CLEAN
        if pumps.exit_code is not None:
            return pumps.exit_code
        ended = end.ended or RelayError("leg_lost", "the tunnel was lost")
        sentence = f"{self._settings.target}: {ended}"
        if end.has_expired:
            sentence += f"; not resumed within {end.grace_s:.0f} s"
            sentence += f": {self._failure}" if self._failure is not None else ""
        complain(RelayError(ended.code, sentence))
        return EXIT_TUNNEL_LOST

    def _read(self, connection: Connection) -> None:
        """Read a leg until the tunnel has ended or the leg is lost."""
        end, channel = self._end, self._channel
        pause = functools.partial(end.inbound.on_pause, channel)
        on_pause: Callable[[], None] | None = None
        while True:
            try:
                opcode, payload = connection.receive(on_pause)
                if opcode == OP_CLOSE:
                    end.detach(channel, self._lost(connection, payload))
                    return
                if opcode == OP_BINARY:
                    on_pause = pause if end.inbound.on_data(channel, payload) else None
                elif self._on_control(payload):
                    return
            except TunnelError as exc:
                end.reset(RelayError("protocol_error", f"the server broke the protocol: {exc}"))
            except LegError as exc:
                connection.close(exc.close_code, str(exc), flush=False)
                error = RelayError("protocol_error", f"the server broke the protocol: {exc}")
                end.detach(channel, error)
                return

    def _on_control(self, payload: bytes | bytearray) -> bool:
        """Hand one control to the tunnel; whether the leg has no more to say."""
        control = parse_control(decode_text(payload), TO_USER, has_channel=False)
        end, channel = self._end, self._channel
        if isinstance(control, Ack):
            end.outbound.on_ack(channel, control)
        elif isinstance(control, Eof):
            end.inbound.on_eof(channel, control.count)
        elif isinstance(control, Reset):
            end.on_reset(channel, RelayError(control.code, control.message))
        elif isinstance(control, Detached):
            end.detach(channel, RelayError(control.code, _detached(control.code)))
            return not end.is_over
        elif isinstance(control, GoingAway):
            self._on_going_away(control.spread_ms / 1000)
        else:
            raise TunnelError(f"{type_of(control)} after the tunnel was open")
        return False

    def _on_going_away(self, spread_s: float) -> None:
        self._server_restarts = True
        connection = self._connection
        if self._next_leg is None and self._end.grace_s and connection is not None:
            self._next_leg = NextLeg(self._end, self._connect, spread_s)
            # The loss of the old leg is what main waits for.
            self._next_leg.start(on_up=connection.abort)

    def _come_back(self, backoff: Backoff) -> None:
        """Resume on another leg, until it works or the tunnel is over."""
        end = self._end
        next_leg, self._next_leg = self._next_leg, None
        connection = next_leg.take() if next_leg is not None else None
        wait_s = 0.0 if connection is not None else backoff.next_s()
        while True:
            end.wait_over(wait_s)
            if end.is_over:
                if connection is not None:
                    connection.stop()
                return
            try:
                self._resume(connection or self._connect())
                self._failure = None
                return
            except RelayError as exc:
                if self._connection is not None:
                    self._leave(self._connection)
                # At the very end it is the haste that failed.
                if self._failure is None or end.resume_left_s():
                    self._failure = exc
                if not exc.is_retryable:
                    end.on_end(RelayError(exc.code, str(exc)))
                wait_s = max(backoff.next_s(), exc.retry_after_s or 0.0)
                connection = None

    def _resume(self, connection: Connection) -> None:
        self._attempt += 1
        position = self._end.begin_resume()
        assert self._opening is not None  # Only an open tunnel is resumed.
        received, delivered, limit = position
        asked = Resume(
            **self._opening._replace(limit=limit)._asdict(),
            attempt=self._attempt,
            received=received,
            delivered=delivered,
        )
        timeout_s = min(ANSWER_TIMEOUT_S, self._end.resume_left_s())
        answer = self._ask(connection, asked, timeout_s)
        assert isinstance(answer, Resumed)  # _ask() returns nothing else for a Resume.
        self._channel = Channel(connection.outbox)
        peer = Position(answer.received, answer.delivered, answer.limit)
        try:
            self._end.on_resumed(self._channel, peer)
        except TunnelError as exc:
            raise RelayError("protocol_error", f"the client broke the protocol: {exc}") from exc
        if self._end.is_over:  # It expired while we asked.
            raise RelayError("leg_lost", "the tunnel ended meanwhile")

    def _leave(self, connection: Connection) -> None:
        if self._end.is_over:
            # Who ended it has perhaps not come to that, or did not see this leg yet.
            self._say_goodbye(connection)
        self._connection = None
        connection.stop()

    def _on_change(self) -> None:
        """Any thread: credit came, the leg was lost, or the tunnel is over."""
        self._pumps.wake()
        connection = self._connection
        if self._end.is_over and connection is not None:
            self._say_goodbye(connection)
            self._timer.wake()

    def _say_goodbye(self, connection: Connection) -> None:
        """Close a leg of a tunnel that is over. Any thread; again is harmless."""
        ended = self._end.ended
        if ended is not None and ended.code == "user_gone":
            # Again, for a leg that is just resuming: behind the `resume` it counts.
            Channel(connection.outbox).put_reset(ended)
        connection.close(CLOSE_NORMAL)

    def _lost(self, connection: Connection, close_code: int) -> RelayError:
        if connection.gave_up is not None:
            return connection.gave_up
        where = f"the relay {self._settings.endpoint.host}"
        if close_code == CLOSE_RESTART or self._server_restarts:
            return RelayError("server_restart", f"{where} is being restarted")
        if close_code == 1006:
            return RelayError("leg_lost", f"the connection to {where} was lost")
        return RelayError("leg_lost", f"{where} ended the connection (close code {close_code})")

    # The timer's thread: never writes to the leg, never waits for a lock.

    def _tick(self, now: float, slept: bool) -> float:
        connection = self._connection
        if connection is None:
            return now + 60.0
        if now >= self._answer_by:
            self._answer_by = float("inf")
            connection.give_up(self._no_answer)
        return min(connection.tick(now, slept=slept), self._answer_by)

    def _on_signal(self, number: int) -> None:
        if not self._is_pumping:
            # Nothing is open and nothing to keep; main may be inside a name lookup.
            os._exit(EXIT_SIGNAL_BASE + number)
        self._pumps.leave(EXIT_SIGNAL_BASE + number)


def _detached(code: str) -> str:
    sentences = {
        "client_lost": "the client's connection to the relay was lost",
        "client_replaced": "the client connected to the relay anew",
        "server_restart": "the relay is being restarted",
    }
    return sentences.get(code, f"the tunnel was cut ({code})")
