"""A link that breaks by script: which fault, on which way and after how many bytes is seeded.

    program (proxy command or client) ---> FaultyLink.port ====> server

No clock triggers a fault. A fault is due once a number of bytes has passed one way. The fault
strikes at the next moment at which bytes are inside the link both ways, and counts as a *hit*. A
fault that finds no such moment soon strikes all the same, and counts as a *miss*. Only the effect
of a fault takes time: a stall, or the delay until the second side learns of the end.
"""

from __future__ import annotations

import collections
import random
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.link import Link, _Connection, _reset, _Way

Leg = Literal["user", "client"]

# The effect of each fault.
FAULTS = {
    "cut": "RST to both sides at once",
    "fin": "FIN to both sides, what they send afterwards is lost",
    "half_open": "everything vanishes, and both sides believe that the connection is there",
    "delayed_end": "one side gets RST or FIN at once, the other 100 to 400 ms later",
    "stall": "nothing moves for 50 to 300 ms; then it goes on",
    "late": "nothing moves for 0.5 to 1 s, so that the programs give up; then all comes",
    "short_reads": "1 to 5 bytes at a time for a while; then it goes on",
    "cut_handshake": "the connection ends inside the handshake of TLS or HTTP",
    "cut_resume": "the connection ends behind the 101: in `resume`, `resumed` or the replay",
}
# After these the program needs another connection.
ENDING = ("cut", "fin", "half_open", "delayed_end", "cut_resume", "cut_handshake")
# Of these, those that strike where bytes flow.
HITTING = tuple(kind for kind in ENDING if kind != "cut_handshake")
# How often each fault is drawn, of twenty: for bytes in flow ...
_FLOW_WEIGHTS = {
    "cut": 6,
    "fin": 3,
    "half_open": 2,
    "delayed_end": 3,
    "stall": 2,
    "late": 1,
    "short_reads": 3,
}
# ... and for a new connection, before its bytes flow; "" is no fault until then.
_NEW_WEIGHTS = {"cut_handshake": 2, "cut_resume": 3, "": 15}

# Most bytes that pass while a due fault waits for bytes both ways.
_PATIENCE_BYTES = 128 * 1024
# Of a hundred faults, so many do not wait, so that faults hit idle connections too.
_PATIENT_PERCENT = 85
# A link does not read from a half-open connection for so long. Then the link reads again, so that
# it sees the program's end and no socket is left.
_UNREAD_S = 5.0
# Most bytes of a handshake: (up, down).
_HANDSHAKE_BYTES = (450, 300)
_TLS_HANDSHAKE_BYTES = (1300, 2600)
_EVENTS_KEPT = 40


@dataclass(frozen=True)
class Event:
    """A fault that has struck."""

    leg: str
    link: str
    kind: str
    connection: int  # of this link, from 1
    up_bytes: int  # that had passed on this connection
    down_bytes: int
    up_in_flight: int
    down_in_flight: int

    @property
    def is_hit(self) -> bool:
        return self.up_in_flight > 0 and self.down_in_flight > 0


