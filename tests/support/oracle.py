"""The flaky-link oracle: real programs whose two legs break all the time. No byte may be lost,
doubled or swapped, and no tunnel may hang.

    test -> proxy command -> FaultyLink -> server <- FaultyLink <- client -> test

The test is both the user and the target of every tunnel, in one thread. Streams of seeded bytes
go both ways at the full speed of the link. Each byte is compared when it comes, and each stream
is hashed. A tunnel that was broken often enough ends with both eofs while faults go on. The proxy
command must exit 0, and another tunnel follows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.certs import Certs
from tests.support.faults import HITTING, FaultyLink, Leg, Tally
from tests.support.flows import becomes, lines_since
from tests.support.processes import (
    NO_RESUME,
    Proc,
    Server,
    open_sockets,
    start_client,
    start_proxy,
    start_server,
    thread_count,
)
from tests.support.waiting import eventually

CHUNK_BYTES = 64 * 1024
# Silence is 2.5 of these: half a second until a half-open connection is given up.
PING_INTERVAL_S = 0.2
# A tunnel in which no byte moves for so long hangs. Worst of what is legal: some handshakes in
# a row are cut, each with a longer wait behind it, on both legs.
STUCK_S = 45.0
START_S = 30.0
# A tunnel lives for so many hits on its own user leg.
LIFE_HITS = (4, 30)
# The exit status when the client's leg is down: until the tunnel is open there is nothing to keep.
CLIENT_OFFLINE = 4
# After the last tunnel all is given back within this; a leg may be half-open.
GONE_S = 5.0
# So many of them may still wait at the client: of two minutes, and each needs its last `ack` to
# be on the way just when a leg is lost.
MOST_LEFT = 12
ALL_KINDS_HITS = 200
# So fast that a fault follows the other within tenths of a second, so slow that bytes stand in
# the link; the client's leg carries all tunnels, and its loss concerns all of them.
USER_GAP_BYTES, USER_MBIT = (20_000, 500_000), 60.0
CLIENT_GAP_BYTES, CLIENT_MBIT = (30_000, 1_000_000), 400.0
WINDOWS = (262_144, 400_000, 4_194_304)
# SIGABRT makes a program print the stack of each thread.
DUMPS = {"PYTHONFAULTHANDLER": "1"}
BUGS = re.compile(r"Traceback|internal_error|protocol_error|ERROR")
READ_BYTES = 32 * 1024
SLOW_READERS = 0.4
# Long enough for all queues on the way to fill, and for a fault to come from the other way.
PAUSE_S, READ_BETWEEN_BYTES = 0.25, (50_000, 1_000_000)
_TURN_MS = 10
_LOOKS = 50
_LINES_SHOWN = 25


@dataclass(frozen=True)
class Result:
    """The figures of a run without a failure."""

    tally: Tally
    seed: int
    seconds: float
    tunnels: int
    refused: int
    left: int
    megabytes: float

    def __str__(self) -> str:
        return (
            f"{self.tally.hits} hits in {self.seconds:.0f} s, seed {self.seed}: {self.tunnels}"
            f" tunnels, {self.megabytes:.0f} MB, {self.refused} opens refused, {self.left} last"
            f" acks lost; {self.tally.hits_on('client')} hits on the client's leg; hits+misses:"
            f" {self.tally.summary()}"
        )


class Stream:
    """One direction of a tunnel: seeded bytes without end, until `size` is set."""

    def __init__(self, seed: str) -> None:
        self._block = random.Random(seed).randbytes(CHUNK_BYTES)
        self.sent = 0
        self.received = 0
        self.size: int | None = None
        self.has_ended = False  # the reader saw the end
        self._sent_hash = hashlib.sha256()
        self._received_hash = hashlib.sha256()

    def _from(self, offset: int) -> bytes:
        """The stream from `offset` to the end of its chunk; each chunk has its own number."""
        number, within = divmod(offset, CHUNK_BYTES)
        chunk = number.to_bytes(16, "big") + self._block[16:]
        return chunk[within:]

    def next_piece(self) -> bytes:
        """Return the bytes to send next; b"" at the end."""
        piece = self._from(self.sent)
        return piece if self.size is None else piece[: self.size - self.sent]

    def note_sent(self, piece: bytes) -> None:
        self._sent_hash.update(piece)
        self.sent += len(piece)

    def check(self, data: bytes) -> None:
        """Compare received bytes. Raises AssertionError at the first wrong byte."""
        self._received_hash.update(data)
        at = 0
        while at < len(data):
            want = self._from(self.received)[: len(data) - at]
            got = data[at : at + len(want)]
            if got != want:
                raise AssertionError(self._difference(got, want))
            at += len(got)
            self.received += len(got)
        if self.received > self.sent:
            raise AssertionError(f"{self.received} bytes came, {self.sent} were sent")

    def check_end(self) -> None:
        """Called at the end. Raises AssertionError when bytes that were sent are missing."""
        self.has_ended = True
        assert self.received == self.size, f"eof after {self.received} of {self.size} ({self.sent})"
        assert self._received_hash.digest() == self._sent_hash.digest(), "other SHA-256"

    def _difference(self, got: bytes, want: bytes) -> str:
        first = next(at for at in range(len(got)) if got[at] != want[at])
        offset = self.received + first
        where = self._block.find(got[first : first + 24])
        return (
            f"other bytes at offset {offset} (sent {self.sent}), which is {offset % CHUNK_BYTES} in"
            f" its chunk; these are those at {where} of some chunk: {got[first : first + 16].hex()}"
        )


class Tunnel:
    """One proxy command and its target's connection; the driver's thread only."""

    def __init__(
        self,
        name: str,
        link: FaultyLink,
        url: str,
        args: list[str],
        seed: int,
        rng: random.Random,
        env: dict[str, str],
    ) -> None:
        self.name = name
        self.link = link
        self.up, self.down = Stream(f"{seed}-{name}-up"), Stream(f"{seed}-{name}-down")
        self.wanted_hits = rng.randint(*LIFE_HITS)
        self._first_to_end = rng.choice(("up", "down", "both"))
        self._rest_bytes = rng.randint(1, 2_000_000)  # that the other direction goes on for
        self.begun = self.moved_at = time.monotonic()
        self.is_ending = False
        self.listener = socket.socket()
        # Small, so that the bytes stand in the client and not in the kernel.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.listener.setblocking(False)
        self._target: socket.socket | None = None
        self.proxy = start_proxy(
            url,
            port=self.listener.getsockname()[1],
            ping_interval_s=PING_INTERVAL_S,
            env=env,
            args=args,
        )
        # Such a reader pauses now and then, so that a fault finds bytes queued at that end.
        self._slow = {way: rng.random() < SLOW_READERS for way in (self.up, self.down)}
        self._read_until = dict.fromkeys((self.up, self.down), 0)
        self._paused_at = dict.fromkeys((self.up, self.down), 0.0)
        self._random = random.Random(f"{seed}-{name}-pauses")
        self._is_refused = False
        self._has_fin = False  # the target has said its end

    @property
    def is_open(self) -> bool:
        """As far as the user sees: a byte came down."""
        return self.down.received > 0

    @property
    def has_ended(self) -> bool:
        return self.up.has_ended and self.down.has_ended

    def waits(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        """The descriptors to poll now, for what, and what to do then."""
        if self._is_refused:
            return
        if not self.proxy.stdin.closed:
            yield self.proxy.stdin.fileno(), select.POLLOUT, self._write_stdin
        if not self.down.has_ended and self._reads(self.down):
            yield self.proxy.stdout.fileno(), select.POLLIN, self._read_stdout
        if self._target is None:
            yield self.listener.fileno(), select.POLLIN, self._accept
            return
        if not self.up.has_ended and self._reads(self.up):
            yield self._target.fileno(), select.POLLIN, self._read_target
        if not self._has_fin:
            # Another descriptor, so that each has one thing to wait for.
            yield self._target_out.fileno(), select.POLLOUT, self._write_target

    def _reads(self, way: Stream) -> bool:
        if not self._slow[way] or self.is_ending or way.received < self._read_until[way]:
            return True
        now = time.monotonic()
        if not self._paused_at[way]:
            self._paused_at[way] = now
        if now - self._paused_at[way] < PAUSE_S:
            return False
        self._paused_at[way] = 0.0
        self._read_until[way] = way.received + self._random.randint(*READ_BETWEEN_BYTES)
        return True

    def move(self, act: Callable[[], None]) -> None:
        """Do what `waits` said. OSError where a tunnel that was open is broken."""
        try:
            act()
        except BlockingIOError:
            pass
        except OSError:
            if self.is_open:
                raise
            self._is_refused = True  # The exit status gives the reason.

    def stop(self) -> None:
        """From now on the streams have an end, one before the other perhaps."""
        if not self.is_ending:
            self.is_ending = True
            for name, way in (("up", self.up), ("down", self.down)):
                is_first = self._first_to_end in (name, "both")
                way.size = way.sent + (0 if is_first else self._rest_bytes)

    def close(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target_out.close()
        self.listener.close()
        self.proxy.close()

    def state(self) -> str:
        """Return the tunnel's state, for the report of a failure."""
        ways = [
            f"{name}: sent {way.sent} received {way.received} size {way.size} eof {way.has_ended}"
            for name, way in (("up", self.up), ("down", self.down))
        ]
        return (
            f"tunnel {self.name} pid {self.proxy.pid} status {self.proxy.returncode}, no byte for"
            f" {time.monotonic() - self.moved_at:.1f} s; {'; '.join(ways)}; ending {self.is_ending}"
        )

    def _accept(self) -> None:
        self._target, _ = self.listener.accept()
        self._target.setblocking(False)
        self._target_out = self._target.dup()

    def _write_stdin(self) -> None:
        piece = self.up.next_piece()
        if piece:
            self._note_sent(self.up, piece, os.write(self.proxy.stdin.fileno(), piece))
        else:
            self.proxy.close_stdin()

    def _write_target(self) -> None:
        piece = self.down.next_piece()
        if piece:
            self._note_sent(self.down, piece, self._target_out.send(piece))
        else:
            self._target_out.shutdown(socket.SHUT_WR)
            self._has_fin = True

    def _read_stdout(self) -> None:
        self._note_received(self.down, os.read(self.proxy.stdout.fileno(), READ_BYTES))

    def _read_target(self) -> None:
        assert self._target is not None
        self._note_received(self.up, self._target.recv(READ_BYTES))

    def _note_sent(self, way: Stream, piece: bytes, size: int) -> None:
        way.note_sent(piece[:size])
        self.moved_at = time.monotonic()

    def _note_received(self, way: Stream, data: bytes) -> None:
        self.moved_at = time.monotonic()
        if data:
            way.check(data)
        elif self.is_open:
            way.check_end()
        else:
            self._is_refused = True


