"""How large the window of a stream is (docs/protocol.md, "The receiver's window").

No I/O, no clock, no thread: the caller says what time it is.
"""

from __future__ import annotations

from http_network_relay.wire.constants import LEAST_WINDOW_BYTES, MIN_WINDOW_BYTES

# A round trip may be longer than the shortest by this queue: a busy link needs one.
_QUEUE_S = 0.020
# On a fast link the queue is no longer than a round trip; threads take this long to wake up.
_LEAST_QUEUE_S = 0.0015
# A probe takes the shortest of so many round trips, over so long at least: a standing queue makes
# every round trip longer, jitter only some. On a slow link the longer time ends a probe.
_ROUND_TRIPS = 3
_MEASURE_S = 0.005
_LONG_MEASURE_S = 1.0
# Growth per probe without a queue. On a busy machine some round trips are short by chance.
_GROWTH = 1.2
# More probes than these in a row without a queue double the window again: one may be chance.
_FREE_PROBES = 3
# Largest part of the window that may wait in our own buffer. More means that the consumer is the
# bottleneck: do not grow.
_UNDELIVERED = 1 / 3
# How often the queue on the link is drained. A drain costs a long link some 1 % of its speed.
_DRAIN_S = 10.0
# The longest round trip that a drain believes: of seconds, most are a queue, perhaps that of other
# tunnels, which drain at the same time.
_DRAIN_ROUND_TRIP_S = 0.1
# No round trip is shorter, whatever a coarse clock says.
_LEAST_ROUND_TRIP_S = 0.0001
# After such a pause nothing is queued on the link, and earlier measurements are old.
_IDLE_S = 1.0


