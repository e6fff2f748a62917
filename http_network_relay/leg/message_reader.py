"""The messages that come in on one leg; pings and closes are answered on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from http_network_relay.leg.frame_reader import FrameReader
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import (
    MAX_MESSAGE_BYTES,
    MAX_PING_BYTES,
    OP_CLOSE,
    OP_CONTINUATION,
    OP_PING,
    OP_PONG,
)
from http_network_relay.wire.errors import LegError

# RFC 6455, 7.4.1: codes that stand in no close frame.
NO_STATUS = 1005
ABNORMAL_CLOSURE = 1006


class MessageReader:
    """Reads whole messages by `frames`, all other frames by a WebSocket library.

    The leg's reader alone uses it. It never writes: pongs and close replies go through `sender`.

    Args:
        read_odd: Returns the next frame that `frames` leaves: opcode, payload, and whether it is
            the last of its message. Raises LegError for a bad one, EOFError at the stream's end.
    """

    def __init__(
        self,
        frames: FrameReader,
        sender: FrameSender,
        read_odd: Callable[[], tuple[int, Any, bool]],
    ) -> None:
        self._frames = frames
        self._sender = sender
        self._read_odd = read_odd
        # A message in fragments, which some proxies make; opcode 0: there is none.
        self._parts = bytearray()
        self._parts_opcode = 0

    def receive(self, on_pause: Callable[[], None] | None = None) -> tuple[int, Any]:
        """Wait for the next message: (OP_TEXT or OP_BINARY, payload), or (OP_CLOSE, code).

        A lost connection is a close with ABNORMAL_CLOSURE. Calls `on_pause`, if given, when nothing
        comes for PAUSE_S. Raises LegError.
        """
        while True:
            try:
                taken = self._frames.read_message(on_pause)
                opcode, payload, is_last = (*taken, True) if taken else self._read_odd()
            except (OSError, EOFError):
                return OP_CLOSE, ABNORMAL_CLOSURE
            if opcode == OP_PING:
                if len(payload) > MAX_PING_BYTES:
                    raise LegError("a ping is too long")
                self._sender.put_leg("pong", Frame(OP_PONG, b"", payload))
                self._sender.push()
            elif opcode == OP_CLOSE:
                code = payload[:2]
                self._sender.close(Frame(OP_CLOSE, b"", code), flush=False)
                return OP_CLOSE, int.from_bytes(code, "big") if code else NO_STATUS
            elif opcode != OP_PONG:
                message = self._assemble(opcode, payload, is_last=is_last)
                if message is not None:
                    return message

    def _assemble(self, opcode: int, payload: Any, *, is_last: bool) -> tuple[int, Any] | None:
        if (opcode == OP_CONTINUATION) != bool(self._parts_opcode):
            raise LegError("a fragment out of place")
        if opcode != OP_CONTINUATION:
            if is_last:
                return opcode, payload
            self._parts_opcode = opcode
        self._parts += payload
        if len(self._parts) > MAX_MESSAGE_BYTES:
            raise LegError("a message is too long", CloseCode.TOO_BIG)
        if not is_last:
            return None
        message = (self._parts_opcode, bytes(self._parts))
        self._parts, self._parts_opcode = bytearray(), 0
        return message
