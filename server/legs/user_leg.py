"""UserLeg: the WebSocket of one proxy user, which carries one tunnel.

Its first message asks for the tunnel, and is refused by the timer if it does not come. An `open`
is answered at once; a `resume` may wait for its client, and is then opened by that client's
thread, or refused by the timer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CLOSE_NORMAL, Code
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
from server.legs.leg import RETRY_S, Helpers, Leg, Message
from server.legs.pending_resumes import PendingResumes
from server.legs.websocket import Connection, close_frame
from server.tunnels.tunnel import USER_CHANNEL, Tunnel

# A user's end whose tunnel is over closes by itself, at once; this catches one that does not.
_LATE_CLOSE_S = 10.0

OpenTunnel = Callable[["UserLeg", Opening], Tunnel]


class UserLeg(Leg):
    """The leg of one proxy user: one tunnel, named by its first message."""

    def __init__(
        self,
        transport: Connection,
        label: str,
        ping_interval_s: float,
        helpers: Helpers,
        open_tunnel: OpenTunnel,
        held: PendingResumes[UserLeg],
        first_message_s: float,
    ) -> None:
        """`first_message_s`: from the upgrade to `open` or `resume`; a client leg has neither."""
        super().__init__(transport, label, ping_interval_s, helpers)
        self._open_tunnel = open_tunnel
        self._held = held
        # By when that must have come: a float, read by the timer.
        self._first_by = time.monotonic() + first_message_s
        self._no_open = f"neither open nor resume came within {first_message_s:g} s"
        # The reader's own: the first message, once it has come.
        self._first: Opening | None = None
        # Nothing that comes is heard any more. Set by the reader and the timer.
        self._is_refused = False
        # Guards the next two and the setting of tunnel. Held while the tunnel is opened, so that
        # whoever else decides about it finds either what is wanted or the tunnel itself:
        # before all other locks.
        self._opening = threading.Lock()
        # Whether a first message may still be acted on: the reader may have it in its hands when
        # another thread ends the leg.
        self._is_expecting = True
        # The first message while there is no tunnel for it yet.
        self._wanted: Opening | None = None
        self.tunnel: Tunnel | None = None
        # Until when a `resume` waits: a float, set by the reader, read by the timer.
        self._held_until = float("inf")
        # Told once, when the leg ends, of a first message that made no tunnel here. It may do
        # what the timer may not.
        self.on_refused: Callable[[Opening, str], None] | None = None
        # What the timer has still to put: used by its thread alone.
        self._last_words: list[tuple[str, Frame]] = []

    def expect_close(self) -> None:
        """The user's end closes now by itself; see that it does."""
        self._abort_by(time.monotonic() + _LATE_CLOSE_S)

    def refuse(self, code: str, message: str) -> None:
        """Answer the first message with `refused`, and close."""
        self._is_refused = True
        self.outbox.put_first(USER_CHANNEL, _refused(code, message))
        self.end(CLOSE_NORMAL, code)

    def replace(self) -> None:
        """The user's end is back on a newer leg, and deaf to this one: end it at once."""
        self._note("replaced")
        # Before the newer leg's `resume` can come, and without waiting for the reader.
        self.lost()
        self.abort("replaced")

    def opened_tunnel(self) -> Tunnel | None:
        """Return the tunnel; one that is just being opened is waited for. Any thread."""
        with self._opening:
            return self.tunnel

    def revoke(self, code: str, message: str) -> None:
        """As in Leg."""
        tunnel = self._stop_waiting()
        if tunnel is not None:
            tunnel.fail(TunnelError(message, code=code))
        else:
            self.refuse(code, message)

    def lost(self) -> None:
        """Tell the client of its tunnel."""
        tunnel = self._stop_waiting()
        if tunnel is not None:
            tunnel.user_lost()
            return
        with self._opening:
            tell, self.on_refused = self.on_refused, None
        if tell is not None and self._first is not None:
            tell(self._first, self.reason)

    # What comes in.

    def _on_message(self, message: Message) -> None:
        if self._is_refused:
            return
        tunnel = self.tunnel
        if tunnel is None and self._first is not None:
            # Before its answer nothing but a reset can be right: it waits no more.
            tunnel = self._stop_waiting()
        try:
            if not isinstance(message, str):
                if tunnel is None:
                    raise TunnelError("data before open")
                tunnel.on_user_data(message)
                return
            control = parse_control(message, FROM_USER, has_channel=False)
            if tunnel is not None:
                tunnel.on_user_control(control)
            elif self._first is None:
                self._on_first(control)
            elif isinstance(control, Reset):
                self._is_refused = True
                self.end(CLOSE_NORMAL, control.code)
            else:
                raise TunnelError(f"{type_of(control)} before resumed")
        except TunnelError as exc:
            if tunnel is None:
                self.refuse(exc.code, str(exc))
            else:
                tunnel.fail(exc)

    def _on_first(self, control: Control) -> None:
        if not isinstance(control, (Open, Resume)):
            raise TunnelError(f"{type_of(control)} before open")
        self._first = control
        self._first_by = float("inf")
        with self._opening:
            if not self._is_expecting:
                return  # Who ended the leg has answered.
            self._is_expecting = False
            self._wanted = control
        if isinstance(control, Resume):
            # Before the client is looked for, see HeldResumes.park.
            self._held_until = self._held.park(control.client, self)
            self._helpers.look_again(self)
        self.open_wanted()

    # The tunnel that is wanted: opened, refused, or forgotten, once.

    def open_wanted(self) -> None:
        """Open the tunnel that the first message asks for, or refuse it. Any thread.

        Nothing if it wants none any more; a `resume` goes on waiting for an absent client.
        """
        refusal: Refused | TunnelError | None = None
        with self._opening:
            control = self._wanted
            if control is None:
                return
            try:
                self.tunnel = self._open_tunnel(self, control)
            except (Refused, TunnelError) as exc:
                if isinstance(control, Resume) and exc.code == Code.CLIENT_OFFLINE:
                    return
                refusal = exc
            self._wanted = None
        self._forget_held()
        if refusal is not None:
            self.refuse(refusal.code, str(refusal))
        elif self.tunnel is not None:
            self.tunnel.log_start()

    def _stop_waiting(self) -> Tunnel | None:
        """Want no tunnel any more, nor hear of one; return the one that is there."""
        with self._opening:
            self._is_expecting = False
            self._wanted = None
            tunnel = self.tunnel
        self._forget_held()
        return tunnel

    def _forget_held(self) -> None:
        if isinstance(self._first, Resume):
            self._held.forget(self._first.client, self)

    def tick(self, now: float) -> float:
        """For the timer, as in Leg; refuses who says nothing, or waits for a client in vain."""
        is_late, is_held = now >= self._first_by, now >= self._held_until
        if is_late or is_held:
            if not self._give_up_waiting(now, is_held):
                return min(super().tick(now), now + RETRY_S)
            # Only what was looked at: the reader may set the other one in this moment.
            if is_held:
                self._held_until = float("inf")
            else:
                self._first_by = float("inf")
        return min(super().tick(now), self._first_by, self._held_until)

    def _give_up_waiting(self, now: float, is_held: bool) -> bool:
        """Say `refused` and close; wait for no lock: False if that is not done yet.

        `is_held`: for the client of a `resume`, else for the first message.
        """
        if not self._last_words:
            if not self._opening.acquire(blocking=False):
                return False
            try:
                if is_held:
                    is_waiting, self._wanted = self._wanted is not None, None
                else:
                    is_waiting, self._is_expecting = self._is_expecting, False
            finally:
                self._opening.release()
            if not is_waiting:
                return True
            self._is_refused = True
            if is_held:
                code, message = "client_offline", "the client did not come back"
            else:
                code, message = "no_open", self._no_open
            self._note(code)
            # Through slots of the fast lane, in this order: to put them needs no waiting.
            # Nothing may follow the close, so no ping does.
            refused = _refused(code, message)
            self._last_words = [("refused", refused), ("close", close_frame(CLOSE_NORMAL))]
            self._ping_at = float("inf")
            self._abort_at = min(self._abort_at, now + FLUSH_S)
        while self._last_words:
            if not self.outbox.try_put_leg(*self._last_words[0]):
                return False
            del self._last_words[0]
        return True


def _refused(code: str, message: str) -> Frame:
    return Frame(OP_TEXT, b"", encode_control(OpenRefused(code, message)))
