"""Pairs a user leg with a channel of a client leg; counts, and ends once with one reason.

The counts are docs/protocol.md, "Streams and credit"; the ends are its "Ends". The
reader threads of both legs come in here. Each call decides under the client leg's one
lock and acts (outboxes, log) after it: an act that comes late reaches a channel that has
ended, which every receiver drops.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CLOSE_NORMAL, CLOSE_RESTART, takes_turn
from http_network_relay.wire.constants import FLUSH_S, MIN_WINDOW_BYTES, OP_TEXT
from http_network_relay.wire.controls import (
    Ack,
    Control,
    Detached,
    Eof,
    Opened,
    Opening,
    OpenRefused,
    Reset,
    Resume,
    Resumed,
    encode_channel,
    encode_control,
    type_of,
)
from http_network_relay.wire.errors import Refused, TunnelError
from server.logs import ROOT_NAME, FieldsAdapter
from server.tunnels.channels import Channels
from server.tunnels.flow_counters import FlowCounters
from server.tunnels.observer import TunnelObserver

_log = logging.getLogger(f"{ROOT_NAME}.tunnel")

# The only channel of a user leg, in its outbox; on the wire it has no number.
USER_CHANNEL = 0


# The user's end is on a newer leg, and the link of this one most likely dead: its slot and
# thread are wanted.
_SUPERSEDED_FLUSH_S = 0.2


class TunnelLeg(Protocol):
    """What a tunnel needs of its user leg."""

    outbox: FrameSender

    def end(self, close_code: int, reason: str, *, flush_s: float = FLUSH_S) -> None:
        """Close the leg after what is queued, hard after `flush_s`."""

    def expect_close(self) -> None:
        """The peer closes the leg now by itself; see that it does."""


class ChannelLeg(Protocol):
    """What a tunnel needs of its client leg."""

    outbox: FrameSender
    channels: Channels[Tunnel]
    label: str


def _text(control: Control) -> Frame:
    return Frame(OP_TEXT, b"", encode_control(control))


def _counts(control: Opening | Opened | Resumed) -> tuple[int, int]:
    """Return where the end that says it stands: received, delivered. New streams begin at 0."""
    if isinstance(control, (Resume, Resumed)):
        return control.received, control.delivered
    return 0, 0


class Tunnel:
    """One tunnel, from the `open` or `resume` that goes to the client to its one end here."""

    def __init__(
        self,
        client_leg: ChannelLeg,
        user_leg: TunnelLeg,
        control: Opening,
        user: str,
        rule: str,
        *,
        record: TunnelObserver[Tunnel] | None = None,
    ) -> None:
        self._record: TunnelObserver[Tunnel] = record or TunnelObserver()
        self._client_leg = client_leg
        self._user_leg = user_leg
        self._channels = client_leg.channels
        self._control = control
        self._user = user
        # By which it was allowed, as the credentials file has it.
        self._rule = rule
        self._started_at = time.monotonic()
        self._log = FieldsAdapter(
            _log,
            {"client": client_leg.label, "tunnel": control.tunnel_id[:8], "user": user},
        )
        # Held from an ack's counting until it is queued, so that limits leave in order though
        # two threads raise them; taken before the channels' lock, never under it.
        self._ack_order = threading.Lock()
        # The rest is guarded by the lock of the client leg's channels.
        self.channel = 0
        self._prefix = b""
        # Whether the client has answered `opened` or `resumed`.
        self._is_opened = False
        # A `resume` whose token the client has not checked: it must not end the tunnel.
        self._is_unproven = self.is_resume
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended; once true, true for ever."""
        return self._is_over

    @property
    def asked(self) -> Opening:
        """The `open` or `resume`: client, host, port and the rest."""
        return self._control

    @property
    def is_opened(self) -> bool:
        """Whether the client has accepted it; once true, true for ever."""
        return self._is_opened

    @property
    def tunnel_id(self) -> str:
        """Its id, 32 hex digits."""
        return self._control.tunnel_id

    @property
    def place(self) -> tuple[str, str]:
        """Its client and id, which a `resume` has in common with the tunnel's older leg."""
        return self._control.client, self.tunnel_id

    @property
    def is_resume(self) -> bool:
        """Whether it came by `resume`."""
        return isinstance(self._control, Resume)

    @property
    def _answer(self) -> str:
        """The type of the answer that accepts it."""
        return "resumed" if self.is_resume else "opened"

    def assign_locked(self, max_window_bytes: int) -> Frame:
        """Take a channel and window; return the `open` or `resume` for the client.

        Raises Refused, and TunnelError for counts that cannot be true; then nothing was
        taken. The caller holds the lock, and queues what it gets in number order.
        """
        channels = self._channels
        if channels.is_closed:
            raise Refused("client_offline", "the client's link was lost")
        if min(channels.up_budget.free, channels.down_budget.free) < MIN_WINDOW_BYTES:
            raise Refused("busy", "the client has too many tunnels; try again later")
        self._check_room_locked()
        # An `open` has no counts; of `up` the client's answer has them.
        counts, is_paced = _counts(self._control), self._record.is_paced
        self.down = FlowCounters(channels.down_budget, max_window_bytes, *counts, is_paced=is_paced)
        self.up = FlowCounters(channels.up_budget, max_window_bytes, is_paced=is_paced)
        channels.highest += 1
        self.channel = channels.highest
        self._prefix = encode_channel(self.channel)
        channels.tunnels[self.channel] = self
        limit = self._first_limit_locked(False, self._control.limit)
        self._record.started(self)
        passed_on = self._control._replace(limit=limit, user=self._user, channel=self.channel)
        return _text(passed_on)

    def _first_limit_locked(self, is_up: bool, asked: int) -> int:
        flow = self.up if is_up else self.down
        if not self._record.is_paced:
            return flow.grant(asked)
        return flow.begin(self._record.first_credit(is_up, flow.ask_first(asked)))

    def _check_room_locked(self) -> None:
        """Raise Refused when the client has as many tunnels as it may have.

        A `resume` does not count beside its own older channel; an `open` always does, whatever
        id its user has chosen.
        """
        channels = self._channels
        if not channels.tunnels_at_most or len(channels.tunnels) < channels.tunnels_at_most:
            return
        mine = (self._user, self.tunnel_id)
        older = ((each._user, each.tunnel_id) for each in channels.tunnels.values())
        if self.is_resume and mine in older:
            return
        raise Refused(
            "client_full",
            f"as many tunnels of this client are open as may be ({channels.tunnels_at_most})",
        )

    def log_start(self) -> None:
        """Write the tunnel's first line."""
        if isinstance(self._control, Resume):
            self._log.info("tunnel resumed attempt=%d", self._control.attempt)
            return
        host, port = self._control.host, self._control.port
        self._log.info("tunnel started host=%s port=%d rule=%s", host, port, self._rule)

    # From the user's leg.

    def on_user_data(self, data: bytes | bytearray | memoryview) -> None:
        """Forward stream bytes to the client."""
        with self._channels.lock:
            if self._is_over:
                return
            self._check_opened_locked()
            self.up.on_data(len(data))
        outbox = self._client_leg.outbox
        outbox.put_data_now(self.channel, self._prefix, data)
        outbox.push()

    def on_user_control(self, control: Control) -> None:
        """Act on a checked control of the user's end."""
        if isinstance(control, Reset):
            self._on_user_reset(control.code, control.message)
        elif isinstance(control, (Ack, Eof)):
            self._on_flow(control, self.up, self.down, self._client_leg.outbox, self.channel)
        else:
            raise TunnelError(f"a second {type_of(control)}")

    def user_lost(self) -> None:
        """The user's leg is gone."""
        with self._channels.lock:
            is_kept = self._is_opened or self._is_unproven
            reason = "user_lost" if is_kept else "user_gone"
            if not self._end_locked(reason):
                return
        if is_kept:
            self._detach_client()
        else:
            self._reset_client("user_gone", "the proxy user's link was lost")
        self._log_end(reason)

    # From the client's leg.

    def on_client_data(self, data: memoryview) -> None:
        """Forward stream bytes to the user."""
        with self._channels.lock:
            if self._is_over:
                return
            self._check_opened_locked()
            self.down.on_data(len(data))
        outbox = self._user_leg.outbox
        outbox.put_data_now(USER_CHANNEL, b"", data)
        outbox.push()

    def on_client_control(self, control: Control) -> None:
        """Act on a checked control of the client's end."""
        if isinstance(control, Reset):
            self._on_client_reset(control.code, control.message)
        elif isinstance(control, (Opened, Resumed)):
            self._on_accepted(control)
        elif isinstance(control, OpenRefused):
            self._on_refused(control.code, control.message)
        elif isinstance(control, (Ack, Eof)):
            self._on_flow(control, self.down, self.up, self._user_leg.outbox, USER_CHANNEL)

    def client_lost(self, code: str) -> None:
        """The client's leg is gone, is replaced, or ends with the server."""
        with self._channels.lock:
            was_opened = self._is_opened
            if not self._end_locked(code):
                return
        if was_opened:
            self._user_leg.outbox.put_end(USER_CHANNEL, _text(Detached(code)))
            self._user_leg.end(CLOSE_RESTART, code)
        elif code == "server_restart":
            self._refuse_user(code, "the relay restarts; try again")
        else:
            self._refuse_user("client_offline", "the client's link was lost")
        self._log_end(code)

    # From either.

    def fail(self, error: TunnelError) -> None:
        """A peer broke the tunnel's rules: reset both ends, the legs go on."""
        with self._channels.lock:
            was_opened = self._is_opened
            if not self._end_locked(error.code):
                return
        message = str(error)
        self._reset_client(error.code, message)
        if was_opened:
            self._user_leg.outbox.put_end(USER_CHANNEL, _text(Reset(error.code, message)))
            self._user_leg.end(CLOSE_NORMAL, error.code)
        else:
            self._refuse_user(error.code, message)
        self._log_end(error.code)

    def _on_accepted(self, control: Opened | Resumed) -> None:
        kind = type_of(control)
        if kind != self._answer:
            raise TunnelError(f"{kind} after {type_of(self._control)}")
        with self._ack_order:
            with self._channels.lock:
                if self._is_over:
                    return
                if self._is_opened:
                    raise TunnelError(f"a second {kind}")
                self.up.start_at(*_counts(control))
                self._is_opened, self._is_unproven = True, False
                limit = self._first_limit_locked(True, control.limit)
                self._record.accepted(self)
            frame = _text(control._replace(limit=limit, channel=USER_CHANNEL))
            self._user_leg.outbox.put_first(USER_CHANNEL, frame)
        self._user_leg.outbox.push()

    def raise_limit(self, is_up: bool, size: int) -> tuple[int, int]:
        """Raise a paced limit by `size` at most, and tell the sender.

        Return by how much it rose, and by how much it still might. Any thread.
        """
        with self._ack_order:
            with self._channels.lock:
                if self._is_over or not self._is_opened:
                    return 0, 0
                flow = self.up if is_up else self.down
                rise = flow.raise_by(size)
                hunger = flow.hunger
                ack = Ack(flow.delivered, flow.limit, flow.eof_acked)
            if rise:
                outbox = self._user_leg.outbox if is_up else self._client_leg.outbox
                channel = USER_CHANNEL if is_up else self.channel
                outbox.put_ack(channel, _text(ack._replace(channel=channel)))
        if rise:
            outbox.push()
        return rise, hunger

    def _on_refused(self, code: str, message: str) -> None:
        with self._channels.lock:
            if self._is_over:
                return
            if self._is_opened:
                raise TunnelError(f"refused after {self._answer}")
            self._end_locked(code)
        # Answered before it was sent: a broken rule, and without this a buffer without bound.
        self._client_leg.outbox.cancel_first(self.channel)
        self._refuse_user(code, message)
        self._log_end(code)

    def _on_flow(
        self,
        control: Ack | Eof,
        sent: FlowCounters,
        taken: FlowCounters,
        outbox: FrameSender,
        channel: int,
    ) -> None:
        """An eof of the direction that the peer sends, or an ack of the other."""
        if isinstance(control, Eof):
            with self._channels.lock:
                if self._is_over:
                    return
                self._check_opened_locked()
                sent.on_eof(control.count)
            outbox.put_eof(channel, _text(Eof(control.count, channel)))
            return
        with self._ack_order:
            with self._channels.lock:
                if self._is_over:
                    return
                self._check_opened_locked()
                limit = taken.on_ack(control.delivered, control.limit, control.eof)
                is_finished = sent.eof_acked and taken.eof_acked and self._end_locked("eof")
                ack = Ack(taken.delivered, limit, taken.eof_acked, channel)
            outbox.put_ack(channel, _text(ack))
        outbox.push()
        if is_finished:
            self._user_leg.expect_close()
            self._log_end("eof")
        elif self._record.is_paced:
            self._record.hungry(self, taken is self.up)

    def _on_user_reset(self, code: str, message: str) -> None:
        """The user's end gave up: tell the client, in turn where the bytes before it count."""
        with self._channels.lock:
            if not self._end_locked(code):
                return
        # Behind a `resume` too: a client that refuses that drops this, and one that accepts it
        # has checked the token.
        self._put_client_reset(code, message, in_turn=takes_turn(code))
        self._user_leg.expect_close()
        self._log_end(code)

    def _on_client_reset(self, code: str, message: str) -> None:
        """The client's end gave this channel up: tell the user, and close that leg."""
        with self._channels.lock:
            was_opened = self._is_opened
            if not self._end_locked(code):
                return
        self._client_leg.outbox.drop(self.channel)
        if was_opened:
            in_turn = takes_turn(code)
            frame = _text(Reset(code, message))
            self._user_leg.outbox.put_end(USER_CHANNEL, frame, in_turn=in_turn)
            # A reset in its turn overtakes after FLUSH_S, and must still get out then.
            flush_s = FLUSH_S * 2 if in_turn else FLUSH_S
            flush_s = _SUPERSEDED_FLUSH_S if code == "superseded" else flush_s
            self._user_leg.end(CLOSE_NORMAL, code, flush_s=flush_s)
        else:
            self._refuse_user(code, message)
        self._log_end(code)

    def _check_opened_locked(self) -> None:
        if not self._is_opened:
            raise TunnelError(f"data, eof or ack before {self._answer}")

    def _end_locked(self, reason: str) -> bool:
        """End it; False if it has ended before."""
        if self._is_over:
            return False
        self._is_over = True
        del self._channels.tunnels[self.channel]
        self.up.release()
        self.down.release()
        self._record.ended(self, reason)
        return True

    def _reset_client(self, code: str, message: str) -> None:
        if self._is_unproven:
            self._detach_client()
        else:
            self._put_client_reset(code, message)

    def _put_client_reset(self, code: str, message: str, *, in_turn: bool = False) -> None:
        frame = _text(Reset(code, message, self.channel))
        self._client_leg.outbox.put_end(self.channel, frame, in_turn=in_turn)

    def _detach_client(self) -> None:
        frame = _text(Detached("user_lost", self.channel))
        self._client_leg.outbox.put_end(self.channel, frame)

    def _refuse_user(self, code: str, message: str) -> None:
        frame = _text(OpenRefused(code, message))
        self._user_leg.outbox.put_first(USER_CHANNEL, frame)
        self._user_leg.end(CLOSE_NORMAL, code)

    def _log_end(self, reason: str) -> None:
        secs = time.monotonic() - self._started_at
        up, down = self.up.forwarded, self.down.forwarded
        self._log.info("tunnel closed reason=%s up=%d down=%d secs=%.1f", reason, up, down, secs)
