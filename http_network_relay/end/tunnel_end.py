"""One end of a tunnel, between its leg and its two threads.

The leg's reader calls the on_... methods, which never wait. A consumer thread takes
chunks and hands them on; a producer thread waits for credit and sends. The end outlives
its legs: detached, it waits to be resumed on another (docs/protocol.md, "Resume").
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from http_network_relay.end.channel import Link
from http_network_relay.end.stream import Position, Stream
from http_network_relay.leg.send_queue import append_merged
from http_network_relay.wire.constants import FLUSH_S
from http_network_relay.wire.controls import Ack, Resumed
from http_network_relay.wire.errors import RelayError, TunnelError


class TunnelEnd:
    """The thread-safe state of one end.

    A method that takes a `link` does nothing if that is not the newest: what comes late
    on another leg or channel must not count.
    """

    def __init__(
        self,
        link: Link,
        max_window_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        # Called, without the lock, when credit came, the leg was lost, or the end came.
        self._on_change = on_change
        # Guards all below; woken by whatever a thread of the tunnel waits for. Messages
        # are put into the link's outbox under it, so that they leave in order.
        self._changed = threading.Condition()
        self._stream = Stream(max_window_bytes)
        # Bytes that wait for the consumer.
        self._inbound: deque[Any] = deque()
        # Hands on what the consumer takes without waiting, if there is such a way.
        self._hand_on: Callable[[Any], int] | None = None
        # Held while a reader does so: its file stays open meanwhile. Before all other locks.
        self._inside = threading.Lock()
        # Who is handing bytes on; those behind them wait for it.
        self._reader_hands_on = False
        self._consumer_hands_on = False
        # None: detached, or being resumed.
        self._link: Link | None = link
        self._is_open = False
        self._grace_s = 0.0
        # Since when and why it is detached, the last time that it was.
        self._detached_at = 0.0
        self._lost: RelayError | None = None
        self._ended: RelayError | None = None
        self._deliver_until = float("inf")
        self._consumer_failed = False
        self._was_reset_here = False
        # A reset that waits until what came before it has gone out.
        self._due_reset: RelayError | None = None
        # Of the newest `resume` that was accepted.
        self._attempt = 0

    # What is known. Each is one read; none needs the lock.

    @property
    def ended(self) -> RelayError | None:
        """Why the tunnel ended before it was finished, if it did. The first reason."""
        return self._ended

    @property
    def is_finished(self) -> bool:
        """Whether both directions ended cleanly and both ends know."""
        return self._stream.is_finished

    @property
    def is_over(self) -> bool:
        """Finished or ended."""
        return self._ended is not None or self._stream.is_finished

    @property
    def is_open(self) -> bool:
        """Whether `opened` was said. Stays true."""
        return self._is_open

    @property
    def is_detached(self) -> bool:
        """Whether it has no leg, and may be resumed."""
        return self._link is None and not self.is_over

    @property
    def has_expired(self) -> bool:
        """Whether it has ended because nobody resumed it in time."""
        return self._ended is not None and self._ended is self._lost

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes taken for sending and bytes handed on, for the log."""
        return self._stream.out.taken, self._stream.into.delivered

    @property
    def first_limit(self) -> int:
        """What `open` or `opened` says: the bytes that the peer may send at first."""
        return self._stream.into.limit

    @property
    def has_both_eofs(self) -> bool:
        """Whether our source ended and the peer's eof was handed on; acks may be missing."""
        return self._stream.out.is_ended and self._stream.into.eof_delivered

    @property
    def grace_s(self) -> float:
        """For how long both ends keep the tunnel without a leg."""
        return self._grace_s

    @property
    def can_be_asked(self) -> bool:
        """Whether a resume has an answer: the tunnel lives, has finished, or was ended by us."""
        has_answer = self._ended is None or self._was_reset_here
        return self._is_open and self._grace_s > 0 and has_answer

    def is_at(self, link: Link) -> bool:
        """Whether `link` carries it now."""
        return self._link is link and not self.is_over

    def detached_bytes(self) -> tuple[float, int] | None:
        """Return since when it is detached and how much it keeps; None if it is not."""
        with self._changed:
            if self._link is not None or self.is_over:
                return None
            into = self._stream.into
            kept = self._stream.out.kept_bytes + into.received - into.delivered
            return self._detached_at, kept

    def resume_left_s(self) -> float:
        """Return for how long a resume may still come; ends the tunnel when that is over."""
        with self._changed:
            self._expire_locked()
            return self._resume_left_locked() or 0.0

    def must_stop(self) -> bool:
        """Whether the time for handing on what came before the end has passed."""
        with self._changed:
            self._expire_locked()
        return self._ended is not None and time.monotonic() >= self._deliver_until

    def deliver_left_s(self) -> float:
        """Return the seconds that are left of that time; only after the end."""
        return max(0.0, self._deliver_until - time.monotonic())

    # The leg's reader. Raise TunnelError for what breaks the protocol.

    def on_open(self, limit: int, grace_s: float) -> bool:
        """Take the peer's first limit; False if the end came first."""
        with self._changed:
            if self._ended is not None:
                return False
            self._is_open = True
            self._grace_s = grace_s
            self._stream.out.limit = limit
            return True

    def on_data(self, link: Link, data: Any) -> bool:
        """Hand stream bytes on, or queue them for the consumer.

        Return whether on_pause() is to be called when nothing more comes.
        """
        with self._changed:
            if self._is_deaf_locked(link, "data"):
                return False
            self._stream.into.on_data(len(data), time.monotonic())
            is_busy = self._consumer_hands_on or self._reader_hands_on or self._inbound
            if self._hand_on is None or is_busy:
                append_merged(self._inbound, data)
                self._changed.notify_all()
                return False
            self._reader_hands_on = True
        # Here and now, if that needs no waiting: another thread costs more.
        count = self._hand_on_now(data)
        with self._changed:
            self._reader_hands_on = False
            if count < len(data):
                self._inbound.appendleft(memoryview(data)[count:])
            if self._has_news_locked():
                self._changed.notify_all()
            # More may be on its way, by this thread: only a pause means that all is drained.
            has_ack, now_link = self._delivered_locked(count, drained=False), self._link
            owes_ack = self._stream.into.owes_ack
        if has_ack and now_link is not None:
            now_link.push()
        return owes_ack

    def on_pause(self, link: Link) -> None:
        """Nothing more comes for the moment: send the ack that is due then."""
        with self._changed:
            if link is not self._link or self._inbound or not self._stream.into.owes_ack:
                return
            has_ack = self._delivered_locked(0, drained=True)
        if has_ack:
            link.push()

    def _hand_on_now(self, data: Any) -> int:
        with self._inside:
            try:
                return self._hand_on(data) if self._hand_on is not None else 0
            except OSError:
                return 0  # The consumer's thread meets it as well, and tells.

    def on_eof(self, link: Link, count: int) -> None:
        """Note that no byte follows."""
        with self._changed:
            if self._is_deaf_locked(link, "eof"):
                return
            self._stream.into.on_eof(count)
            if self._stream.into.eof_delivered:  # A resume made the peer say it again.
                self._ack_eof_locked()
            self._changed.notify_all()
        link.push()
        self._on_change()

    def on_ack(self, link: Link, ack: Ack) -> None:
        """Take an ack in."""
        with self._changed:
            if self._is_deaf_locked(link, "ack"):
                return
            was_out_of_credit = self._stream.out.credit == 0
            self._stream.out.on_ack(ack)
            self._flush_locked()
            # Who sends on has no need to be woken.
            is_news = was_out_of_credit or self.is_over
            if is_news:
                self._changed.notify_all()
        link.push()
        if is_news:
            self._on_change()

    def on_end(self, error: RelayError, *, deliver_s: float = FLUSH_S) -> None:
        """End the tunnel without a word to the peer.

        What came before is still handed on if the consumer takes it in `deliver_s`.
        """
        with self._changed:
            if self.is_over:
                return
            self._end_locked(error, deliver_s)
        self._on_change()

    def on_reset(self, link: Link, error: RelayError) -> None:
        """The peer ended the tunnel."""
        with self._changed:
            if link is not self._link or self.is_over:
                return
            self._end_locked(error, FLUSH_S)
        self._on_change()

    def _is_deaf_locked(self, link: Link, what: str) -> bool:
        if link is not self._link or self._ended is not None:
            return True
        if not self._is_open:
            raise TunnelError(f"{what} before the tunnel was open", link.channel)
        return False

    def _end_locked(self, error: RelayError, deliver_s: float) -> None:
        self._ended = error
        self._deliver_until = time.monotonic() + deliver_s
        self._stream.out.forget()
        self._changed.notify_all()

    # The loss of a leg, and the way back.

    def detach(self, link: Link, error: RelayError) -> bool:
        """The leg is lost: wait for a resume, or end with `error` if there can be none.

        Return whether it waits.
        """
        with self._changed:
            if link is not self._link or self.is_over:
                return False
            waits = self._is_open and self._grace_s > 0
            if waits:
                self._link = None
                self._detached_at = time.monotonic()
                self._lost = error
                self._changed.notify_all()
            else:
                self._end_locked(error, FLUSH_S)
        link.drop()
        self._on_change()
        return waits

    def give_up(self, error: RelayError) -> bool:
        """End a tunnel that waits for a resume; False if it does not wait (any more)."""
        with self._changed:
            if self._link is not None or self.is_over:
                return False
            self._end_locked(error, FLUSH_S)
        self._on_change()
        return True

    def begin_resume(self) -> Position:
        """Return what `resume` says; only while detached, so that all legs are deaf."""
        with self._changed:
            return self._stream.into.resume()

    def on_resumed(self, link: Link, peer: Position) -> None:
        """Go on, on `link`, after the peer's `resumed`. Raises TunnelError."""
        with self._changed:
            if self.is_over:
                return
            self._stream.out.check_resume(peer)
            self._attach_locked(link, peer)
        link.push()
        self._on_change()

    def accept_resume(self, link: Link, peer: Position, attempt: int) -> None:
        """Go on, on `link`, and answer `resumed`; the link before hears that it is over.

        Raises TunnelError for counts that cannot be true, RelayError for a tunnel that
        has ended with an error and for an attempt that is not the newest, and then
        changes nothing.
        """
        with self._changed:
            if self._ended is not None:
                raise RelayError(self._ended.code, str(self._ended))
            if attempt <= self._attempt:
                raise RelayError("superseded", "a newer connection has resumed the tunnel")
            self._stream.out.check_resume(peer)
            self._attempt = attempt
            old, self._link = self._link, None
            link.put_first(Resumed(*self._stream.into.resume()))
            self._attach_locked(link, peer)
        link.push()
        if old is not None:
            old.put_reset(RelayError("superseded", "the tunnel was resumed on another channel"))

    def _attach_locked(self, link: Link, peer: Position) -> None:
        self._link = link
        self._stream.out.resume(peer)
        self._flush_locked()
        # What was handed on since the peer was told.
        drained = not self._inbound
        ack = self._stream.into.on_delivered(0, time.monotonic(), drained=drained)
        if ack is not None:
            link.put_ack(ack)
        self._changed.notify_all()

    def _expire_locked(self) -> None:
        """End a tunnel that nobody has resumed in time."""
        if self._resume_left_locked() == 0.0 and self._lost is not None:
            self._end_locked(self._lost, 0.0)

    def _resume_left_locked(self) -> float | None:
        """Return the seconds that a detached tunnel has left; None if it is not detached."""
        if self._link is not None or self.is_over:
            return None
        return max(0.0, self._detached_at + self._grace_s - time.monotonic())

    def _wait_locked(self, is_due: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for `is_due`, at most `timeout_s`; a detached tunnel may expire meanwhile."""
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not is_due() and (left_s := until - time.monotonic()) > 0:
            resume_left_s = self._resume_left_locked()
            waits = [s for s in (left_s, resume_left_s) if s is not None and s < float("inf")]
            self._changed.wait(min(waits, default=None))
            self._expire_locked()

    # The consumer's thread.

    def next_chunk(self) -> Any:
        """Wait for bytes to hand on; b"" is the eof, None the end of the tunnel."""
        with self._changed:
            self._consumer_hands_on = False
            self._wait_locked(self._has_news_locked)
            if self._ended is not None and time.monotonic() >= self._deliver_until:
                return None
            if self._inbound:
                self._consumer_hands_on = True
                return self._inbound.popleft()
            return b"" if self._eof_is_due_locked() else None

    def _has_news_locked(self) -> bool:
        if self._reader_hands_on:
            return False  # What comes next would overtake it. That is over in no time.
        return bool(self._inbound) or self._ended is not None or self._eof_is_due_locked()

    def _eof_is_due_locked(self) -> bool:
        into = self._stream.into
        return into.eof_at is not None and not into.eof_delivered and not self._inbound

    def hand_on_by(self, hand_on: Callable[[Any], int] | None) -> None:
        """Let the leg's reader hand bytes on, by what never waits and returns how many it took.

        What is not taken, or fails, is left to the consumer's thread. None: not any more; when
        this returns, nobody is inside.
        """
        with self._inside:
            self._hand_on = hand_on

    def delivered(self, size: int) -> None:
        """Say that a chunk, of `size` bytes, was handed on; sends the ack that is due."""
        with self._changed:
            self._consumer_hands_on = False
            drained = not self._inbound
            has_ack, link = self._delivered_locked(size, drained=drained), self._link
        if has_ack and link is not None:
            link.push()

    def _delivered_locked(self, size: int, *, drained: bool) -> bool:
        """Count what was handed on; whether an ack is to be pushed."""
        into = self._stream.into
        if self._link is None:
            into.delivered += size  # The resume, or what follows it, says so.
            return False
        ack = into.on_delivered(size, time.monotonic(), drained=drained)
        if ack is None or self._ended is not None:
            return False
        self._link.put_ack(ack)
        return True

    def delivered_eof(self) -> None:
        """Say that the eof was handed on; its ack goes at once, or when it can."""
        with self._changed:
            self._ack_eof_locked()
            self._changed.notify_all()
            link = self._link
        if link is not None:
            link.push()
        self._on_change()

    def _ack_eof_locked(self) -> None:
        ack = self._stream.into.on_eof_delivered(time.monotonic())
        if ack is not None and self._link is not None and self._ended is None:
            self._link.put_ack(ack)
            # Only now: who sees the tunnel finished may close the leg behind this ack.
            self._stream.into.eof_acked = True

    def fail_consumer(self, error: RelayError) -> None:
        """Say that nothing can be handed on any more (the target, not the user).

        The peer learns of it when what the target still had to say was sent.
        """
        with self._changed:
            self._consumer_failed = True
            is_last = self._stream.out.is_ended
        if is_last:
            self.reset(error)

    # The producer's thread.

    def credit(self) -> int:
        """Return how many bytes to take from the source now; 0: none, or there is no leg."""
        if self._ended is not None or self._link is None:
            return 0
        return self._stream.out.credit

    def wait_credit(self) -> int:
        """Wait until bytes may be taken; return how many, 0 when the tunnel is over."""
        with self._changed:
            self._wait_locked(lambda: self.is_over or self.credit() > 0)
            return self.credit()

    def send(self, data: Any) -> None:
        """Send bytes, credit() at most. They are kept until the peer has handed them on."""
        with self._changed:
            if self._ended is None:
                self._stream.out.take(data)
                self._flush_locked()
            link = self._link
        if link is not None:
            link.push()

    def send_eof(self) -> bool:
        """End our direction; False if the consumer failed before, so that a reset is due."""
        with self._changed:
            if self._ended is None:
                if self._consumer_failed:
                    return False
                self._stream.out.end()
                self._flush_locked()
            return True

    def wait_sent(self, timeout_s: float) -> None:
        """Wait until nothing that was taken waits for credit, as it may after a resume."""
        with self._changed:
            self._wait_locked(
                lambda: self.is_over or self._link is None or not self._stream.out.waits_for_credit,
                timeout_s,
            )

    def _flush_locked(self) -> None:
        """Send what the credit allows, and the eof behind the last byte."""
        link, out = self._link, self._stream.out
        if link is None:
            return
        while (piece := out.next_piece()) is not None:
            link.put_data(piece)
        if (count := out.next_eof()) is not None:
            link.put_eof(count)
        if self._due_reset is not None and not out.waits_for_credit:
            self._reset_locked(self._due_reset, FLUSH_S)

    # Any thread.

    def reset(
        self, error: RelayError, link: Link | None = None, *, deliver_s: float = FLUSH_S
    ) -> None:
        """End the tunnel with an error and tell the peer; nothing if it is over already.

        What the target had said before it reset goes out first, after a resume if need be.
        `link`: only if that is still the newest.
        """
        with self._changed:
            if self.is_over or (link is not None and link is not self._link):
                return
            is_blocked = self._link is None or self._stream.out.waits_for_credit
            if error.code == "target_reset" and is_blocked:
                self._due_reset = error
                return
            self._reset_locked(error, deliver_s)
        self._on_change()

    def _reset_locked(self, error: RelayError, deliver_s: float) -> None:
        self._was_reset_here = True
        if self._link is not None:
            self._link.put_reset(error)
        self._end_locked(error, deliver_s)

    def forget(self) -> None:
        """Free all bytes: the tunnel is over and its threads have ended."""
        with self._changed:
            self._inbound.clear()
            self._stream.out.forget()

    def wait_over(self, timeout_s: float | None = None) -> None:
        """Wait until the tunnel is finished or ended."""
        with self._changed:
            self._wait_locked(lambda: self.is_over, timeout_s)