class Tally:
    """All faults that have struck, on all links of a test. Any thread may call the methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # Guards all below.
        self._hits: collections.Counter[tuple[str, str]] = collections.Counter()
        self._misses: collections.Counter[tuple[str, str]] = collections.Counter()
        self._of_link: collections.Counter[str] = collections.Counter()
        self._last: dict[str, collections.deque[Event]] = {}

    def add(self, event: Event) -> None:
        with self._lock:
            counter = self._hits if event.is_hit else self._misses
            counter[event.leg, event.kind] += 1
            self._of_link[event.link] += event.is_hit and event.kind in ENDING
            last = self._last.setdefault(event.link, collections.deque(maxlen=_EVENTS_KEPT))
            last.append(event)

    def count(self, kind: str, leg: str) -> int:
        """Return how often the fault struck, hit or miss."""
        with self._lock:
            return self._hits[leg, kind] + self._misses[leg, kind]

    @property
    def hits(self) -> int:
        """Return the connections that were lost while bytes were in flight both ways."""
        with self._lock:
            return sum(count for (_, kind), count in self._hits.items() if kind in ENDING)

    def missing(self) -> list[str]:
        """Return the kinds that have not struck yet, by leg; only a hit counts for an end.

        A fault in a handshake counts without bytes both ways.
        """
        return [
            f"{kind} on the {leg} leg"
            for leg in ("user", "client")
            for kind in FAULTS
            if not (self.hits_at(leg, kind) if kind in HITTING else self.count(kind, leg))
        ]

    def hits_on(self, leg: str) -> int:
        """Of `hits`, those of all links of one leg."""
        return sum(self.hits_at(leg, kind) for kind in ENDING)

    def hits_at(self, leg: str, kind: str) -> int:
        with self._lock:
            return self._hits[leg, kind]

    def hits_of(self, link: str) -> int:
        """Of `hits`, those of one link."""
        with self._lock:
            return self._of_link[link]

    def last(self, link: str) -> list[Event]:
        """The newest faults of a link."""
        with self._lock:
            return list(self._last.get(link, ()))

    def summary(self) -> str:
        """hits+misses by leg and kind, in one line."""
        with self._lock:
            return "; ".join(
                f"{leg}: "
                + ", ".join(
                    f"{kind} {self._hits[leg, kind]}+{self._misses[leg, kind]}" for kind in FAULTS
                )
                for leg in ("user", "client")
            )


class Deck:
    """Draws cards in a seeded order, each as often as its weight, and then starts anew."""

    def __init__(self, rng: random.Random, weights: Mapping[str, int]) -> None:
        self._random = rng
        self._cards = [card for card, count in weights.items() for _ in range(count)]
        self._rest: list[str] = []

    def deal(self) -> str:
        if not self._rest:
            self._rest = self._random.sample(self._cards, len(self._cards))
        return self._rest.pop()


@dataclass
class Plan:
    """The next fault of one connection."""

    number: int
    kind: str = ""  # "": nothing yet
    goes_up: bool = False  # which way is counted
    at_bytes: int = 0  # of that way, from the connection's begin
    is_patient: bool = False
    awaits_upgrade: bool = False  # at_bytes counts from behind the 101
    has_upgrade: bool = False
    short_left: int = 0
    head: bytes = field(default=b"", repr=False)


class FaultyLink(Link):
    """A Link whose connections break by a seeded script once it is armed.

    `gap_bytes` is the range from which the bytes up to the next fault are drawn, small ones more
    often. The `name` identifies the link in the `tally`, and is part of its script's seed.
    """

    def __init__(
        self,
        dest_port: int,
        *,
        leg: Leg,
        name: str,
        tally: Tally,
        seed: int | str = 0,
        gap_bytes: tuple[int, int] = (20_000, 400_000),
        weights: Mapping[str, int] | None = None,
        has_tls: bool = False,
        unread_s: float = _UNREAD_S,
        new_weights: Mapping[str, int] | None = None,
        **link: Any,
    ) -> None:
        self.leg = leg
        self.name = name
        self._tally = tally
        self._random = random.Random(f"{seed}-{name}")
        self._gap_bytes = gap_bytes
        self._flow_deck = Deck(self._random, weights or _FLOW_WEIGHTS)
        self._new_deck = Deck(self._random, new_weights or _NEW_WEIGHTS)
        self._has_tls = has_tls
        self._unread_s = unread_s
        self._is_armed = False
        self._plans: dict[_Connection, Plan] = {}
        self._orphans: set[socket.socket] = set()
        super().__init__(dest_port, **link)

    # Called by tests.

    def arm(self) -> None:
        """Let connections break from now on, the present one too."""

        def act() -> None:
            self._is_armed = True
            for connection, plan in self._plans.items():
                if not plan.kind:
                    self._plan_flow(connection, plan)

        self._call(act)

    def disarm(self) -> None:
        """Let no connection break from now on; a fault that has begun is not undone."""

        def act() -> None:
            self._is_armed = False
            for plan in self._plans.values():
                plan.kind, plan.awaits_upgrade, plan.short_left = "", False, 0

        self._call(act)

    @property
    def half_open(self) -> int:
        """Return the sockets that a program has not closed although their connection is lost."""
        return self._call(lambda: len(self._orphans))

    # The script.

    def _on_accepted(self, connection: _Connection) -> None:
        plan = Plan(self.connections_accepted)
        self._plans[connection] = plan
        if not self._is_armed:
            return
        rng = self._random
        plan.kind, plan.goes_up, share = self._new_deck.deal(), rng.random() < 0.5, rng.random()
        if plan.kind == "cut_handshake":
            sizes = _TLS_HANDSHAKE_BYTES if self._has_tls else _HANDSHAKE_BYTES
            plan.at_bytes = int(share * sizes[not plan.goes_up])
        elif plan.kind == "cut_resume":
            # Half of them in the first controls, the other half in the replay.
            plan.at_bytes = int(rng.choice((800, 200_000)) * share)
            plan.awaits_upgrade = True
        # Else _on_moved plans it when the upgrade is through.

    def _plan_flow(self, connection: _Connection, plan: Plan) -> None:
        rng = self._random
        plan.kind = self._flow_deck.deal()
        plan.goes_up = rng.random() < 0.5
        plan.is_patient = rng.randrange(100) < _PATIENT_PERCENT
        low, high = self._gap_bytes
        gap = int(low * (high / low) ** rng.random())
        plan.at_bytes = connection.ways[not plan.goes_up].total_bytes + gap

    def _piece_bytes(self, connection: _Connection, way: _Way) -> int:
        plan = self._plans[connection]
        size = super()._piece_bytes(connection, way)
        if plan.short_left > 0:
            return self._random.randint(1, 5)
        if plan.kind and not plan.awaits_upgrade and way is connection.ways[not plan.goes_up]:
            left = plan.at_bytes - way.total_bytes
            return min(size, left) if left > 0 else size
        return size

    def _on_moved(self, connection: _Connection, way: _Way, data: bytes) -> None:
        plan = self._plans[connection]
        if not plan.has_upgrade and way is connection.ways[1]:
            self._look_for_upgrade(connection, plan, data)
        if plan.short_left > 0:
            plan.short_left -= len(data)
            if plan.short_left <= 0:
                self._plan_flow(connection, plan)
            return
        if not plan.kind or plan.awaits_upgrade:
            return
        counted = connection.ways[not plan.goes_up]
        beyond = counted.total_bytes - plan.at_bytes
        if beyond < 0:
            return
        has_both = all(each.held_bytes > 0 for each in connection.ways)
        if has_both or not plan.is_patient or beyond >= _PATIENCE_BYTES:
            self._strike(connection, plan)

    def _look_for_upgrade(self, connection: _Connection, plan: Plan, data: bytes) -> None:
        """Behind the 101, where it can be read, the tunnel's own bytes begin."""
        down = connection.ways[1]
        if self._has_tls:
            behind = down.total_bytes - _TLS_HANDSHAKE_BYTES[1]
            plan.has_upgrade = behind >= 0
        else:
            # The head ends in a message of the server only if both came in one piece.
            plan.head += data
            plan.has_upgrade = b"\r\n\r\n" in plan.head
        if not plan.has_upgrade:
            return
        plan.head = b""
        if plan.awaits_upgrade:
            plan.awaits_upgrade = False
            plan.at_bytes += connection.ways[not plan.goes_up].total_bytes
        elif self._is_armed and not plan.kind:
            self._plan_flow(connection, plan)

    # The faults.

    def _strike(self, connection: _Connection, plan: Plan) -> None:
        up, down = connection.ways
        kind, plan.kind = plan.kind, ""
        event = Event(
            self.leg,
            self.name,
            kind,
            plan.number,
            up.total_bytes,
            down.total_bytes,
            up.held_bytes,
            down.held_bytes,
        )
        self._tally.add(event)
        getattr(self, f"_{kind}")(connection, plan)

    def _cut(self, connection: _Connection, _plan: Plan) -> None:
        self._end(connection, reset=True)

    def _fin(self, connection: _Connection, _plan: Plan) -> None:
        self._let_go(connection)
        for sock in (connection.near, connection.far):
            self._say_fin(sock)

    def _half_open(self, connection: _Connection, _plan: Plan) -> None:
        self._let_go(connection)
        is_read = self._random.random() < 0.5
        for sock in (connection.near, connection.far):
            self._orphans.add(sock)
            if is_read:
                self._swallow(sock)
            else:
                self._later(self._unread_s, self._of(sock, self._swallow))

    def _delayed_end(self, connection: _Connection, _plan: Plan) -> None:
        rng = self._random
        self._let_go(connection)
        first, second = rng.sample((connection.near, connection.far), 2)
        end = rng.choice((self._say_fin, self._say_rst))
        end(first)
        self._swallow(second)
        self._later(rng.uniform(0.1, 0.4), self._of(second, end))

    def _stall(self, connection: _Connection, plan: Plan) -> None:
        self._freeze(connection, plan, self._random.uniform(0.05, 0.3))

    def _late(self, connection: _Connection, plan: Plan) -> None:
        self._freeze(connection, plan, self._random.uniform(0.5, 1.0))

    def _freeze(self, connection: _Connection, plan: Plan, seconds: float) -> None:
        connection.frozen = True
        self._watch(connection)

        def go_on() -> None:
            if connection not in self._connections:
                return
            connection.frozen = False
            if self._is_armed:
                self._plan_flow(connection, plan)
            for way in connection.ways:
                self._write(connection, way)
            self._watch(connection)

        self._later(seconds, go_on)

    def _short_reads(self, _connection: _Connection, plan: Plan) -> None:
        plan.short_left = self._random.randint(100, 2000)

    def _cut_handshake(self, connection: _Connection, plan: Plan) -> None:
        self._random.choice((self._cut, self._fin))(connection, plan)

    _cut_resume = _cut_handshake

    # Sockets whose other half is lost.

    def _say_fin(self, sock: socket.socket) -> None:
        # Not close(): with bytes unread in the kernel that would be an RST.
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._bury(sock)
            return
        self._swallow(sock)

    def _say_rst(self, sock: socket.socket) -> None:
        self._bury(sock)

    def _of(self, sock: socket.socket, act: Callable[[socket.socket], None]) -> Callable[[], None]:
        """Run `act` on `sock`, unless `sock` is closed by then."""
        return lambda: act(sock) if sock in self._orphans else None

    def _swallow(self, sock: socket.socket) -> None:
        """Read and drop bytes until the program ends the connection."""
        self._orphans.add(sock)

        def read(_events: int) -> None:
            try:
                if sock.recv(65536):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            self._bury(sock)

        if sock not in self._selector.get_map():
            self._selector.register(sock, selectors.EVENT_READ, read)

    def _bury(self, sock: socket.socket) -> None:
        self._orphans.discard(sock)
        if sock in self._selector.get_map():
            self._selector.unregister(sock)
        _reset(sock)

    def _let_go(self, connection: _Connection) -> None:
        super()._let_go(connection)
        self._plans.pop(connection, None)

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            for sock in self._orphans:
                _reset(sock)
