"""A WebSocket into the server: what all legs share, and ClientLeg, which carries many tunnels.

The handler's thread runs run() and is the leg's reader; the timer ticks. Who puts into the
outbox sends, or the sender does, and a writer thread from when the socket first would not take
what there was. Any thread may call end(). The reader never waits for anything but its socket
(rule 3 of the design).
"""

from __future__ import annotations

import enum
import logging
import time
from typing import Any

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CLOSE_INTERNAL_ERROR
from http_network_relay.wire.constants import (
    FLUSH_S,
    OP_CLOSE,
    OP_PING,
    OP_TEXT,
    SILENCE_INTERVALS,
)
from http_network_relay.wire.controls import GoingAway, decode_text, encode_control
from http_network_relay.wire.errors import LegError
from server.access.credentials import Login
from server.legs.sender import LegSender, Next
from server.legs.timer import Timer
from server.legs.websocket import Connection, close_frame
from server.logs import ROOT_NAME

_log = logging.getLogger(f"{ROOT_NAME}.leg")

# The timer's next try when a lock was taken.
RETRY_S = 0.01

_PING = Frame(OP_PING, b"", b"")


# A binary message, or a text.
Message = bytes | bytearray | memoryview | str


class ReadEnd(enum.Enum):
    """Why reading has ended."""

    LOST = "lost"  # the stream ended or failed: nobody is there
    CLOSED = "closed"  # the peer sent a close frame, and nothing comes after it
    BROKEN = "broken"  # the peer broke the rules, or we did; a close frame is queued


class Leg:
    """What both kinds share: reader loop, writer, pings, the end."""

    def __init__(
        self,
        transport: Connection,
        login: Login,
        ping_interval_s: float,
        timer: Timer,
        sender: LegSender,
    ) -> None:
        self.login = login
        # Of the client or the user, for logs.
        self.label = login.name
        self.outbox = FrameSender(call=self._call_sender)
        self._transport = transport
        self._ping_interval_s = ping_interval_s
        self._timer = timer
        self._sender = sender
        now = time.monotonic()
        # Used by the timer's thread alone.
        self._ping_at = now + ping_interval_s
        # When the leg is shut down hard. A float is read and written whole: no lock.
        self._abort_at = float("inf")
        # Why it ends; the first reason stays.
        self.reason = ""

    def run(self, websocket: Any) -> None:
        """Serve the upgraded WebSocket until the leg has ended and its writer is gone."""
        self._transport.start(websocket, self.outbox)
        try:
            ended = self._read()
            # The tunnels' other ends hear of it before anything here can take time.
            self.lost()
            if ended is ReadEnd.LOST:
                self._transport.abort()
                self.outbox.stop()
            else:
                self._abort_by(time.monotonic() + FLUSH_S)
                if ended is ReadEnd.BROKEN:
                    self._transport.discard_input()
        except BaseException:
            self._transport.abort()
            self.outbox.stop()
            raise
        finally:
            # The timer ends a leg whose peer does not read, at the deadline set above.
            self._sender.finish(self)
            self._transport.stop()
            self.outbox.stop()

    def send_waiting(self) -> Next:
        """For the sender thread: send what the socket takes at once."""
        if self.outbox.push_all():
            if self.outbox.is_over:
                self._transport.finish_sending()
            return Next.CALLED
        if not self.outbox.is_full:
            return Next.AT_ONCE
        return Next.SOON if self._transport.wants_read else Next.WRITABLE

    def fileno(self) -> int:
        """Return the number of the socket, for the sender thread's selector."""
        return self._transport.fileno()

    def _call_sender(self) -> None:
        self._sender.call(self)

    def end(self, close_code: int, reason: str, *, flush_s: float = FLUSH_S) -> None:
        """Send a close behind all that is queued; shut down hard after `flush_s`."""
        self._note(reason)
        self.outbox.close(close_frame(close_code))
        self._abort_by(time.monotonic() + flush_s)

    def abort(self, reason: str) -> None:
        """Shut down at once. Never waits."""
        self._note(reason)
        self._transport.abort()

    def tick(self, now: float) -> float:
        """For the timer: never writes, never waits for a lock (rule 7)."""
        silent_at = self._transport.heard_at + SILENCE_INTERVALS * self._ping_interval_s
        abort_at = min(silent_at, self._abort_at)
        if now >= abort_at:
            self.abort("silent" if now >= silent_at else "stuck")
            return now + self._ping_interval_s
        if now >= self._ping_at:
            if self.outbox.try_put_leg("ping", _PING):
                self._ping_at = now + self._ping_interval_s
            else:
                self._ping_at = now + RETRY_S
        return min(abort_at, self._ping_at)

    def going_away(self, spread_ms: int) -> None:
        """The server stops soon: say so."""
        text = encode_control(GoingAway(spread_ms))
        self.outbox.put_leg("going_away", Frame(OP_TEXT, b"", text))
        self.outbox.push()

    def _abort_by(self, when: float) -> None:
        self._abort_at = min(self._abort_at, when)
        self._timer.look(self)

    def _note(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _read(self) -> ReadEnd:
        """Take in messages until the leg ends. What a message raises is caught here alone."""
        try:
            while (message := self._transport.receive())[0] != OP_CLOSE:
                opcode, payload = message
                self._on_message(decode_text(payload) if opcode == OP_TEXT else payload)
        except LegError as exc:
            _log.info("leg broke the rules leg=%s error=%s", self.label, exc)
            self._note("protocol_error")
            self.outbox.close(close_frame(exc.close_code), flush=False)
            return ReadEnd.BROKEN
        except Exception:
            _log.exception("leg failed leg=%s", self.label)
            self._note("internal_error")
            self.outbox.close(close_frame(CLOSE_INTERNAL_ERROR), flush=False)
            return ReadEnd.BROKEN
        ended = ReadEnd.LOST if message[1] == ABNORMAL_CLOSURE else ReadEnd.CLOSED
        self._note(ended.value)
        return ended

    def _on_message(self, message: Message) -> None:
        raise NotImplementedError

    def lost(self) -> None:
        """The leg is over: tell its tunnels. Again is harmless."""
        raise NotImplementedError

    def revoke(self, code: str, message: str) -> None:
        """End what the credentials do not allow any more, and say why. Any thread."""
        raise NotImplementedError
