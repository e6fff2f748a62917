"""A tunnel: pairs a user leg with a channel of a client leg, and ends once with one reason.

The counts are docs/protocol.md, "Streams and credit"; the ends are its "Ends". The reader
threads of both legs call in here. Each call decides under the client leg's one lock. Ends and
log lines follow after its release: what so comes late reaches a channel that has ended, and
every receiver drops it.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import Code, takes_turn
from http_network_relay.wire.controls import (
    Ack,
    Control,
    Eof,
    Opened,
    Opening,
    OpenRefused,
    Reset,
    Resume,
    Resumed,
    type_of,
)
from http_network_relay.wire.errors import TunnelError
from server.logs import ROOT_NAME, FieldsAdapter
from server.tunnels.channels import Channels
from server.tunnels.flow_counters import FlowCounters
from server.tunnels.observer import TunnelObserver
from server.tunnels.tunnel_pair import EOF_REASON, TunnelPair
from server.tunnels.tunnel_side import USER_CHANNEL, OwnLeg, TunnelSide, text_frame
from server.tunnels.tunnel_state import TunnelState

_log = logging.getLogger(f"{ROOT_NAME}.tunnel")


class ChannelLeg(Protocol):
    """What a tunnel needs of its client leg."""

    frame_sender: FrameSender
    channels: Channels[Tunnel]
    label: str


class Tunnel(TunnelPair):
    """One tunnel, from the `open` or `resume` that goes to the client to its one end here."""

    def __init__(
        self,
        client_leg: ChannelLeg,
        user_leg: OwnLeg,
        control: Opening,
        user: str,
        rule: str,
        *,
        observer: TunnelObserver[Tunnel] | None = None,
    ) -> None:
        super().__init__(client_leg.channels.lock, control, user, rule)
        self._observer: TunnelObserver[Tunnel] = observer or TunnelObserver()
        self._client_leg = client_leg
        self._user_leg = user_leg
        self._channels = client_leg.channels
        self._started_at = time.monotonic()
        fields = {"client": client_leg.label, "tunnel": control.tunnel_id[:8], "user": user}
        self._log = FieldsAdapter(_log, fields)

    def assign_locked(self, max_window_bytes: int) -> Frame:
        """Take a channel and window; return the `open` or `resume` for the client.

        The caller holds the channels' lock, and MUST queue the frame before the release, so that
        the channels' first messages leave in the order of their numbers.

        Raises:
            Refused: The client takes no further tunnel; nothing was taken.
            TunnelError: The counts of the `resume` cannot be true; nothing was taken.
        """
        channels, asked, is_paced = self._channels, self.asked, self._observer.is_paced
        channels.check_room_locked(self)
        # An `open` has no counts; those of `up` come with the client's answer.
        stands = _counts(asked)
        down = FlowCounters(channels.down_budget, max_window_bytes, *stands, is_paced=is_paced)
        up = FlowCounters(channels.up_budget, max_window_bytes, is_paced=is_paced)
        channel = channels.add_locked(self)
        self._client = TunnelSide(self._client_leg.frame_sender, channel, down)
        self._user = TunnelSide(self._user_leg.frame_sender, USER_CHANNEL, up, self._user_leg)
        self._go_locked(TunnelState.UNPROVEN if self.is_resume else TunnelState.ASKED)
        limit = self._first_limit_locked(self._client, asked.limit)
        self._observer.started(self)
        return text_frame(asked._replace(limit=limit, user=self.user, channel=channel))

    def log_start(self) -> None:
        """Write the tunnel's first line."""
        asked = self.asked
        if isinstance(asked, Resume):
            self._log.info("tunnel resumed attempt=%d", asked.attempt)
            return
        self._log.info("tunnel started host=%s port=%d rule=%s", asked.host, asked.port, self.rule)

    # From the user's leg.

    def on_user_data(self, data: bytes | bytearray | memoryview) -> None:
        """Forward stream bytes to the client."""
        self._pass_data(self._user, self._client, data)

    def on_user_control(self, control: Control) -> None:
        """Act on a checked control of the user's end."""
        if isinstance(control, (Ack, Eof, Reset)):
            self._on_control(self._user, self._client, control)
        else:
            raise TunnelError(f"a second {type_of(control)}")

    def user_lost(self) -> None:
        """The user's leg is gone: the client keeps a tunnel that may be resumed."""
        with self._lock:
            is_kept = self._state is not TunnelState.ASKED
            reason = Code.USER_LOST if is_kept else Code.USER_GONE
            if self._end_locked(reason) is None:
                return
        if is_kept:
            self._client.detach(reason)
        else:
            self._client.reset(reason, "the proxy user's link was lost")
        self._log_end(reason)

    # From the client's leg.

    def on_client_data(self, data: memoryview) -> None:
        """Forward stream bytes to the user."""
        self._pass_data(self._client, self._user, data)

    def on_client_control(self, control: Control) -> None:
        """Act on a checked control of the client's end."""
        if isinstance(control, (Ack, Eof, Reset)):
            self._on_control(self._client, self._user, control)
        elif isinstance(control, (Opened, Resumed)):
            self._on_accepted(control)
        elif isinstance(control, OpenRefused):
            self._on_refused(control.code, control.message)

    def client_lost(self, code: str) -> None:
        """The client's leg is gone, is replaced, or ends with the server."""
        with self._lock:
            before = self._end_locked(code)
        if before is None:
            return
        if before is TunnelState.OPEN:
            self._user.detach(code)
        elif code == Code.SERVER_RESTART:
            self._user.refuse(code, "the relay restarts; try again")
        else:
            self._user.refuse(Code.CLIENT_OFFLINE, "the client's link was lost")
        self._log_end(code)

    # From either.

    def fail(self, error: TunnelError) -> None:
        """A peer broke the tunnel's rules, or a limit ends it: end both sides, the legs go on."""
        with self._lock:
            before = self._end_locked(error.code)
        if before is None:
            return
        if before is TunnelState.UNPROVEN:
            self._client.detach(Code.USER_LOST)
        else:
            self._client.reset(error.code, error.message)
        self._end_user(before, error.code, error.message)
        self._log_end(error.code)

    def _on_accepted(self, control: Opened | Resumed) -> None:
        kind = type_of(control)
        if kind != self.answer:
            raise TunnelError(f"{kind} after {type_of(self.asked)}")
        with self._lock:
            if self.is_over:
                return
            if self._state is TunnelState.OPEN:
                raise TunnelError(f"a second {kind}")
            self._user.sent.start_at(*_counts(control))
            self._go_locked(TunnelState.OPEN)
            limit = self._first_limit_locked(self._user, control.limit)
            self._observer.accepted(self)
            self._user.put_first(control._replace(limit=limit))
        self._user.push()

    def _on_refused(self, code: str, message: str) -> None:
        with self._lock:
            if self._state is TunnelState.OPEN:
                raise TunnelError(f"refused after {self.answer}")
            if self._end_locked(code) is None:
                return
        # An answer to an unsent `open` breaks a rule; without this its buffer has no bound.
        self._client.cancel_first()
        self._user.refuse(code, message)
        self._log_end(code)

    def _on_control(
        self, sender: TunnelSide, receiver: TunnelSide, control: Ack | Eof | Reset
    ) -> None:
        if isinstance(control, Reset):
            self._on_reset(sender, receiver, control.code, control.message)
        elif isinstance(control, Eof):
            self._pass_eof(sender, receiver, control)
        elif self._pass_ack(sender, receiver, control):
            self._user.finish()
            self._log_end(EOF_REASON)
        elif self._observer.is_paced:
            self._observer.credit_headroom(self, receiver is self._user)

    def _on_reset(self, sender: TunnelSide, receiver: TunnelSide, code: str, message: str) -> None:
        """One end gave up: end the other side, in turn where the bytes before the reset count."""
        with self._lock:
            before = self._end_locked(code)
        if before is None:
            return
        sender.on_peer_reset()
        if receiver is self._user:
            self._end_user(before, code, message, in_turn=takes_turn(code))
        else:
            # Behind an unproven `resume` too: a client that refuses the `resume` drops the
            # reset, and one that accepts it has checked the token.
            receiver.reset(code, message, in_turn=takes_turn(code))
        self._log_end(code)

    def _end_user(
        self, before: TunnelState, code: str, message: str, *, in_turn: bool = False
    ) -> None:
        if before is TunnelState.OPEN:
            self._user.reset(code, message, in_turn=in_turn)
        else:
            self._user.refuse(code, message)

    def _first_limit_locked(self, side: TunnelSide, asked: int) -> int:
        """Return the first limit of what this side's peer may send."""
        assert self._lock.locked()
        if not self._observer.is_paced:
            return side.sent.raise_limit(asked)
        wanted = side.sent.ask_first(asked)
        return side.sent.begin(self._observer.first_credit(side is self._user, wanted))

    def _end_locked(self, reason: str) -> TunnelState | None:
        """End the tunnel; return the state before, None if it has ended before."""
        assert self._lock.locked()
        before = self._state
        if self.is_over:
            return None
        is_opened = before is TunnelState.OPEN
        self._go_locked(TunnelState.CLOSED if is_opened else TunnelState.REFUSED)
        del self._channels.tunnels[self.channel]
        self.up.release()
        self.down.release()
        self._observer.ended(self, reason)
        return before

    def _log_end(self, reason: str) -> None:
        secs = time.monotonic() - self._started_at
        up, down = self.up.forwarded, self.down.forwarded
        self._log.info("tunnel closed reason=%s up=%d down=%d secs=%.1f", reason, up, down, secs)


def _counts(control: Opening | Opened | Resumed) -> tuple[int, int]:
    """Return the counts of the end that sends the control: received, delivered."""
    if isinstance(control, (Resume, Resumed)):
        return control.received, control.delivered
    return 0, 0  # A new stream.
