"""Carrier: one tunnel of the proxy command, resumed from leg to leg."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from http_network_relay.dial.backoff import Backoff
from http_network_relay.dial.connection import Connection
from http_network_relay.end.state import EndState
from http_network_relay.end.stream import Position
from http_network_relay.end.user_end import UserEnd
from http_network_relay.proxy_command.leg import Leg, dial_leg
from http_network_relay.proxy_command.messages import complain
from http_network_relay.proxy_command.next_leg import NextLeg
from http_network_relay.proxy_command.pumps import Pumps
from http_network_relay.proxy_command.settings import Settings
from http_network_relay.proxy_command.wakeup import Wakeup
from http_network_relay.wire.codes import EXIT_CLEAN, EXIT_TUNNEL_LOST
from http_network_relay.wire.constants import FLUSH_S
from http_network_relay.wire.controls import Open, Opened, Opening, Resume, Resumed
from http_network_relay.wire.errors import RelayError, TunnelError

# Longer than the client's dial (10 s), so that the user reads the client's reason. Also longer
# than the server holds a resume for an absent client (10 s).
ANSWER_TIMEOUT_S = 15.0
# The longest wait between two tries to resume.
RESUME_CAP_S = 5.0


class Carrier:
    """Opens and resumes the tunnel, and reads its legs. Main thread unless noted."""

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        wakeup: Wakeup,
        wake_timer: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._wakeup = wakeup
        self._wake_timer = wake_timer
        leg = Leg(connection, settings)
        # The leg in use. Main writes the field; the timer and any thread that ends the tunnel read.
        self.leg: Leg | None = leg
        self._end = UserEnd(leg.channel, settings.max_window_bytes, self._on_change)
        # Kept: a resume repeats the fields of the `open`.
        self._opening = Open(
            client=settings.client,
            host=settings.host,
            port=settings.port,
            protocol="tcp",
            tunnel_id=os.urandom(16).hex(),
            resume_token=os.urandom(32).hex(),
            limit=self._end.first_limit,
            grace_s=settings.grace_s,
        )
        self._attempt = 0
        self._next_leg: NextLeg | None = None
        # The reason of the last failed resume.
        self._failure: RelayError | None = None

    def open(self) -> None:
        """Send `open` and wait for the answer. Raises RelayError."""
        assert self.leg is not None  # Until the first _leave().
        answer = self._ask(self.leg, self._opening, ANSWER_TIMEOUT_S)
        assert isinstance(answer, Opened)  # _ask() returns nothing else for an Open.
        self._end.on_open(answer.limit, min(self._settings.grace_s, answer.grace_s))

    def stop(self) -> None:
        """Close all legs."""
        unused = self._next_leg.take() if self._next_leg is not None else None
        if unused is not None:
            unused.stop()
        self._leave()

    def carry(self) -> int:
        """Carry the tunnel from leg to leg to its end; return the exit code."""
        end, pumps = self._end, Pumps(self._end, self._wakeup)
        pumps.start()
        backoff = Backoff(RESUME_CAP_S)
        while (leg := self.leg) is not None:
            begun, counts = time.monotonic(), end.counts
            leg.read(end, self._on_going_away)
            self._leave()
            if not end.is_over:
                backoff.lasted(time.monotonic() - begun, was_used=end.counts != counts)
                self._come_back(backoff)
        self._wakeup.wake()  # Expiry does not call _on_change().
        # Bytes received before the end may still be delivered for FLUSH_S.
        if self._wakeup.exit_code is None:
            pumps.join(FLUSH_S)
        if end.is_finished:
            return EXIT_CLEAN
        if self._wakeup.exit_code is not None:
            return self._wakeup.exit_code
        ended = end.ended or RelayError("leg_lost", "the tunnel was lost")
        sentence = f"{self._settings.target}: {ended}"
        if end.state is EndState.EXPIRED:
            sentence += f"; not resumed within {end.grace_s:.0f} s"
            sentence += f": {self._failure}" if self._failure is not None else ""
        complain(RelayError(ended.code, sentence))
        return EXIT_TUNNEL_LOST

    def _ask(self, leg: Leg, first: Opening, timeout_s: float) -> Opened | Resumed:
        self.leg = leg
        leg.ask(first, timeout_s)
        self._wake_timer()
        # A thread that ends the tunnel from here on closes this leg; check for an earlier end.
        if self._end.is_over:
            raise RelayError("leg_lost", "the tunnel ended meanwhile")
        return leg.answer(first)

    def _dial(self) -> Connection:
        """Dial for a resume. Main thread or the thread of NextLeg."""
        return dial_leg(self._settings, self._opening.tunnel_id, self._is_too_late)

    def _is_too_late(self) -> bool:
        return self._end.is_over or (self._end.is_detached and not self._end.resume_left_s())

    def _on_going_away(self, spread_s: float) -> None:
        leg = self.leg
        if self._next_leg is None and self._end.grace_s and leg is not None:
            # The abort ends main's read of the old leg.
            self._next_leg = NextLeg(self._end, self._dial, spread_s, leg.connection.abort)
            self._next_leg.start()

    def _come_back(self, backoff: Backoff) -> None:
        """Retry the resume on new legs until one succeeds or the tunnel is over."""
        end = self._end
        next_leg, self._next_leg = self._next_leg, None
        connection = next_leg.take() if next_leg is not None else None
        wait_s = 0.0 if connection is not None else backoff.next_s()
        while True:
            end.wait_over(wait_s)
            if end.is_over:
                if connection is not None:
                    connection.stop()
                return
            try:
                self._resume(connection or self._dial())
                self._failure = None
                return
            except RelayError as exc:
                self._leave()
                # Keep the earlier reason once no time is left: the last try only timed out.
                if self._failure is None or end.resume_left_s():
                    self._failure = exc
                if not exc.is_retryable:
                    end.on_end(RelayError(exc.code, str(exc)))
                wait_s = max(backoff.next_s(), exc.retry_after_s or 0.0)
                connection = None

    def _resume(self, connection: Connection) -> None:
        self._attempt += 1
        received, delivered, limit = self._end.begin_resume()
        first = Resume(
            **self._opening._replace(limit=limit)._asdict(),
            attempt=self._attempt,
            received=received,
            delivered=delivered,
        )
        leg = Leg(connection, self._settings)
        answer = self._ask(leg, first, min(ANSWER_TIMEOUT_S, self._end.resume_left_s()))
        assert isinstance(answer, Resumed)  # _ask() returns nothing else for a Resume.
        try:
            peer = Position(answer.received, answer.delivered, answer.limit)
            self._end.on_resumed(leg.channel, peer)
        except TunnelError as exc:
            raise RelayError("protocol_error", f"the client broke the protocol: {exc}") from exc
        if self._end.is_over:  # The tunnel expired during the resume.
            raise RelayError("leg_lost", "the tunnel ended meanwhile")

    def _leave(self) -> None:
        """Close the leg in use, if any."""
        leg = self.leg
        if leg is not None:
            if self._end.is_over:
                # The thread that ended the tunnel may have closed an earlier leg instead.
                leg.say_goodbye(self._end.ended)
            self.leg = None
            leg.connection.stop()

    def _on_change(self) -> None:
        """Handle new credit, the loss of the leg or the end. Any thread."""
        self._wakeup.wake()
        leg = self.leg
        if self._end.is_over and leg is not None:
            leg.say_goodbye(self._end.ended)
            self._wake_timer()
