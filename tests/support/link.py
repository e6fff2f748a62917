"""A long, thin or broken network link between two programs, in user space.

    near side ---> Link.port ==== delay, jitter, rate ====> dest_port (far side)

"Up" is near to far, "down" is far to near. One thread runs the whole link. Any thread may
call the methods, which return after the link has acted. Faults are calls, not timers, so a test
decides when a fault strikes.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import queue
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
L = TypeVar("L", bound="Link")

_READ_BYTES = 16 * 1024
# Queue of each direction without a rate: enough for 100 MB/s over 40 ms.
_UNPACED_QUEUE_BYTES = 4 * 1024 * 1024
# With a rate, the kernel's buffers must not exceed the link's own queue. Smaller buffers take
# fewer than two of loopback's 64 KiB segments, and stall.
_PACED_BUFFER_BYTES = 128 * 1024


@dataclass
class Cut:
    """The losses of a cut: connections, and bytes in flight inside the link each way."""

    connections: int
    up_bytes: int
    down_bytes: int


@dataclass
class _Lane:
    """One direction of the link. Only the link's thread touches it."""

    random: random.Random
    free_at: float = 0.0  # when the last byte accepted so far has left the paced end
    held_bytes: int = 0
    total_bytes: int = 0


@dataclass(eq=False)
class _Way:
    """One direction of one connection: what was read from `source` and not yet written."""

    lane: _Lane
    source: socket.socket
    sink: socket.socket
    chunks: collections.deque[tuple[float, bytes]] = field(default_factory=collections.deque)
    held_bytes: int = 0
    last_due: float = 0.0
    source_ended: bool = False
    has_timer: bool = False
    sink_full: bool = False  # the far kernel's buffer is full: wait for EVENT_WRITE
    sink_ended: bool = False
    total_bytes: int = 0  # written so far


@dataclass(eq=False)
class _Connection:
    near: socket.socket
    far: socket.socket
    ways: tuple[_Way, _Way]
    frozen: bool = False