class Oracle:
    """Runs all tunnels in one thread until the wanted number of hits is reached."""

    def __init__(
        self,
        folder: Path,
        *,
        hits: int,
        seed: int,
        slots: int,
        certs: Certs | None = None,
        resumes: bool = True,
        threads: int | None = None,
    ) -> None:
        self.hits = hits
        self.seed = seed
        self.slots = slots
        self._threads = threads or 4 * slots
        self.tally = Tally()
        self._folder = folder
        self._certs = certs
        self._env = DUMPS if resumes else {**DUMPS, **NO_RESUME}
        self._random = random.Random(f"{seed}-oracle")
        self._tunnels: dict[int, Tunnel] = {}
        self._user_links: list[FaultyLink] = []
        self._serial = 0
        self._finished = 0
        self._left = 0
        self._log_marks: dict[Proc, int] = {}
        # A short run may end before each kind had its turn.
        self._wants_all = hits >= ALL_KINDS_HITS
        self._refused = 0
        # Since when nothing but refusals came; the client's leg is lost all the time.
        self._refused_since: float | None = None
        self._bytes = 0
        self._server: Server
        self._client: Proc
        self._client_link: FaultyLink

    def run(self) -> Result:
        """Raises AssertionError with all that is known about the first failure."""
        begun = time.monotonic()
        with ExitStack() as stack:
            self._start(stack)
            before = self._settled()
            self._client_link.arm()
            for slot in range(self.slots):
                self._open(slot)
            while self._tunnels:
                self._turn()
            seconds = time.monotonic() - begun
            self._client_link.disarm()
            self._check_given_back(before)
            self._check_logs()
        return Result(
            self.tally,
            self.seed,
            seconds,
            self._finished,
            self._refused,
            self._left,
            self._bytes / 1e6,
        )

    def _start(self, stack: ExitStack) -> None:
        tls = (self._certs.cert, self._certs.key) if self._certs else None
        self._server = stack.enter_context(
            start_server(
                self._folder,
                threads=self._threads,
                ping_interval_s=PING_INTERVAL_S,
                env=self._env,
                tls=tls,
            )
        )
        self._user_links = [
            stack.enter_context(self._link("user", f"user-{slot}", USER_GAP_BYTES, USER_MBIT))
            for slot in range(self.slots)
        ]
        self._client_link = stack.enter_context(
            self._link("client", "client", CLIENT_GAP_BYTES, CLIENT_MBIT)
        )
        self._client = stack.enter_context(
            start_client(
                self._url(self._client_link),
                ping_interval_s=PING_INTERVAL_S,
                env=self._env,
                args=self._ca_args,
            )
        )
        stack.callback(self._close_all)

    @property
    def _ca_args(self) -> list[str]:
        return ["--ca-file", str(self._certs.ca)] if self._certs else []

    def _link(self, leg: Leg, name: str, gap_bytes: tuple[int, int], mbit: float) -> FaultyLink:
        return FaultyLink(
            self._server.port,
            leg=leg,
            name=name,
            tally=self.tally,
            seed=self.seed,
            gap_bytes=gap_bytes,
            has_tls=self._certs is not None,
            mbit=mbit,
            delay_ms=1,
        )

    def _url(self, link: FaultyLink) -> str:
        return f"{'wss' if self._certs else 'ws'}://127.0.0.1:{link.port}"

    # The life of a tunnel.

    def _open(self, slot: int) -> None:
        self._serial += 1
        link = self._user_links[slot]
        link.disarm()
        window = self._random.choice(WINDOWS)
        self._tunnels[slot] = Tunnel(
            f"{slot}.{self._serial}",
            link,
            self._url(link),
            ["--max-window", str(window), *self._ca_args],
            self.seed,
            self._random,
            self._env,
        )
        self._tunnels[slot].wanted_hits += self.tally.hits_of(link.name)

    def _close_all(self) -> None:
        for slot in list(self._tunnels):
            self._close(slot)

    def _close(self, slot: int) -> None:
        tunnel = self._tunnels.pop(slot)
        tunnel.close()
        self._bytes += tunnel.up.received + tunnel.down.received

    def _turn(self) -> None:
        """Move bytes, and see to every tunnel."""
        poll, actions = select.poll(), {}
        for tunnel in self._tunnels.values():
            for fd, event, act in tunnel.waits():
                poll.register(fd, event)
                actions[fd] = tunnel, act
        for fd, _ in poll.poll(_TURN_MS):
            tunnel, act = actions[fd]
            was_open = tunnel.is_open
            with self._explained(tunnel):
                tunnel.move(act)
            if tunnel.is_open and not was_open:
                self._refused_since = None
                tunnel.link.arm()
        self._check_logs()
        is_enough = self.tally.hits >= self.hits and not (self._wants_all and self.tally.missing())
        for slot, tunnel in list(self._tunnels.items()):
            with self._explained(tunnel):
                is_over = self._see_to(tunnel, is_enough)
            if is_over:
                was_open = tunnel.is_open
                self._close(slot)
                if not is_enough or not was_open:
                    self._open(slot)

    def _see_to(self, tunnel: Tunnel, is_enough: bool) -> bool:
        """Have it end, or give up; whether it is over."""
        now = time.monotonic()
        status = tunnel.proxy.returncode
        if not tunnel.is_open:
            assert now - tunnel.begun < START_S, "not open in time"
            return status is not None and self._is_refused(tunnel)
        assert status in (None, 0), f"exit status {status}"
        assert now - tunnel.moved_at < STUCK_S, "stuck"
        if is_enough or self.tally.hits_of(tunnel.link.name) >= tunnel.wanted_hits:
            tunnel.stop()
        if tunnel.has_ended and status == 0:
            assert tunnel.proxy.lines == [], "it says something"
            self._finished += 1
            return True
        return False

    def _is_refused(self, tunnel: Tunnel) -> bool:
        """It exited before a byte came: the client was away just then."""
        self._refused += 1
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        assert now - self._refused_since < STUCK_S, "no tunnel opens"
        assert tunnel.proxy.returncode == CLIENT_OFFLINE, "not opened"
        return True

    def _settled(self) -> dict[str, int]:
        """What both hold once all their threads have started."""
        looks: list[dict[str, int]] = []

        def has_settled() -> bool:
            looks.append(self._held())
            return len(looks) >= _LOOKS and all(each == looks[-1] for each in looks[-_LOOKS:])

        eventually(has_settled)
        return looks[-1]

    def _held(self) -> dict[str, int]:
        """What tunnels and legs that are over might leave behind."""
        worker, client = self._server.worker_pid, self._client.pid
        return {
            "sockets of the server": open_sockets(worker),
            "sockets of the client": open_sockets(client),
            "threads of the client": thread_count(client),
        }

    def _check_given_back(self, before: dict[str, int]) -> None:
        """All is as before the first tunnel, but for those whose last `ack` was lost.

        The user's end has sent it and is finished; the client's cannot know, and waits for it
        until the grace is over. One that is not detached has its last `ack` still on its way, in a
        link that stalls, say.
        """

        def unexpected() -> str:
            left = tunnels_detached(self._client.lines)
            waiting = {
                "sockets of the server": 0,
                "sockets of the client": len(left),
                "threads of the client": 2 * len(left),
            }
            wanted = {what: count + waiting[what] for what, count in before.items()}
            held = self._held()
            return "" if held == wanted else f"{held} is not {wanted}, left are {left}"

        becomes(unexpected, "", GONE_S)
        assert tunnels_not_closed(self._client.lines) == tunnels_detached(self._client.lines)
        left = tunnels_detached(self._client.lines)
        assert len(left) <= MOST_LEFT, left
        self._left = len(left)

    def _check_logs(self) -> None:
        """No program has found a bug, of its own or of another."""
        for process in (self._client, self._server):
            mark = self._log_marks.get(process, 0)
            self._log_marks[process] = process.line_count
            if process.line_count == mark:
                continue
            lines = lines_since(process, mark)
            at = next((at for at, line in enumerate(lines) if BUGS.search(line)), None)
            if at is not None:
                text = "\n".join(lines_since(process, mark)[max(0, at - 5) : at + 60])
                raise AssertionError(f"seed {self.seed}: {process!r} says:\n{text}")

    # Failures.

    @contextmanager
    def _explained(self, tunnel: Tunnel) -> Iterator[None]:
        try:
            yield
        except (AssertionError, OSError) as exc:
            if isinstance(exc, BlockingIOError):
                raise
            raise AssertionError(self._report(tunnel, exc)) from exc

    def _report(self, tunnel: Tunnel, exc: Exception) -> str:
        said = list(tunnel.proxy.lines)
        if tunnel.proxy.is_running:
            # The stacks of all threads of all programs, by PYTHONFAULTHANDLER.
            for pid in (tunnel.proxy.pid, self._client.pid, self._server.worker_pid):
                os.kill(pid, signal.SIGABRT)
            with contextlib.suppress(AssertionError):
                tunnel.proxy.wait(2.0)
                self._client.wait(2.0)
        else:
            with contextlib.suppress(AssertionError):
                tunnel.proxy.wait(1.0)
        events = [
            f"{event.leg} {event.kind} of connection {event.connection} behind"
            f" {event.up_bytes} up {event.down_bytes} down, in flight {event.up_in_flight}"
            f" {event.down_in_flight}"
            for link in (tunnel.link.name, "client")
            for event in self.tally.last(link)[-6:]
        ]
        return "\n".join(
            [
                f"seed {self.seed}, tunnel {tunnel.name}: {exc!r}",
                tunnel.state(),
                f"{self.tally.hits} hits so far; the last of its own leg and the client's:",
                *events,
                f"proxy: {said}",
                *tunnel.proxy.lines[len(said) :],
                "client:",
                *self._client.lines[-_LINES_SHOWN:],
                "server:",
                *self._server.lines[-_LINES_SHOWN:],
            ]
        )


