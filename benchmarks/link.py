"""A link with delay and a limited rate, in user space and in a separate process.

    link.py DEST_PORT... --delay-ms D --mbit R [--queue-kb Q]

Prints a port for each DEST_PORT, then forwards. All connections share R Mbit/s in each
direction; bytes are delivered D ms later. The link stops reading a connection that holds
rate x delay + Q kB in one direction, so TCP slows the sender as a router's full queue would.
One thread and one copy carry several times the 200 Mbit/s that the benchmark needs.
A standalone program.
"""

import argparse
import collections
import heapq
import selectors
import socket
import time

READ_BYTES = 16 * 1024
# Larger kernel buffers would hold more bytes than the link. Buffers below two of loopback's
# 64 KiB segments stall.
KERNEL_BYTES = 128 * 1024


class Lane:
    """One direction of the link, shared by all connections."""

    def __init__(self) -> None:
        self.free_at = 0.0  # time at which the last accepted byte has left the paced end


class Way:
    """One direction of one connection: bytes read from `source` and not yet written to `sink`."""

    def __init__(self, lane: Lane, source: socket.socket, sink: socket.socket) -> None:
        self.lane, self.source, self.sink = lane, source, sink
        self.chunks: collections.deque[tuple[float, bytes]] = collections.deque()
        self.held_bytes = 0
        self.has_timer = False
        self.sink_is_full = False
        self.has_ended = False  # eof from the source
        self.is_over = False  # eof sent to the sink


class Link:
    """All connections of one link, on one selector."""

    def __init__(
        self, dest_ports: list[int], delay_s: float, rate: float, queue_bytes: int
    ) -> None:
        self.delay_s, self.rate = delay_s, rate
        self.capacity_bytes = int(rate * delay_s) + queue_bytes
        self.up, self.down = Lane(), Lane()
        self.selector = selectors.DefaultSelector()
        self.timers: list[tuple[float, int, Way]] = []
        # By socket: the way with this socket as source, and the way with this socket as sink.
        self.ways: dict[socket.socket, tuple[Way, Way]] = {}
        # Listener -> destination port.
        self.listeners: dict[socket.socket, int] = {}
        for dest_port in dest_ports:
            listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
            self.listeners[listener] = dest_port
            self.selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None
            for key, events in self.selector.select(wait_s):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj in self.listeners:
                    self.accept(key.fileobj)
                else:
                    self.handle(key.fileobj, events)
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                way = heapq.heappop(self.timers)[2]
                way.has_timer = False
                self.write(way)

    def accept(self, listener: socket.socket) -> None:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self.listeners[listener]), timeout=5)
        except OSError:
            near.close()
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        up, down = Way(self.up, near, far), Way(self.down, far, near)
        self.ways[near], self.ways[far] = (up, down), (down, up)
        self.watch(near)
        self.watch(far)

    def handle(self, sock: socket.socket, events: int) -> None:
        if sock in self.ways and events & selectors.EVENT_WRITE:
            way = self.ways[sock][1]
            way.sink_is_full = False
            self.write(way)
        if sock in self.ways and events & selectors.EVENT_READ:
            self.read(self.ways[sock][0])

    def watch(self, sock: socket.socket) -> None:
        """Register the socket for exactly the events that the link can handle now."""
        if sock not in self.ways:
            return
        reads, writes = self.ways[sock]
        events = selectors.EVENT_WRITE if writes.sink_is_full else 0
        if not reads.has_ended and reads.held_bytes < self.capacity_bytes:
            events |= selectors.EVENT_READ
        key = self.selector.get_map().get(sock)
        if key is None and events:
            self.selector.register(sock, events)
        elif key is not None and not events:
            self.selector.unregister(sock)
        elif key is not None and key.events != events:
            self.selector.modify(sock, events)

    def read(self, way: Way) -> None:
        try:
            data = way.source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.end(way)
            return
        lane = way.lane
        lane.free_at = max(time.monotonic(), lane.free_at) + len(data) / self.rate
        way.chunks.append((lane.free_at + self.delay_s, data))
        way.held_bytes += len(data)
        way.has_ended = not data
        self.schedule(way)
        self.watch(way.source)

    def schedule(self, way: Way) -> None:
        if way.chunks and not way.sink_is_full and not way.has_timer:
            way.has_timer = True
            heapq.heappush(self.timers, (way.chunks[0][0], id(way), way))

    def write(self, way: Way) -> None:
        """Write the due chunks; an empty chunk stands for the FIN."""
        if way.source not in self.ways:
            return
        now = time.monotonic()
        try:
            while way.chunks and way.chunks[0][0] <= now:
                due, data = way.chunks.popleft()
                if not data:
                    way.sink.shutdown(socket.SHUT_WR)
                    way.is_over = True
                    break
                sent = way.sink.send(data)
                way.held_bytes -= sent
                if sent < len(data):
                    way.chunks.appendleft((due, data[sent:]))
                    way.sink_is_full = True
                    break
        except BlockingIOError:
            way.chunks.appendleft((due, data))
            way.sink_is_full = True
        except OSError:
            self.end(way)
            return
        if all(each.is_over for each in self.ways[way.source]):
            self.end(way)
            return
        self.schedule(way)
        self.watch(way.source)
        self.watch(way.sink)

    def end(self, way: Way) -> None:
        for sock in (way.source, way.sink):
            if self.ways.pop(sock, None):
                if sock in self.selector.get_map():
                    self.selector.unregister(sock)
                sock.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dest_ports", type=int, nargs="+")
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--mbit", type=float, required=True)
    parser.add_argument("--queue-kb", type=int, default=64)
    args = parser.parse_args()
    link = Link(args.dest_ports, args.delay_ms / 1000, args.mbit * 125_000, args.queue_kb * 1000)
    print("listening", *(each.getsockname()[1] for each in link.listeners), flush=True)
    link.run()


if __name__ == "__main__":
    main()
