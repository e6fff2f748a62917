"""Two sides of one tunnel: their state, their counts, and what passes between them.

Everything here is decided under the lock of the client leg's channels. Controls of a tunnel
that goes on are queued under that lock, so they leave in the order of the decisions; data is
sent after its release.
"""

from __future__ import annotations

import threading

from http_network_relay.wire.controls import Ack, Eof, Opening, Resume
from http_network_relay.wire.errors import TunnelError
from server.tunnels.flow_counters import FlowCounters
from server.tunnels.tunnel_side import TunnelSide
from server.tunnels.tunnel_state import TUNNEL_TRANSITIONS, TunnelState

# The reason of a tunnel that both ends have finished. No code: no peer reads it.
EOF_REASON = "eof"


class TunnelRequest:
    """An `open` or `resume`, and who sent it."""

    def __init__(self, control: Opening, user: str, rule: str) -> None:
        """`rule`: the rule of the credentials file that allows the target."""
        self.asked = control
        self.user = user
        self.rule = rule

    @property
    def tunnel_id(self) -> str:
        """The tunnel's id, 32 hex digits."""
        return self.asked.tunnel_id

    @property
    def place(self) -> tuple[str, str]:
        """Client and id, which a `resume` has in common with the tunnel's older leg."""
        return self.asked.client, self.tunnel_id

    @property
    def owner(self) -> tuple[str, str]:
        """User and id, as in Numbered."""
        return self.user, self.tunnel_id

    @property
    def is_resume(self) -> bool:
        """Whether this is a `resume`."""
        return isinstance(self.asked, Resume)

    @property
    def answer(self) -> str:
        """The type of the control that accepts it."""
        return "resumed" if self.is_resume else "opened"


class TunnelPair(TunnelRequest):
    """The two sides of a tunnel, from the assignment of a channel to the one end."""

    # Made by the assignment of a channel.
    _user: TunnelSide
    _client: TunnelSide

    def __init__(self, lock: threading.Lock, control: Opening, user: str, rule: str) -> None:
        """`lock`: that of the client leg's channels; guards the sides and the state."""
        super().__init__(control, user, rule)
        self._lock = lock
        self._state = TunnelState.NEW

    @property
    def is_over(self) -> bool:
        """Whether the tunnel has ended; once true, true for ever."""
        return self._state in (TunnelState.CLOSED, TunnelState.REFUSED)

    @property
    def is_opened(self) -> bool:
        """Whether the client has accepted the tunnel; once true, true for ever."""
        return self._state in (TunnelState.OPEN, TunnelState.CLOSED)

    @property
    def channel(self) -> int:
        """The number on the client's leg."""
        return self._client.channel

    @property
    def up(self) -> FlowCounters:
        """The counts of what the user sends."""
        return self._user.sent

    @property
    def down(self) -> FlowCounters:
        """The counts of what the client sends."""
        return self._client.sent

    def raise_limit(self, is_up: bool, size: int) -> tuple[int, int]:
        """Raise a paced limit by `size` at most, and send it. Any thread that holds no lock.

        Returns:
            By how much the limit rose, and by how much it still could.
        """
        with self._lock:
            if self._state is not TunnelState.OPEN:
                return 0, 0
            side = self._user if is_up else self._client
            rise = side.sent.raise_by(size)
            headroom = side.sent.headroom
            if rise:
                side.put_ack()
        if rise:
            side.push()
        return rise, headroom

    # Data, eof and acks, from one side to the other.

    def _pass_data(
        self, sender: TunnelSide, receiver: TunnelSide, data: bytes | bytearray | memoryview
    ) -> None:
        with self._lock:
            if not self._is_open_locked():
                return
            sender.sent.on_data(len(data))
        receiver.send_data(data)

    def _pass_eof(self, sender: TunnelSide, receiver: TunnelSide, eof: Eof) -> None:
        with self._lock:
            if self._is_open_locked():
                sender.sent.on_eof(eof.count)
                receiver.put_eof(eof.count)

    def _pass_ack(self, sender: TunnelSide, receiver: TunnelSide, ack: Ack) -> bool:
        """Pass an ack to the side whose bytes it acknowledges; return whether all is finished."""
        acked = receiver.sent
        with self._lock:
            if not self._is_open_locked():
                return False
            acked.on_ack(ack.delivered, ack.limit, ack.eof)
            is_finished = acked.eof_acked and sender.sent.eof_acked
            if is_finished:
                # Before the ack: the observer hears of the end before either peer can.
                self._end_locked(EOF_REASON)
            receiver.put_ack()
        receiver.push()
        return is_finished

    # The state.

    def _is_open_locked(self) -> bool:
        """Return False when the tunnel has ended. Raises TunnelError before the answer."""
        assert self._lock.locked()
        if self._state is TunnelState.OPEN:
            return True
        if not self.is_over:
            raise TunnelError(f"data, eof or ack before {self.answer}")
        return False

    def _go_locked(self, state: TunnelState) -> None:
        assert self._lock.locked()
        assert state in TUNNEL_TRANSITIONS[self._state], (self._state, state)
        self._state = state

    def _end_locked(self, reason: str) -> TunnelState | None:
        """End the tunnel; return the state before, None if it has ended before."""
        raise NotImplementedError