def tunnels_not_closed(lines: list[str]) -> list[str]:
    """The short ids of those that a client's log says were opened and not closed."""
    found = [re.search(r"tunnel (opened|closed) tunnel=(\w+)", line) for line in lines]
    seen = [(match[1], match[2]) for match in found if match]
    closed = {name for what, name in seen if what == "closed"}
    return [name for what, name in seen if what == "opened" and name not in closed]


def tunnels_detached(lines: list[str]) -> list[str]:
    """Of these, those that wait for a resume by the last line of each."""
    last = {
        name: next(line for line in reversed(lines) if name in line)
        for name in tunnels_not_closed(lines)
    }
    return [name for name, line in last.items() if "tunnel detached" in line]


# The client's leg is one, and what it carries is six times as much; it has its part of the hits.
CLIENT_SHARE = 0.1


def check_every_kind_struck(result: Result, hits: int) -> None:
    """On both legs, and with bytes both ways where a connection that flows is lost."""
    assert result.tally.hits >= hits
    assert result.tally.missing() == []
    for kind in HITTING:
        assert result.tally.hits_at("user", kind) >= hits // 60, f"{kind}: {result}"
    of_client = result.tally.hits_on("client")
    assert of_client >= result.tally.hits * CLIENT_SHARE, f"{of_client} of the client's: {result}"
