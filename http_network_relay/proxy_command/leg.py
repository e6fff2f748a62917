"""One leg of the proxy command: opens or resumes the tunnel, then receives until the end."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

from http_network_relay.dial.connection import Connection, connect
from http_network_relay.end.channel import Channel
from http_network_relay.end.user_end import UserEnd
from http_network_relay.proxy_command.settings import Settings
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, TUNNEL_HEADER
from http_network_relay.wire.controls import (
    TO_USER,
    Ack,
    Control,
    Detached,
    Eof,
    GoingAway,
    Open,
    Opened,
    Opening,
    OpenRefused,
    Reset,
    Resumed,
    decode_text,
    parse_control,
    type_of,
)
from http_network_relay.wire.errors import LegError, RelayError, TunnelError

# The sentence for each code of `detached`.
_DETACHED = {
    "client_lost": "the client's connection to the relay was lost",
    "client_replaced": "the client connected to the relay anew",
    "server_restart": "the relay is being restarted",
}


def dial_leg(
    settings: Settings, tunnel_id: str = "", is_cancelled: Callable[[], bool] = lambda: False
) -> Connection:
    """Dial the server; `tunnel_id` names a tunnel to resume. Any thread."""
    headers = [f"Authorization: Bearer {settings.token}"]
    if tunnel_id:
        headers.append(f"{TUNNEL_HEADER}: {tunnel_id}")
    return connect(
        settings.endpoint,
        headers,
        context=settings.context,
        environ=os.environ,
        ping_interval_s=settings.ping_interval_s,
        is_cancelled=is_cancelled,
    )


class Leg:
    """A connection with the only channel of a user leg. Main thread unless noted."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.connection = connection
        self.channel = Channel(connection.frame_sender)
        self._settings = settings
        self._server_restarts = False
        # The deadline for the answer, and the reason with which the timer then aborts the leg.
        self._answer_by = float("inf")
        self._no_answer = RelayError("open_timeout", "")

    def ask(self, first: Opening, timeout_s: float) -> None:
        """Send the first message. The caller MUST wake the timer and call answer()."""
        who = f"{self._settings.target}: " if isinstance(first, Open) else ""
        self._no_answer = RelayError("open_timeout", f"{who}no answer from the client in time")
        self._answer_by = time.monotonic() + timeout_s
        self.connection.start("user")
        self.channel.put_first(first)
        self.channel.push()

    def answer(self, first: Opening) -> Opened | Resumed:
        """Wait for the answer to `first`. Raises RelayError."""
        is_open = isinstance(first, Open)
        wanted, word = (Opened, "opened") if is_open else (Resumed, "resumed")
        try:
            while True:
                opcode, payload = self.connection.receive()
                if opcode == OP_CLOSE:
                    raise self._loss(payload)
                if opcode == OP_BINARY:
                    raise TunnelError(f"data came before {word}")
                control = _parse(payload)
                if isinstance(control, wanted):
                    return control
                if isinstance(control, OpenRefused):
                    # Not for a resume: the caller's sentence names the target.
                    who = f"{first.client}: " if is_open else ""
                    raise RelayError(control.code, who + control.message)
                if isinstance(control, (Reset, Detached)):
                    raise _reason(control)
                if not isinstance(control, GoingAway):
                    raise TunnelError(f"{type_of(control)} came before {word}")
                self._server_restarts = True
        except (LegError, TunnelError) as exc:
            raise _server_error(exc) from exc
        finally:
            self._answer_by = float("inf")

    def read(self, end: UserEnd, on_going_away: Callable[[float], None]) -> None:
        """Pass each message to `end` until the leg is lost or the tunnel is detached.

        `on_going_away`: called with the seconds over which the server spreads reconnects.
        """
        pause = functools.partial(end.inbound.on_pause, self.channel)
        on_pause: Callable[[], None] | None = None
        while True:
            try:
                opcode, payload = self.connection.receive(on_pause)
                if opcode == OP_CLOSE:
                    end.detach(self.channel, self._loss(payload))
                    return
                if opcode == OP_BINARY:
                    on_pause = pause if end.inbound.on_data(self.channel, payload) else None
                    continue
                control = _parse(payload)
                if isinstance(control, GoingAway):
                    self._server_restarts = True
                    on_going_away(control.spread_ms / 1000)
                else:
                    self._pass_on(control, end)
                if isinstance(control, Detached) and not end.is_over:
                    return
            except TunnelError as exc:
                end.reset(_server_error(exc))
            except LegError as exc:
                self.connection.close(exc.close_code, str(exc), flush=False)
                end.detach(self.channel, _server_error(exc))
                return

    def _pass_on(self, control: Control, end: UserEnd) -> None:
        if isinstance(control, Ack):
            end.outbound.on_ack(self.channel, control)
        elif isinstance(control, Eof):
            end.inbound.on_eof(self.channel, control.count)
        elif isinstance(control, Reset):
            end.on_reset(self.channel, _reason(control))
        elif isinstance(control, Detached):
            end.detach(self.channel, _reason(control))
        else:
            raise TunnelError(f"{type_of(control)} after the tunnel was open")

    def say_goodbye(self, ended: RelayError | None) -> None:
        """Close the leg of a tunnel that is over. Any thread; idempotent."""
        if ended is not None and ended.code == "user_gone":
            # A leg with an unanswered `resume` has sent no reset; the client accepts one after it.
            self.channel.put_reset(ended)
        self.connection.close(CloseCode.NORMAL)

    def tick(self, now: float, *, slept: bool) -> float:
        """Check the deadlines; return the time of the next call. Timer thread; never waits."""
        if now >= self._answer_by:
            self._answer_by = float("inf")
            self.connection.give_up(self._no_answer)
        return min(self.connection.tick(now, slept=slept), self._answer_by)

    def _loss(self, close_code: int) -> RelayError:
        if self.connection.gave_up is not None:
            return self.connection.gave_up
        where = f"the relay {self._settings.endpoint.host}"
        if close_code == CloseCode.RESTART or self._server_restarts:
            return RelayError("server_restart", f"{where} is being restarted")
        if close_code == 1006:
            return RelayError("leg_lost", f"the connection to {where} was lost")
        return RelayError("leg_lost", f"{where} ended the connection (close code {close_code})")


def _parse(payload: bytes | bytearray) -> Control:
    return parse_control(decode_text(payload), TO_USER, has_channel=False)


def _reason(control: Reset | Detached) -> RelayError:
    if isinstance(control, Reset):
        return RelayError(control.code, control.message)
    cut = f"the tunnel was cut ({control.code})"
    return RelayError(control.code, _DETACHED.get(control.code, cut))


def _server_error(exc: Exception) -> RelayError:
    return RelayError("protocol_error", f"the server broke the protocol: {exc}")
