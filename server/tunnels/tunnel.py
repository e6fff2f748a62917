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
from typing import Any, Protocol

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CLOSE_NORMAL, CLOSE_RESTART, ENDS_IN_TURN
from http_network_relay.wire.constants import FLUSH_S, MIN_WINDOW_BYTES, OP_TEXT
from http_network_relay.wire.controls import encode_channel, encode_control
from http_network_relay.wire.errors import TunnelError, TunnelRefused
from server.logs import ROOT_NAME, FieldsAdapter
from server.tunnels.channels import Channels
from server.tunnels.flow_counters import FlowCounters
from server.tunnels.observer import TunnelObserver

_log = logging.getLogger(f"{ROOT_NAME}.tunnel")

# The only channel of a user leg, in its outbox; on the wire it has no number.
USER_CHANNEL = 0


# The first message to the client -> the answer that accepts it.
_ANSWERS = {"open": "opened", "resume": "resumed"}

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


def _text(kind: str, channel: int = 0, **fields: Any) -> Frame:
    return Frame(OP_TEXT, b"", encode_control(kind, channel, **fields))


def _counts(control: dict[str, Any]) -> tuple[int, int]:
    """Return where the end that says it stands: received, delivered. New streams begin at 0."""
    return control.get("received", 0), control.get("delivered", 0)


