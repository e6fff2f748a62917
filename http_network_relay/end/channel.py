"""A tunnel's handle on one leg."""

from __future__ import annotations

from typing import Any

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import takes_turn
from http_network_relay.wire.constants import OP_TEXT
from http_network_relay.wire.controls import (
    Ack,
    Control,
    Eof,
    Reset,
    encode_channel,
    encode_control,
)
from http_network_relay.wire.errors import RelayError


class Link:
    """A channel of one leg, as the end of a tunnel uses it. Its identity is what counts.

    `channel` 0 is a user leg's only tunnel. Any thread; it only puts into the outbox.
    """

    def __init__(self, outbox: FrameSender, channel: int = 0) -> None:
        self.outbox = outbox
        self.channel = channel
        self._head = encode_channel(channel) if channel else b""

    def put_first(self, control: Control) -> None:
        """Send the channel's first message."""
        self.outbox.put_first(self.channel, self._text(control))

    def put_data(self, data: Any) -> None:
        """Send stream bytes, with the next push()."""
        self.outbox.put_data_now(self.channel, self._head, data)

    def put_ack(self, ack: Ack) -> None:
        """Send an ack, with the next push()."""
        self.outbox.put_ack(self.channel, self._text(ack))

    def put_eof(self, count: int) -> None:
        """Send an eof, behind the data."""
        self.outbox.put_eof(self.channel, self._text(Eof(count)))

    def put_reset(self, error: RelayError) -> None:
        """Send a reset, behind the data where what came before it counts."""
        frame = self._text(Reset(error.code, str(error)))
        self.outbox.put_end(self.channel, frame, in_turn=takes_turn(error.code))

    def push(self) -> None:
        """Send data and acks that were put. Hold no lock."""
        self.outbox.push()

    def drop(self) -> None:
        """Delete what waits to be sent."""
        self.outbox.drop(self.channel)

    def _text(self, control: Control) -> Frame:
        return Frame(OP_TEXT, b"", encode_control(control._replace(channel=self.channel)))
