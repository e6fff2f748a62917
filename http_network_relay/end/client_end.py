"""The client's end of a tunnel: answers a resume, or stops waiting for one."""

from __future__ import annotations

import time

from http_network_relay.end.channel import Channel
from http_network_relay.end.state import EndState
from http_network_relay.end.stream import Position
from http_network_relay.end.tunnel_end import TunnelEnd
from http_network_relay.wire.controls import Resumed
from http_network_relay.wire.errors import RelayError


class ClientEnd(TunnelEnd):
    """The end that answers a `resume`. The state lock guards `_attempt`, the newest attempt."""

    _attempt = 0

    @property
    def can_be_asked(self) -> bool:
        """Whether a resume has an answer: the tunnel is open, finished, or was reset here."""
        return self.grace_s > 0 and self.state not in (EndState.ENDED, EndState.EXPIRED)

    def is_at(self, channel: Channel) -> bool:
        """Whether `channel` carries the tunnel now."""
        return self.channel is channel and not self.is_over

    def detached_bytes(self) -> tuple[float, int] | None:
        """Return the time of the detach and the number of kept bytes; None if not detached."""
        with self.lock:
            if self.state is not EndState.DETACHED:
                return None
            into = self.stream.into
            kept = self.stream.out.kept_bytes + into.received - into.delivered
            return self.detached_at, kept

    def must_stop(self) -> bool:
        """Whether the time to deliver bytes received before the end has passed."""
        with self.lock:
            self.expire_locked()
        return self.state.has_error and time.monotonic() >= self.deliver_until

    def deliver_left_s(self) -> float:
        """Return the seconds left to deliver. The caller MUST wait for the end first."""
        return max(0.0, self.deliver_until - time.monotonic())

    def give_up(self, error: RelayError) -> bool:
        """End a detached tunnel; return False if the tunnel is not detached."""
        with self.lock:
            if self.state is not EndState.DETACHED:
                return False
            self.end_locked(EndState.ENDED, error)
        self.on_change()
        return True

    def accept_resume(self, channel: Channel, peer: Position, attempt: int) -> None:
        """Resume on `channel`, answer `resumed`, and reset the previous channel.

        Raises:
            TunnelError: The counts are impossible. No state has changed.
            RelayError: The tunnel has ended with an error, or a newer attempt has come.
                No state has changed.
        """
        with self.lock:
            if self.ended is not None:
                raise RelayError(self.ended.code, str(self.ended))
            if attempt <= self._attempt:
                raise RelayError("superseded", "a newer connection has resumed the tunnel")
            self.stream.out.check_resume(peer)
            self._attempt = attempt
            old = self.channel
            channel.put_first(Resumed(*self.stream.into.resume()))
            self._attach_locked(channel, peer)
        channel.push()
        if old is not None:
            old.put_reset(RelayError("superseded", "the tunnel was resumed on another channel"))

    def fail_consumer(self, error: RelayError) -> None:
        """Record that the target accepts no more bytes.

        The reset is sent after the target's last byte.
        """
        if self.outbound.fail_consumer():
            self.reset(error)

    def forget(self) -> None:
        """Free all bytes. The caller MUST have ended the tunnel and its threads."""
        self.inbound.clear()
        with self.lock:
            self.stream.out.forget()