class Window:
    """How many bytes a peer may have under way to us: what its link needs. Not thread-safe.

    The round trip of an ack ends with the first bytes that the ack allowed. The window doubles
    until round trips grow longer than the shortest. Then the window follows them, so that a short
    queue stands: a longer one would only delay the keystroke behind it. The window shrinks if
    much of it waits in our own buffer. Now and then a drain makes the window smaller than the
    link's capacity, and the shortest round trip is measured anew: a standing queue must not be
    taken for the link. All tunnels of a machine drain at the same time, since they may share
    that queue.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self.size = 0
        # A probe, since the last change: since when, how many round trips, the shortest of them.
        self._since: float | None = None
        self._round_trips = 0
        self._round_trip_s = 0.0
        # The fewest bytes that waited in our own buffer when one of them began.
        self._undelivered = 0
        self._heard_at = float("inf")  # not yet
        self._last_round_trip_s = 0.0
        self.begin()

    def begin(self) -> None:
        """Begin with the first window: nothing is known of the link."""
        self._is_doubling = True
        self._shortest_s = float("inf")
        # The limit before the ack that is timed, and when that was sent.
        self._timed: tuple[int, float] | None = None
        # Window and round trip: when round trips first were too long, and before a drain.
        self._too_long: tuple[int, float] | None = None
        self._before_drain: tuple[int, float] | None = None
        self._drained_in = -1  # which stretch of _DRAIN_S
        self._free_probes = 0  # in a row that found no queue
        self._resize(MIN_WINDOW_BYTES)

    def on_data(self, size: int, received: int, now: float) -> None:
        """Note that a message of `size` bytes came, now `received` in all."""
        if now - self._heard_at >= max(_IDLE_S, 4 * self._last_round_trip_s):
            self.begin()
        self._heard_at = now
        if self._timed is not None and received > self._timed[0]:
            self._last_round_trip_s = max(_LEAST_ROUND_TRIP_S, now - self._timed[1])
            self._timed = None
            self._on_round_trip(self._last_round_trip_s, size, now)

    def on_limit(self, before: int, undelivered: int, now: float) -> None:
        """Note that an ack raises the limit, which was `before`.

        `undelivered`: how many bytes have come and were not delivered yet.
        """
        if self._timed is None:
            self._timed = (before, now)
            self._undelivered = min(self._undelivered, undelivered)

    def _on_round_trip(self, round_trip_s: float, size: int, now: float) -> None:
        self._shortest_s = min(self._shortest_s, round_trip_s)
        if self._since is None:
            # The first round trip after a change belongs to the window before.
            self._since, self._undelivered = now, self.size
            return
        self._round_trips += 1
        # Without the time of the last message, which may be longer than the queue.
        self._round_trip_s = min(self._round_trip_s, round_trip_s * self.size / (self.size + size))
        probed_s = now - self._since
        is_enough = self._round_trips >= _ROUND_TRIPS and probed_s >= _MEASURE_S
        is_urgent = self._before_drain is None and (
            self._is_doubling or int(now / _DRAIN_S) != self._drained_in
        )
        if is_enough or is_urgent or probed_s >= _LONG_MEASURE_S:
            self._adapt(int(now / _DRAIN_S))

    def _adapt(self, stretch: int) -> None:
        if self._before_drain is not None:
            self._refill(*self._before_drain)
        elif stretch != self._drained_in:
            self._drained_in = stretch
            self._drain()
        elif self._round_trip_s > self._longest_s:
            self._shrink()
        elif self._undelivered > self.size * _UNDELIVERED:
            # More bytes would only come in one burst after the delivery, and delay a keystroke.
            self._free_probes = 0
            size = (self.size - self._undelivered) / (1 - _UNDELIVERED)
            self._resize(max(size, min(self.size, MIN_WINDOW_BYTES)))
        elif self._round_trip_s < self._longest_s - self._queue_s / 2:
            self._grow()
        else:
            self._too_long = None
            self._free_probes = 0
            self._resize(self.size)

    @property
    def _queue_s(self) -> float:
        if self.size < MIN_WINDOW_BYTES:
            return _QUEUE_S
        return min(_QUEUE_S, max(_LEAST_QUEUE_S, self._shortest_s))

    @property
    def _longest_s(self) -> float:
        return self._shortest_s + self._queue_s

    def _part(self, round_trip_s: float) -> float:
        """Return the part of the window whose round trips are as long as they should be."""
        return (self._longest_s - self._queue_s / 4) / round_trip_s

    def _grow(self) -> None:
        self._too_long = None
        self._free_probes += 1
        is_free = self._is_doubling or self._free_probes > _FREE_PROBES
        self._resize(self.size * (2 if is_free else min(_GROWTH, self._part(self._round_trip_s))))

    def _shrink(self) -> None:
        self._free_probes = 0
        size, round_trip_s = self._too_long or (self.size, self._round_trip_s)
        self._too_long = (size, round_trip_s)
        if self._is_doubling:
            self._is_doubling = False
            self._drain()
        elif self.size * 2 <= size and self._round_trip_s * 4 > round_trip_s * 3:
            # With half the window round trips are as long as before: the link is longer.
            self._shortest_s = self._round_trip_s
            self._too_long = None
            self._is_doubling = True
            self._resize(size)
        else:
            # The rule of large windows leads to no small one, which may have a longer queue.
            least = MIN_WINDOW_BYTES if self.size >= MIN_WINDOW_BYTES else LEAST_WINDOW_BYTES
            self._resize(max(least, self.size * self._part(self._round_trip_s)))

    def _drain(self) -> None:
        self._before_drain = (self.size, self._round_trip_s)
        way_s = min(_DRAIN_ROUND_TRIP_S, self._shortest_s)
        self._shortest_s = float("inf")
        # Half of the capacity of the link, which may have become shorter.
        self._resize(self.size * way_s / self._round_trip_s / 2)

    def _refill(self, size: int, round_trip_s: float) -> None:
        self._before_drain = self._too_long = None
        self._is_doubling = self._is_doubling and round_trip_s <= self._longest_s
        self._resize(size * min(1.0, self._part(round_trip_s)))

    def _resize(self, size: float) -> None:
        self.size = int(max(LEAST_WINDOW_BYTES, min(self._max, size)))
        self._since, self._round_trips, self._round_trip_s = None, 0, float("inf")
