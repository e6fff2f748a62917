"""UserLeg: the WebSocket of one proxy user, which carries one tunnel.

The leg's first message asks for the tunnel; the timer refuses a leg whose first message does not
come. An `open` is answered at once. A `resume` may wait for its client: that client's thread
then opens the tunnel, or the timer refuses it.
"""

from __future__ import annotations

import threading
import time
from enum import Enum
from typing import Protocol

from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode, Code
from http_network_relay.wire.constants import FLUSH_S, OP_TEXT
from http_network_relay.wire.controls import (
    FROM_USER,
    Control,
    Open,
    Opening,
    OpenRefused,
    Reset,
    Resume,
    encode_control,
    parse_control,
    type_of,
)
from http_network_relay.wire.errors import Refused, TunnelError
from server.access.credentials import Login
from server.legs.leg import RETRY_S, Leg, Message
from server.legs.pending_resumes import PENDING_RESUME_S, PendingResumes
from server.legs.sender import LegSender
from server.legs.timer import Timer
from server.legs.websocket import Connection, close_frame
from server.tunnels.tunnel import Tunnel
from server.tunnels.tunnel_side import USER_CHANNEL

# A user's end whose tunnel is over closes by itself, at once; this catches an end that does not.
_LATE_CLOSE_S = 10.0


class UserLegState(Enum):
    """State of a user leg, drawn in docs/architecture.md, "States"."""

    # The first message has not come.
    EXPECTING = "expecting"
    # The first message has come, and there is no tunnel yet: a `resume` may wait for its client.
    PENDING = "pending"
    # There is a tunnel. Final: the tunnel's own states go on.
    OPEN = "open"
    # There will be no tunnel. The leg closes, and what comes is ignored.
    REFUSED = "refused"
    # The leg is lost or replaced, without a tunnel.
    GONE = "gone"


USER_LEG_TRANSITIONS: dict[UserLegState, frozenset[UserLegState]] = {
    UserLegState.EXPECTING: frozenset(
        {UserLegState.PENDING, UserLegState.REFUSED, UserLegState.GONE}
    ),
    UserLegState.PENDING: frozenset({UserLegState.OPEN, UserLegState.REFUSED, UserLegState.GONE}),
    UserLegState.OPEN: frozenset(),
    UserLegState.REFUSED: frozenset({UserLegState.GONE}),
    UserLegState.GONE: frozenset(),
}

_WAITING = (UserLegState.EXPECTING, UserLegState.PENDING)
_NEVER = float("inf")


class TunnelOpener(Protocol):
    """What makes the tunnel that a leg's first message asks for."""

    def open(self, leg: UserLeg, control: Opening) -> Tunnel:
        """Pair the leg with its client. Raises Refused, TunnelError."""

    def refused(self, control: Opening, reason: str) -> None:
        """The leg has ended, and its first message made no tunnel. May do what a timer may not."""