class Link:
    """A TCP forwarder with delay, jitter, a rate, cuts and freezes. A context manager.

    `delay_ms` and `jitter_ms` (0 to that much more, never reordering) are one way; `mbit` is the
    rate each way, shared by all connections. TCP stops a sender once a connection has
    rate x delay + `queue_bytes` queued in one direction. A test may change the three at any time.
    """

    def __init__(
        self,
        dest_port: int,
        *,
        delay_ms: float = 0.0,
        jitter_ms: float = 0.0,
        mbit: float | None = None,
        queue_bytes: int = 64 * 1024,
        seed: int = 0,
    ) -> None:
        self.dest_port = dest_port
        self.delay_ms = delay_ms
        self.jitter_ms = jitter_ms
        self.mbit = mbit
        self.queue_bytes = queue_bytes
        self.connections_accepted = 0
        self._up = _Lane(random.Random(f"{seed}-up"))
        self._down = _Lane(random.Random(f"{seed}-down"))
        self._connections: set[_Connection] = set()
        self._accept_frozen = False
        self._refusing = False
        self._running = True
        # (due, tie-breaker, ...): which way has something to write then; at most one each.
        self._timers: list[tuple[float, int, _Connection, _Way]] = []
        self._tie = itertools.count()
        # (due, tie-breaker, what to do then): for subclasses, see _later().
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._obey)
        self._thread = threading.Thread(target=self._run, name=f"link:{self.port}")
        self._thread.start()

    # Called by tests.

    @property
    def url(self) -> str:
        """Return the near side as a relay's URL without a path."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def in_flight(self) -> tuple[int, int]:
        """Bytes now inside the link, (up, down); the kernels' own buffers do not count."""
        return self._up.held_bytes, self._down.held_bytes

    @property
    def forwarded(self) -> tuple[int, int]:
        """Bytes that went through since the start, (up, down)."""
        return self._up.total_bytes, self._down.total_bytes

    @property
    def open_connections(self) -> int:
        return self._call(lambda: len(self._connections))

    def cut(self, *, stay_down: bool = False) -> Cut:
        """Reset every connection (RST to both sides) and lose what is in flight.

        With `stay_down`, new connections are reset too, until `restore()`.
        """

        def act() -> Cut:
            self._refusing = stay_down
            cut = Cut(len(self._connections), self._up.held_bytes, self._down.held_bytes)
            for connection in list(self._connections):
                self._end(connection, reset=True)
            return cut

        return self._call(act)

    def restore(self) -> None:
        """Accept connections again after `cut(stay_down=True)`."""

        def act() -> None:
            self._refusing = False

        self._call(act)

    def freeze(self, *, accept_new: bool = False) -> Cut:
        """Stop forwarding on every connection: no data, no FIN, no RST, as a pulled cable.

        New connections are accepted by the kernel only, and stay silent, unless `accept_new`
        lets them work: the path of one who returns while the old connection is half-open.
        """

        def act() -> Cut:
            for connection in self._connections:
                connection.frozen = True
                self._watch(connection)
            if not accept_new and not self._accept_frozen:
                self._accept_frozen = True
                self._selector.unregister(self._listener)
            return Cut(len(self._connections), self._up.held_bytes, self._down.held_bytes)

        return self._call(act)

    def thaw(self) -> None:
        """Go on where `freeze()` stopped; pass on the ends that came meanwhile."""

        def act() -> None:
            if self._accept_frozen:
                self._accept_frozen = False
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            for connection in list(self._connections):
                connection.frozen = False
                for way in connection.ways:
                    self._write(connection, way)
                self._watch(connection)

        self._call(act)

    def close(self) -> None:
        """End everything and join the thread. Idempotent."""
        if self._thread.is_alive():

            def act() -> None:
                self._running = False

            self._call(act)
            self._thread.join()
            self._wake_writer.close()

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # The link's own thread.

    def _call(self, act: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._commands.put((act, future))
        self._wake_writer.send(b"x")
        return future.result(timeout=10)

    def _obey(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        while not self._commands.empty():
            act, future = self._commands.get()
            try:
                future.set_result(act())
            except Exception as exc:
                future.set_exception(exc)

    def _run(self) -> None:
        try:
            while self._running:
                timeout_s = None
                due = [heap[0][0] for heap in (self._timers, self._alarms) if heap]
                if due:
                    timeout_s = max(0.0, min(due) - time.monotonic())
                for key, events in self._selector.select(timeout_s):
                    key.data(events)
                self._write_due()
        finally:
            for connection in list(self._connections):
                self._end(connection, reset=True)
            self._selector.close()
            self._listener.close()
            self._wake_reader.close()

    def _accept(self, _events: int) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        if self._refusing:
            _reset(near)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self.dest_port), timeout=5)
        except OSError:
            _reset(near)
            return
        self.connections_accepted += 1
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.mbit is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PACED_BUFFER_BYTES)
        connection = _Connection(
            near, far, (_Way(self._up, near, far), _Way(self._down, far, near))
        )
        self._connections.add(connection)
        self._on_accepted(connection)
        self._watch(connection)

    # Hooks for a subclass that injects faults; all run on the link's own thread.

    def _on_accepted(self, connection: _Connection) -> None:
        """Called for each new connection. The hook must not end the connection."""

    def _piece_bytes(self, connection: _Connection, way: _Way) -> int:
        """Return the most bytes to write at once, at least 1; for example, up to the next fault."""
        return _READ_BYTES

    def _on_moved(self, connection: _Connection, way: _Way, data: bytes) -> None:
        """Called after `data` was written. The hook may do anything to the connection."""

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._alarms, (time.monotonic() + seconds, next(self._tie), act))

    def _capacity_bytes(self) -> int:
        if self.mbit is None:
            return _UNPACED_QUEUE_BYTES
        return int(self.mbit * 125 * (self.delay_ms + self.jitter_ms)) + self.queue_bytes

    def _watch(self, connection: _Connection) -> None:
        """Register exactly the events that this connection waits for."""
        if connection not in self._connections:
            return
        up, down = connection.ways
        capacity_bytes = self._capacity_bytes()
        for sock, incoming, outgoing in ((connection.near, up, down), (connection.far, down, up)):
            events = 0
            if not connection.frozen:
                if not incoming.source_ended and incoming.held_bytes < capacity_bytes:
                    events |= selectors.EVENT_READ
                if outgoing.sink_full:
                    events |= selectors.EVENT_WRITE
            registered = sock in self._selector.get_map()
            if events and registered:
                if self._selector.get_key(sock).events != events:
                    self._selector.modify(
                        sock, events, self._handler(connection, incoming, outgoing)
                    )
            elif events:
                self._selector.register(sock, events, self._handler(connection, incoming, outgoing))
            elif registered:
                self._selector.unregister(sock)

    def _handler(
        self, connection: _Connection, incoming: _Way, outgoing: _Way
    ) -> Callable[[int], None]:
        def handle(events: int) -> None:
            if connection not in self._connections:
                return  # an earlier event of this round ended the connection
            if events & selectors.EVENT_WRITE:
                outgoing.sink_full = False
                self._write(connection, outgoing)
            if events & selectors.EVENT_READ and connection in self._connections:
                self._read(connection, incoming)

        return handle

    def _read(self, connection: _Connection, way: _Way) -> None:
        try:
            data = way.source.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._end(connection, reset=True)
            return
        now = time.monotonic()
        lane = way.lane
        if self.mbit is not None:
            lane.free_at = max(now, lane.free_at) + len(data) / (self.mbit * 125_000)
            now = lane.free_at
        delay_s = (self.delay_ms + lane.random.random() * self.jitter_ms) / 1000
        way.last_due = max(way.last_due, now + delay_s)
        way.chunks.append((way.last_due, data))
        way.held_bytes += len(data)
        lane.held_bytes += len(data)
        way.source_ended = not data
        self._schedule(connection, way)
        self._watch(connection)

    def _schedule(self, connection: _Connection, way: _Way) -> None:
        if way.chunks and not way.sink_full and not way.has_timer:
            way.has_timer = True
            heapq.heappush(self._timers, (way.chunks[0][0], next(self._tie), connection, way))

    def _write_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, connection, way = heapq.heappop(self._timers)
            way.has_timer = False
            self._write(connection, way)
        while self._alarms and self._alarms[0][0] <= now:
            heapq.heappop(self._alarms)[2]()

    def _write(self, connection: _Connection, way: _Way) -> None:
        """Write the chunks that are due; an empty chunk is the FIN."""
        if connection.frozen or way.sink_full or connection not in self._connections:
            return
        while way.chunks and way.chunks[0][0] <= time.monotonic():
            due, data = way.chunks.popleft()
            piece = data[: self._piece_bytes(connection, way)]
            try:
                if data:
                    sent = way.sink.send(piece)
                else:
                    sent = 0
                    way.sink_ended = True
                    way.sink.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                way.chunks.appendleft((due, data))
                way.sink_full = True
                break
            except OSError:
                self._end(connection, reset=True)
                return
            way.held_bytes -= sent
            way.lane.held_bytes -= sent
            way.lane.total_bytes += sent
            way.total_bytes += sent
            if sent < len(data):
                way.chunks.appendleft((due, data[sent:]))
            way.sink_full = sent < len(piece)
            self._on_moved(connection, way, piece[:sent])
            if connection.frozen or connection not in self._connections:
                return
            if way.sink_full:
                break
        if all(each.sink_ended for each in connection.ways):
            self._end(connection, reset=False)
            return
        self._schedule(connection, way)
        self._watch(connection)

    def _end(self, connection: _Connection, *, reset: bool) -> None:
        self._let_go(connection)
        for sock in (connection.near, connection.far):
            if reset:
                _reset(sock)
            else:
                sock.close()

    def _let_go(self, connection: _Connection) -> None:
        """Lose the bytes in flight and forget the connection; its sockets stay open."""
        self._connections.discard(connection)
        for way in connection.ways:
            way.lane.held_bytes -= way.held_bytes
            way.held_bytes = 0
            way.chunks.clear()
        for sock in (connection.near, connection.far):
            if sock in self._selector.get_map():
                self._selector.unregister(sock)


def _reset(sock: socket.socket) -> None:
    """Close with RST: linger on, for 0 s."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
