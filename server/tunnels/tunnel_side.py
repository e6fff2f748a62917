"""One side of a tunnel, as the server reaches it: a channel on a leg, and what the peer sends.

Two sides make a tunnel. The user's side has its leg alone, so the end of the tunnel ends the
leg; the client's side is one channel of many.
"""

from __future__ import annotations

from typing import Protocol

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode, Code
from http_network_relay.wire.constants import FLUSH_S, OP_TEXT
from http_network_relay.wire.controls import (
    Ack,
    Control,
    Detached,
    Eof,
    OpenRefused,
    Reset,
    encode_channel,
    encode_control,
)
from server.tunnels.flow_counters import FlowCounters

# The only channel of a user leg, in its frame_sender; on the wire it has no number.
USER_CHANNEL = 0

# The user's end is on a newer leg, and the connection of the older one most likely dead: its
# slot and its thread are needed.
_SUPERSEDED_FLUSH_S = 0.2


class OwnLeg(Protocol):
    """What a tunnel needs of a leg that carries this tunnel alone."""

    frame_sender: FrameSender

    def end(self, close_code: int, reason: str, *, flush_s: float = FLUSH_S) -> None:
        """Close the leg behind all that is queued, hard after `flush_s`."""

    def expect_close(self) -> None:
        """Expect the peer to close the leg now, and cut the leg off if the peer does not."""


def text_frame(control: Control) -> Frame:
    """Return the control as a frame."""
    return Frame(OP_TEXT, b"", encode_control(control))


class TunnelSide:
    """One side of a tunnel. Which state the tunnel is in, the tunnel decides.

    The `put_` methods only queue: they may be called under the lock of the channels, and after
    put_ack() the caller MUST call push(), holding no lock. All other methods MUST be called
    without a lock.
    """

    def __init__(
        self,
        frame_sender: FrameSender,
        channel: int,
        sent: FlowCounters,
        own_leg: OwnLeg | None = None,
    ) -> None:
        """`own_leg`: the leg that ends with the tunnel; None if it carries other tunnels too."""
        self.frame_sender = frame_sender
        self.channel = channel
        # Counts of what this side's peer sends, and of how much it may send.
        self.sent = sent
        self._own_leg = own_leg
        # The bytes before stream bytes; a user leg has none.
        self._head = encode_channel(channel) if own_leg is None else b""

    # While the tunnel goes on.

    def send_data(self, data: bytes | bytearray | memoryview) -> None:
        """Send stream bytes at once if nothing waits, else queue them."""
        self.frame_sender.put_data(self.channel, self._head, data)
        self.frame_sender.push()

    def put_first(self, control: Control) -> None:
        """Queue the answer to the peer's first message."""
        self.frame_sender.put_first(self.channel, self._frame(control))

    def put_ack(self) -> None:
        """Queue an ack of what the peer has sent, with its limit, as both stand now."""
        sent = self.sent
        ack = Ack(sent.delivered, sent.limit, sent.eof_acked, self.channel)
        self.frame_sender.put_ack(self.channel, text_frame(ack))

    def put_eof(self, count: int) -> None:
        """Queue the eof of what the other side's peer has sent."""
        self.frame_sender.put_eof(self.channel, text_frame(Eof(count, self.channel)))

    def push(self) -> None:
        """Send what was queued."""
        self.frame_sender.push()

    # The end. The tunnel has ended before: nothing else is queued behind these.

    def refuse(self, code: str, message: str) -> None:
        """Say that there is no tunnel."""
        self.put_first(OpenRefused(code, message))
        self._end_leg(CloseCode.NORMAL, code)

    def reset(self, code: str, message: str, *, in_turn: bool = False) -> None:
        """Reset the peer's end; `in_turn` behind the queued data."""
        frame = self._frame(Reset(code, message))
        self.frame_sender.put_end(self.channel, frame, in_turn=in_turn)
        # A reset in its turn overtakes after FLUSH_S, and must still be sent then.
        flush_s = FLUSH_S * 2 if in_turn else FLUSH_S
        flush_s = _SUPERSEDED_FLUSH_S if code == Code.SUPERSEDED else flush_s
        self._end_leg(CloseCode.NORMAL, code, flush_s)

    def detach(self, code: str) -> None:
        """Say that the other side's leg is lost, and the tunnel may be resumed."""
        self.frame_sender.put_end(self.channel, self._frame(Detached(code)))
        self._end_leg(CloseCode.RESTART, code)

    def cancel_first(self) -> None:
        """Take an unsent first message back."""
        self.frame_sender.cancel_first(self.channel)

    def finish(self) -> None:
        """Both directions are done: the peer closes a leg of its own by itself."""
        if self._own_leg is not None:
            self._own_leg.expect_close()

    def on_peer_reset(self) -> None:
        """The peer has ended the tunnel: it acts on nothing that is queued for it."""
        if self._own_leg is not None:
            self._own_leg.expect_close()
        else:
            self.frame_sender.drop(self.channel)

    def _end_leg(self, close_code: int, reason: str, flush_s: float = FLUSH_S) -> None:
        if self._own_leg is not None:
            self._own_leg.end(close_code, reason, flush_s=flush_s)

    def _frame(self, control: Control) -> Frame:
        return text_frame(control._replace(channel=self.channel))
