"""The bytes that go out at one end of a tunnel: from the producer to the leg."""

from __future__ import annotations

from typing import Any

from http_network_relay.end.channel import Channel
from http_network_relay.end.state import EndCore, EndState
from http_network_relay.wire.constants import FLUSH_S
from http_network_relay.wire.controls import Ack
from http_network_relay.wire.errors import RelayError


class Outbound:
    """Sends stream bytes as far as the credit allows, then the eof or the reset."""

    def __init__(self, core: EndCore) -> None:
        self._core = core
        self._out = core.stream.out
        # The core's lock guards both.
        self._consumer_failed = False
        # A reset that waits until the bytes before it have gone out.
        self._due_reset: RelayError | None = None

    def on_ack(self, channel: Channel, ack: Ack) -> None:
        """Take an ack in. The leg's reader; raises TunnelError for an impossible one."""
        core = self._core
        with core.lock:
            if core.is_stale_locked(channel, "ack"):
                return
            was_out_of_credit = self._out.credit == 0
            self._out.on_ack(ack)
            self.flush_locked()
            if ack.eof:
                core.finish_locked()
            # A producer with credit has no need to be woken.
            is_news = was_out_of_credit or core.state.is_over
            if is_news:
                core.changed.notify_all()
        channel.push()
        if is_news:
            core.on_change()

    # The producer's thread.

    def credit(self) -> int:
        """Return how many bytes to take from the source now; 0: none, or there is no leg."""
        return self._out.credit if self._core.state is EndState.OPEN else 0

    def wait_credit(self) -> int:
        """Wait until bytes may be taken; return how many, 0 when the tunnel is over."""
        with self._core.lock:
            self._core.wait_locked(lambda: self._core.state.is_over or self.credit() > 0)
            return self.credit()

    def send(self, data: Any) -> None:
        """Send bytes, credit() at most. They are kept until the peer has delivered them."""
        with self._core.lock:
            if not self._core.state.has_error:
                self._out.take(data)
                self.flush_locked()
            channel = self._core.channel
        if channel is not None:
            channel.push()

    def send_eof(self) -> bool:
        """End our direction; False if the consumer failed before, so that a reset is due."""
        with self._core.lock:
            if not self._core.state.has_error:
                if self._consumer_failed:
                    return False
                self._out.end()
                self.flush_locked()
            return True

    def wait_sent(self, timeout_s: float) -> None:
        """Wait until no taken byte waits for credit, as some may after a resume."""
        with self._core.lock:
            self._core.wait_locked(
                lambda: self._core.state is not EndState.OPEN or not self._out.waits_for_credit,
                timeout_s,
            )

    # Any thread.

    def fail_consumer(self) -> bool:
        """Note that the consumer takes no more; return whether a reset is due at once."""
        with self._core.lock:
            self._consumer_failed = True
            return self._out.is_ended

    def flush_locked(self) -> None:
        """Queue what the credit allows, and the eof or the reset behind the last byte."""
        assert self._core.lock.locked()
        channel, out = self._core.channel, self._out
        if channel is None:
            return
        while (piece := out.next_piece()) is not None:
            channel.put_data(piece)
        if (count := out.next_eof()) is not None:
            channel.put_eof(count)
        if self._due_reset is not None:
            self.reset_locked(self._due_reset)

    def reset_locked(self, error: RelayError, deliver_s: float = FLUSH_S) -> None:
        """Queue a reset and end the tunnel.

        What the target said before its own reset goes out first, after a resume if need be.
        """
        assert self._core.lock.locked()
        channel = self._core.channel
        is_blocked = channel is None or self._out.waits_for_credit
        if error.code == "target_reset" and is_blocked:
            self._due_reset = error
            return
        if channel is not None:
            channel.put_reset(error)
        self._core.end_locked(EndState.RESET, error, deliver_s)