class UserLeg(Leg):
    """The leg of one proxy user: one tunnel, named by its first message."""

    def __init__(
        self,
        transport: Connection,
        login: Login,
        ping_interval_s: float,
        timer: Timer,
        sender: LegSender,
        opener: TunnelOpener,
        pending: PendingResumes[UserLeg],
        first_message_s: float,
    ) -> None:
        """`first_message_s`: from the upgrade to `open` or `resume`; a client leg has neither."""
        super().__init__(transport, login, ping_interval_s, timer, sender)
        self._opener = opener
        self._pending = pending
        self._first_message_s = first_message_s
        # Guards _state, _asked, _deadline and the setting of tunnel. Held while the tunnel is
        # opened, so that another thread that ends the leg finds either no tunnel, and none is
        # opened any more, or the tunnel itself: before all other locks.
        self._opening = threading.Lock()
        self._state = UserLegState.EXPECTING
        # The first message, from its arrival until lost() has reported it.
        self._asked: Opening | None = None
        # Until when the leg may stay EXPECTING or PENDING. A float is read whole: the timer looks
        # at it without the lock.
        self._deadline = time.monotonic() + first_message_s
        self.tunnel: Tunnel | None = None
        # The timer's last frames that are not queued yet: used by the timer's thread alone.
        self._last_frames: list[tuple[str, Frame]] = []

    def expect_close(self) -> None:
        """Expect the user's end to close now, and cut the leg off if it does not."""
        self._abort_by(time.monotonic() + _LATE_CLOSE_S)

    def replace(self) -> None:
        """The user's end is back on a newer leg, and does not read this one: end it at once."""
        self._note("replaced")
        # Before the newer leg's `resume` can come, and without waiting for the reader.
        self.lost()
        self.abort("replaced")

    def opened_tunnel(self) -> Tunnel | None:
        """Return the tunnel; wait for one that is being opened. Any thread."""
        with self._opening:
            return self.tunnel

    def revoke(self, code: str, message: str) -> None:
        """As in Leg."""
        before = self._leave_waiting(UserLegState.REFUSED)
        if self.tunnel is not None:
            self.tunnel.fail(TunnelError(message, code=code))
        elif before in _WAITING:
            self._refuse(code, message)

    def lost(self) -> None:
        """End the tunnel for the client, or report a first message that made no tunnel."""
        self._leave_waiting(UserLegState.GONE)
        if self.tunnel is not None:
            self.tunnel.user_lost()
            return
        with self._opening:
            asked, self._asked = self._asked, None
        if asked is not None:
            self._opener.refused(asked, self.reason)

    # Messages.

    def _on_message(self, message: Message) -> None:
        tunnel = self.tunnel
        if tunnel is None:
            self._on_message_without_tunnel(message)
            return
        try:
            if isinstance(message, str):
                tunnel.on_user_control(parse_control(message, FROM_USER, has_channel=False))
            else:
                tunnel.on_user_data(message)
        except TunnelError as exc:
            tunnel.fail(exc)

    def _on_message_without_tunnel(self, message: Message) -> None:
        # Only this thread leaves EXPECTING for PENDING.
        is_first = self._state is UserLegState.EXPECTING
        if not is_first:
            # Before the answer only a reset is right: the `resume` waits no more.
            before = self._leave_waiting(UserLegState.REFUSED)
            if before is UserLegState.OPEN:
                self._on_message(message)
            if before is not UserLegState.PENDING:
                return
        try:
            if not isinstance(message, str):
                raise TunnelError("data before open")
            control = parse_control(message, FROM_USER, has_channel=False)
            if is_first:
                self._on_first(control)
            elif isinstance(control, Reset):
                self.end(CloseCode.NORMAL, control.code)
            else:
                raise TunnelError(f"{type_of(control)} before resumed")
        except TunnelError as exc:
            if not is_first or self._leave_waiting(UserLegState.REFUSED) in _WAITING:
                self._refuse(exc.code, str(exc))

    def _on_first(self, control: Control) -> None:
        if not isinstance(control, (Open, Resume)):
            raise TunnelError(f"{type_of(control)} before open")
        with self._opening:
            self._asked = control
            if self._state is not UserLegState.EXPECTING:
                return  # The thread that ended the leg has answered.
            self._go_locked(UserLegState.PENDING)
            if isinstance(control, Resume):
                # Before the client is looked for, see PendingResumes.add.
                self._pending.add(control.client, self)
                self._deadline = time.monotonic() + PENDING_RESUME_S
            else:
                self._deadline = _NEVER
        if isinstance(control, Resume):
            self._timer.look(self)
        self.try_open()

    # The tunnel that the first message asks for: opened, refused, or forgotten, once.

    def try_open(self) -> None:
        """Open the tunnel that the first message asks for, or refuse it. Any thread.

        Nothing if the leg is not PENDING. A `resume` goes on waiting for an absent client.
        """
        refusal: Refused | TunnelError | None = None
        with self._opening:
            control = self._asked
            if self._state is not UserLegState.PENDING or control is None:
                return
            try:
                self.tunnel = self._opener.open(self, control)
                self._go_locked(UserLegState.OPEN)
            except (Refused, TunnelError) as exc:
                if isinstance(control, Resume) and exc.code == Code.CLIENT_OFFLINE:
                    return
                refusal = exc
                self._go_locked(UserLegState.REFUSED)
            self._discard_locked()
        if refusal is not None:
            self._refuse(refusal.code, str(refusal))
        elif self.tunnel is not None:
            self.tunnel.log_start()

    def _leave_waiting(self, state: UserLegState) -> UserLegState:
        """Go to `state` unless there is a tunnel, or the leg is there; return the state before."""
        with self._opening:
            before = self._state
            if state in USER_LEG_TRANSITIONS[before]:
                self._go_locked(state)
            self._discard_locked()
        return before

    def _go_locked(self, state: UserLegState) -> None:
        assert self._opening.locked()
        assert state in USER_LEG_TRANSITIONS[self._state], (self._state, state)
        self._state = state

    def _discard_locked(self) -> None:
        assert self._opening.locked()
        if isinstance(self._asked, Resume):
            self._pending.discard(self._asked.client, self)

    def _refuse(self, code: str, message: str) -> None:
        """Answer the first message with `refused`, and close."""
        self.frame_sender.put_first(USER_CHANNEL, _refused(code, message))
        self.end(CloseCode.NORMAL, code)

    # The timer's.

    def tick(self, now: float) -> float:
        """For the timer, as in Leg; refuses a leg that stays silent, or waits in vain."""
        if now >= self._deadline and not self._give_up(now):
            return min(super().tick(now), now + RETRY_S)
        return min(super().tick(now), self._deadline)

    def _give_up(self, now: float) -> bool:
        """Send `refused` and close, where the deadline has passed; False: try again soon.

        Waits for no lock.
        """
        if not self._last_frames:
            if not self._opening.acquire(blocking=False):
                return False
            try:
                before = self._state
                if now < self._deadline:
                    return True  # The first message came in this moment.
                if before not in _WAITING:
                    self._deadline = _NEVER
                    return True
                self._go_locked(UserLegState.REFUSED)
            finally:
                self._opening.release()
            if before is UserLegState.PENDING:
                code, message = Code.CLIENT_OFFLINE, "the client did not come back"
            else:
                within_s = self._first_message_s
                code = Code.NO_OPEN
                message = f"neither open nor resume came within {within_s:g} s"
            self._note(code)
            # By slots of the fast lane, in this order: they are queued without waiting. Nothing
            # may follow the close, so no ping does.
            refused = _refused(code, message)
            self._last_frames = [("refused", refused), ("close", close_frame(CloseCode.NORMAL))]
            self._ping_at = _NEVER
            self._abort_at = min(self._abort_at, now + FLUSH_S)
        while self._last_frames:
            if not self.frame_sender.try_put_leg(*self._last_frames[0]):
                return False
            del self._last_frames[0]
        self._deadline = _NEVER
        return True


def _refused(code: str, message: str) -> Frame:
    return Frame(OP_TEXT, b"", encode_control(OpenRefused(code, message)))
