"""How large the window of a stream is (docs/protocol.md, "The receiver's window").

No I/O, no clock, no thread: the caller says what time it is.
"""

from __future__ import annotations

from http_network_relay.wire.constants import LEAST_WINDOW_BYTES, MIN_WINDOW_BYTES

# Trips may be so much longer than the shortest: a link that is kept busy needs a queue.
_QUEUE_S = 0.020
# On a fast link no longer than a trip itself; but threads take such a moment to wake up.
_LEAST_QUEUE_S = 0.0015
# A queue that stands makes every trip longer, jitter only some: so the shortest counts, of so
# many and of so long; on a slow way of what there was in the longer time.
_TRIPS = 3
_MEASURE_S = 0.005
_LONG_MEASURE_S = 1.0
# Without queue it grows by so much: trips are soon too short by chance, where a machine is busy.
_GROWTH = 1.2
# It takes more of them in a row without a queue to double again: one may be chance.
_FREE_LOOKS = 3
# Such a part of it may stand in our own hands, where whoever takes it on is slower than the way.
_IN_HAND = 1 / 3
# How often the way is emptied. It costs a long link some 1 % of its speed.
_DRAIN_S = 10.0
# What counts at most as the length of a way that is emptied: with a trip of seconds most of it
# is a queue, perhaps that of other tunnels, which do the same at this time.
_DRAIN_TRIP_S = 0.1
# No trip is shorter, whatever a coarse clock says.
_LEAST_TRIP_S = 0.0001
# After such a pause nothing stands on the way, and what was measured is old.
_IDLE_S = 1.0


class Window:
    """How many bytes a peer may have on the way to us: what its link needs. Not thread-safe.

    The trip of an ack ends with the first bytes that it allowed. The window doubles until
    trips grow longer than the shortest; then it follows them, so that a short queue stands:
    more would only delay the keystroke behind it. It becomes smaller if much of it waits in our
    own hands. Now and then it falls to less than the way holds, and the shortest is measured
    anew: a queue that always stands must not be taken for the way. All tunnels of a machine do
    so at the same time, since they may share that queue.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self.size = 0
        # A look, since the last change: since when, how many trips, the shortest of them.
        self._since: float | None = None
        self._trips = 0
        self._trip_s = 0.0
        # The least that stood in our own hands when one of them began.
        self._in_hand = 0
        self._heard_at = float("inf")  # not yet
        self._last_trip_s = 0.0
        self.begin()

    def begin(self) -> None:
        """Begin with the first window: nothing is known of the way."""
        self._is_doubling = True
        self._shortest_s = float("inf")
        # The limit before the ack that is timed, and when that was sent.
        self._timed: tuple[int, float] | None = None
        # Window and trip when trips first were too long, and as they were before a drain.
        self._too_long: tuple[int, float] | None = None
        self._before_drain: tuple[int, float] | None = None
        self._drained_in = -1  # which stretch of _DRAIN_S
        self._free_looks = 0  # in a row that found no queue
        self._resize(MIN_WINDOW_BYTES)

    def on_data(self, size: int, received: int, now: float) -> None:
        """Note that a message of `size` bytes came, now `received` in all."""
        if now - self._heard_at >= max(_IDLE_S, 4 * self._last_trip_s):
            self.begin()
        self._heard_at = now
        if self._timed is not None and received > self._timed[0]:
            self._last_trip_s = max(_LEAST_TRIP_S, now - self._timed[1])
            self._timed = None
            self._on_trip(self._last_trip_s, size, now)

    def on_limit(self, before: int, in_hand: int, now: float) -> None:
        """Note that an ack raises the limit, which was `before`.

        `in_hand`: how many bytes have come and were not handed on yet.
        """
        if self._timed is None:
            self._timed = (before, now)
            self._in_hand = min(self._in_hand, in_hand)

    def _on_trip(self, trip_s: float, size: int, now: float) -> None:
        self._shortest_s = min(self._shortest_s, trip_s)
        if self._since is None:
            # The first trip after a change is that of the window before.
            self._since, self._in_hand = now, self.size
            return
        self._trips += 1
        # Without the time of the message that ended it, which may be longer than the queue.
        self._trip_s = min(self._trip_s, trip_s * self.size / (self.size + size))
        looked_s = now - self._since
        is_enough = self._trips >= _TRIPS and looked_s >= _MEASURE_S
        is_urgent = self._before_drain is None and (
            self._is_doubling or int(now / _DRAIN_S) != self._drained_in
        )
        if is_enough or is_urgent or looked_s >= _LONG_MEASURE_S:
            self._adapt(int(now / _DRAIN_S))

    def _adapt(self, stretch: int) -> None:
        if self._before_drain is not None:
            self._refill(*self._before_drain)
        elif stretch != self._drained_in:
            self._drained_in = stretch
            self._drain()
        elif self._trip_s > self._longest_s:
            self._shrink()
        elif self._in_hand > self.size * _IN_HAND:
            # More would only come at once, when all of that is taken on, and delay a keystroke.
            self._free_looks = 0
            size = (self.size - self._in_hand) / (1 - _IN_HAND)
            self._resize(max(size, min(self.size, MIN_WINDOW_BYTES)))
        elif self._trip_s < self._longest_s - self._queue_s / 2:
            self._grow()
        else:
            self._too_long = None
            self._free_looks = 0
            self._resize(self.size)

    @property
    def _queue_s(self) -> float:
        if self.size < MIN_WINDOW_BYTES:
            return _QUEUE_S
        return min(_QUEUE_S, max(_LEAST_QUEUE_S, self._shortest_s))

    @property
    def _longest_s(self) -> float:
        return self._shortest_s + self._queue_s

    def _part(self, trip_s: float) -> float:
        """Return the part of the window whose trips are as long as they should be."""
        return (self._longest_s - self._queue_s / 4) / trip_s

    def _grow(self) -> None:
        self._too_long = None
        self._free_looks += 1
        is_free = self._is_doubling or self._free_looks > _FREE_LOOKS
        self._resize(self.size * (2 if is_free else min(_GROWTH, self._part(self._trip_s))))

    def _shrink(self) -> None:
        self._free_looks = 0
        size, trip_s = self._too_long or (self.size, self._trip_s)
        self._too_long = (size, trip_s)
        if self._is_doubling:
            self._is_doubling = False
            self._drain()
        elif self.size * 2 <= size and self._trip_s * 4 > trip_s * 3:
            # With half the window they are as long as before: so the way is longer.
            self._shortest_s = self._trip_s
            self._too_long = None
            self._is_doubling = True
            self._resize(size)
        else:
            # By the rule of large windows not to a small one, which may have a longer queue.
            least = MIN_WINDOW_BYTES if self.size >= MIN_WINDOW_BYTES else LEAST_WINDOW_BYTES
            self._resize(max(least, self.size * self._part(self._trip_s)))

    def _drain(self) -> None:
        self._before_drain = (self.size, self._trip_s)
        way_s = min(_DRAIN_TRIP_S, self._shortest_s)
        self._shortest_s = float("inf")
        # Half of what the way holds: it may have become shorter.
        self._resize(self.size * way_s / self._trip_s / 2)

    def _refill(self, size: int, trip_s: float) -> None:
        self._before_drain = self._too_long = None
        self._is_doubling = self._is_doubling and trip_s <= self._longest_s
        self._resize(size * min(1.0, self._part(trip_s)))

    def _resize(self, size: float) -> None:
        self.size = int(max(LEAST_WINDOW_BYTES, min(self._max, size)))
        self._since, self._trips, self._trip_s = None, 0, float("inf")
