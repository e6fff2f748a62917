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


class Channel:
    """One channel of one leg, as the end of a tunnel uses it. Compared by identity.

    A user leg has one channel, with `channel_id` 0. Any thread; every put_... only queues.
    """

    def __init__(self, frame_sender: FrameSender, channel_id: int = 0) -> None:
        self.frame_sender = frame_sender
        self.channel_id = channel_id
        self._head = encode_channel(channel_id) if channel_id else b""

    def put_first(self, control: Control) -> None:
        """Send the channel's first message."""
        self.frame_sender.put_first(self.channel_id, self._text(control))

    def put_data(self, data: Any) -> None:
        """Send stream bytes, with the next push()."""
        self.frame_sender.put_data(self.channel_id, self._head, data)

    def put_ack(self, ack: Ack) -> None:
        """Send an ack, with the next push()."""
        self.frame_sender.put_ack(self.channel_id, self._text(ack))

    def put_eof(self, count: int) -> None:
        """Send an eof, behind the data."""
        self.frame_sender.put_eof(self.channel_id, self._text(Eof(count)))

    def put_reset(self, error: RelayError) -> None:
        """Send a reset, behind the data where what came before it counts."""
        frame = self._text(Reset(error.code, str(error)))
        self.frame_sender.put_end(self.channel_id, frame, in_turn=takes_turn(error.code))

    def push(self) -> None:
        """Send data and acks that were put. Hold no lock."""
        self.frame_sender.push()

    def drop(self) -> None:
        """Delete what waits to be sent."""
        self.frame_sender.drop(self.channel_id)

    def _text(self, control: Control) -> Frame:
        return Frame(OP_TEXT, b"", encode_control(control._replace(channel=self.channel_id)))