class Tunnel:
    """One tunnel, from the `open` or `resume` that goes to the client to its one end here."""

    def __init__(
        self,
        client_leg: ChannelLeg,
        user_leg: TunnelLeg,
        control: dict[str, Any],
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
        self._kind: str = control["type"]
        self._user = user
        # By which it was allowed, as the credentials file has it.
        self._rule = rule
        self._started_at = time.monotonic()
        self._log = FieldsAdapter(
            _log,
            {"client": client_leg.label, "tunnel": control["tunnel_id"][:8], "user": user},
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
        self._is_unproven = self._kind == "resume"
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended; once true, true for ever."""
        return self._is_over

    @property
    def asked(self) -> dict[str, Any]:
        """The `open` or `resume`: client, host, port and the rest."""
        return self._control

    @property
    def is_opened(self) -> bool:
        """Whether the client has accepted it; once true, true for ever."""
        return self._is_opened

    @property
    def tunnel_id(self) -> str:
        """Its id, 32 hex digits."""
        return str(self._control["tunnel_id"])

    @property
    def place(self) -> tuple[str, str]:
        """Its client and id, which a `resume` has in common with the tunnel's older leg."""
        return str(self._control["client"]), self.tunnel_id

    @property
    def is_resume(self) -> bool:
        """Whether it came by `resume`."""
        return self._kind == "resume"

    def assign_locked(self, max_window_bytes: int) -> Frame:
        """Take a channel and window; return the `open` or `resume` for the client.

        Raises TunnelRefused, and TunnelError for counts that cannot be true; then nothing was
        taken. The caller holds the lock, and queues what it gets in number order.
        """
        channels = self._channels
        if channels.is_closed:
            raise TunnelRefused("client_offline", "the client's link was lost")
        if min(channels.up_budget.free, channels.down_budget.free) < MIN_WINDOW_BYTES:
            raise TunnelRefused("busy", "the client has too many tunnels; try again later")
        self._check_room_locked()
        # An `open` has no counts; of `up` the client's answer has them.
        counts, is_paced = _counts(self._control), self._record.is_paced
        self.down = FlowCounters(channels.down_budget, max_window_bytes, *counts, is_paced=is_paced)
        self.up = FlowCounters(channels.up_budget, max_window_bytes, is_paced=is_paced)
        channels.highest += 1
        self.channel = channels.highest
        self._prefix = encode_channel(self.channel)
        channels.tunnels[self.channel] = self
        fields = {name: value for name, value in self._control.items() if name != "type"}
        fields["limit"] = self._first_limit_locked(False, self._control["limit"])
        self._record.started(self)
        return _text(self._kind, self.channel, **fields, user=self._user)

    def _first_limit_locked(self, is_up: bool, asked: int) -> int:
        flow = self.up if is_up else self.down
        if not self._record.is_paced:
            return flow.grant(asked)
        return flow.begin(self._record.first_credit(is_up, flow.ask_first(asked)))

    def _check_room_locked(self) -> None:
        """Raise TunnelRefused when the client has as many tunnels as it may have.

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
        raise TunnelRefused(
            "client_full",
            f"as many tunnels of this client are open as may be ({channels.tunnels_at_most})",
        )

    def log_start(self) -> None:
        """Write the tunnel's first line."""
        if self._kind == "resume":
            self._log.info("tunnel resumed attempt=%d", self._control["attempt"])
            return
        host, port = self._control["host"], self._control["port"]
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

    def on_user_control(self, control: dict[str, Any]) -> None:
        """Act on a checked control of the user's end."""
        kind = control["type"]
        if kind == "reset":
            self._on_user_reset(control["code"], control["message"])
            return
        if kind not in ("ack", "eof"):
            raise TunnelError(f"a second {kind}")
        outbox = self._client_leg.outbox
        self._on_flow(control, self.up, self.down, outbox, self.channel)

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

    def on_client_control(self, control: dict[str, Any]) -> None:
        """Act on a checked control of the client's end."""
        kind = control["type"]
        if kind == "reset":
            self._on_client_reset(control["code"], control["message"])
        elif kind in _ANSWERS.values():
            self._on_accepted(control)
        elif kind == "refused":
            self._on_refused(control["code"], control["message"])
        else:
            self._on_flow(control, self.down, self.up, self._user_leg.outbox, USER_CHANNEL)

    def client_lost(self, code: str) -> None:
        """The client's leg is gone, is replaced, or ends with the server."""
        with self._channels.lock:
            was_opened = self._is_opened
            if not self._end_locked(code):
                return
        if was_opened:
            self._user_leg.outbox.put_end(USER_CHANNEL, _text("detached", code=code))
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
            self._user_leg.outbox.put_end(
                USER_CHANNEL, _text("reset", code=error.code, message=message)
            )
            self._user_leg.end(CLOSE_NORMAL, error.code)
        else:
            self._refuse_user(error.code, message)
        self._log_end(error.code)

    def _on_accepted(self, control: dict[str, Any]) -> None:
        kind = control["type"]
        if kind != _ANSWERS[self._kind]:
            raise TunnelError(f"{kind} after {self._kind}")
        with self._ack_order:
            with self._channels.lock:
                if self._is_over:
                    return
                if self._is_opened:
                    raise TunnelError(f"a second {kind}")
                self.up.start_at(*_counts(control))
                self._is_opened, self._is_unproven = True, False
                limit = self._first_limit_locked(True, control["limit"])
                self._record.accepted(self)
            fields = {name: control[name] for name in control if name not in ("type", "channel")}
            frame = _text(kind, **{**fields, "limit": limit})
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
                ack = {"delivered": flow.delivered, "limit": flow.limit, "eof": flow.eof_acked}
            if rise:
                outbox = self._user_leg.outbox if is_up else self._client_leg.outbox
                channel = USER_CHANNEL if is_up else self.channel
                outbox.put_ack(channel, _text("ack", channel, **ack))
        if rise:
            outbox.push()
        return rise, hunger

    def _on_refused(self, code: str, message: str) -> None:
        with self._channels.lock:
            if self._is_over:
                return
            if self._is_opened:
                raise TunnelError(f"refused after {_ANSWERS[self._kind]}")
            self._end_locked(code)
        # Answered before it was sent: a broken rule, and without this a buffer without bound.
        self._client_leg.outbox.cancel_first(self.channel)
        self._refuse_user(code, message)
        self._log_end(code)

    def _on_flow(
        self,
        control: dict[str, Any],
        sent: FlowCounters,
        taken: FlowCounters,
        outbox: FrameSender,
        channel: int,
    ) -> None:
        """An eof of the direction that the peer sends, or an ack of the other."""
        if control["type"] == "eof":
            with self._channels.lock:
                if self._is_over:
                    return
                self._check_opened_locked()
                sent.on_eof(control["count"])
            outbox.put_eof(channel, _text("eof", channel, count=control["count"]))
            return
        with self._ack_order:
            with self._channels.lock:
                if self._is_over:
                    return
                self._check_opened_locked()
                limit = taken.on_ack(control["delivered"], control["limit"], control["eof"])
                is_finished = sent.eof_acked and taken.eof_acked and self._end_locked("eof")
                ack = {"delivered": taken.delivered, "limit": limit, "eof": taken.eof_acked}
            outbox.put_ack(channel, _text("ack", channel, **ack))
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
        self._put_client_reset(code, message, in_turn=code in ENDS_IN_TURN)
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
            in_turn = code in ENDS_IN_TURN
            frame = _text("reset", code=code, message=message)
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
            raise TunnelError(f"data, eof or ack before {_ANSWERS[self._kind]}")

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
        frame = _text("reset", self.channel, code=code, message=message)
        self._client_leg.outbox.put_end(self.channel, frame, in_turn=in_turn)

    def _detach_client(self) -> None:
        frame = _text("detached", self.channel, code="user_lost")
        self._client_leg.outbox.put_end(self.channel, frame)

    def _refuse_user(self, code: str, message: str) -> None:
        frame = _text("refused", code=code, message=message)
        self._user_leg.outbox.put_first(USER_CHANNEL, frame)
        self._user_leg.end(CLOSE_NORMAL, code)

    def _log_end(self, reason: str) -> None:
        secs = time.monotonic() - self._started_at
        up, down = self.up.forwarded, self.down.forwarded
        self._log.info("tunnel closed reason=%s up=%d down=%d secs=%.1f", reason, up, down, secs)
