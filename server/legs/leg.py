"""A WebSocket into the server: what client legs and user legs share.

The handler's thread runs run() and is the leg's reader. It never waits for anything but its
socket, until the leg has ended. Any thread may put frames, or call end() and abort().
"""

from __future__ import annotations

import enum
import logging
import time
from typing import Any

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode
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

# Until the timer's next try, when another thread had the lock.
RETRY_S = 0.01

_PING = Frame(OP_PING, b"", b"")


# A binary message, or a text.
Message = bytes | bytearray | memoryview | str


class ReadEnd(enum.Enum):
    """Why reading has ended."""

    LOST = "lost"  # the stream ended or failed
    CLOSED = "closed"  # the peer sent a close frame
    BROKEN = "broken"  # the peer broke the rules, or our code failed; a close frame is queued


class Leg:
    """What both kinds share: the read loop, pings, the end."""

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
        self.frame_sender = FrameSender(call=self._call_sender)
        self._transport = transport
        self._ping_interval_s = ping_interval_s
        self._timer = timer
        self._sender = sender
        now = time.monotonic()
        # Used by the timer's thread alone.
        self._ping_at = now + ping_interval_s
        # When the timer aborts the leg. A float is read and written whole: no lock.
        self._abort_at = float("inf")
        # Why the leg ends; the first reason stays.
        self.reason = ""

    def run(self, websocket: Any) -> None:
        """Serve the upgraded WebSocket until the leg has ended and its close was sent."""
        self._transport.start(websocket, self.frame_sender)
        try:
            ended = self._read()
            # First: the tunnels' other ends need not wait for this leg's close.
            self.lost()
            if ended is ReadEnd.LOST:
                self._transport.abort()
                self.frame_sender.stop()
            else:
                self._abort_by(time.monotonic() + FLUSH_S)
                if ended is ReadEnd.BROKEN:
                    self._transport.discard_input()
        except BaseException:
            self._transport.abort()
            self.frame_sender.stop()
            raise
        finally:
            # The timer ends a leg whose peer does not read, at the deadline set above.
            self._sender.finish(self)
            self._transport.stop()
            self.frame_sender.stop()

    def send_waiting(self) -> Next:
        """For the sender thread: send what the socket takes at once."""
        if self.frame_sender.push_all():
            return Next.CALLED
        if not self.frame_sender.is_full:
            return Next.AT_ONCE
        return Next.SOON if self._transport.wants_read else Next.WRITABLE

    def fileno(self) -> int:
        """Return the number of the socket, for the sender thread's selector."""
        return self._transport.fileno()

    def _call_sender(self) -> None:
        self._sender.call(self)

    def end(self, close_code: int, reason: str, *, flush_s: float = FLUSH_S) -> None:
        """Send a close behind all that is queued; abort the leg after `flush_s`."""
        self._note(reason)
        self.frame_sender.close(close_frame(close_code))
        self._abort_by(time.monotonic() + flush_s)

    def abort(self, reason: str) -> None:
        """End the leg at once. Never waits."""
        self._note(reason)
        self._transport.abort()

    def tick(self, now: float) -> float:
        """Ping or abort if that is due. For the timer: never writes, never waits for a lock."""
        silent_at = self._transport.heard_at + SILENCE_INTERVALS * self._ping_interval_s
        abort_at = min(silent_at, self._abort_at)
        if now >= abort_at:
            self.abort("silent" if now >= silent_at else "stuck")
            return now + self._ping_interval_s
        if now >= self._ping_at:
            if self.frame_sender.try_put_leg("ping", _PING):
                self._ping_at = now + self._ping_interval_s
            else:
                self._ping_at = now + RETRY_S
        return min(abort_at, self._ping_at)

    def going_away(self, spread_ms: int) -> None:
        """Tell the peer that the server stops soon."""
        text = encode_control(GoingAway(spread_ms))
        self.frame_sender.put_leg("going_away", Frame(OP_TEXT, b"", text))
        self.frame_sender.push()

    def _abort_by(self, when: float) -> None:
        self._abort_at = min(self._abort_at, when)
        self._timer.look(self)

    def _note(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _read(self) -> ReadEnd:
        """Act on messages until the leg ends. Errors of a message end here."""
        try:
            while (message := self._transport.receive())[0] != OP_CLOSE:
                opcode, payload = message
                self._on_message(decode_text(payload) if opcode == OP_TEXT else payload)
        except LegError as exc:
            _log.info("leg broke the rules leg=%s error=%s", self.label, exc)
            self._note("protocol_error")
            self.frame_sender.close(close_frame(exc.close_code), flush=False)
            return ReadEnd.BROKEN
        except Exception:
            _log.exception("leg failed leg=%s", self.label)
            self._note("internal_error")
            self.frame_sender.close(close_frame(CloseCode.INTERNAL_ERROR), flush=False)
            return ReadEnd.BROKEN
        ended = ReadEnd.LOST if message[1] == ABNORMAL_CLOSURE else ReadEnd.CLOSED
        self._note(ended.value)
        return ended

    def _on_message(self, message: Message) -> None:
        raise NotImplementedError

    def lost(self) -> None:
        """Tell the leg's tunnels that it is over. May be called again."""
        raise NotImplementedError

    def revoke(self, code: str, message: str) -> None:
        """End the leg, or its tunnel: the credentials do not allow it any more. Any thread."""
        raise NotImplementedError
