"""The session of all figures: the sides, the targets, the number of runs, the results."""

import contextlib
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks.processes import HERE, start_program
from benchmarks.results import Results
from benchmarks.side import Road, Side
from benchmarks.sides import Plain, Stock, Tree
from tests.support.processes import Proc

# Seconds for one side in one run. A hang is an error, not a slow figure.
STEP_TIMEOUT_S = 300


@dataclass
class Bench:
    """One session. `trees` are the checkouts by their names in the table."""

    trees: dict[str, Path]
    runs: int
    is_quick: bool
    is_full: bool
    # Two programs, so that echoes and bulk do not share an interpreter's lock.
    echo_port: int
    bulk_port: int
    results: Results = field(default_factory=Results)
    _kept: list[Side] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def makers(
        self, road: Road | None = None, *, threads: int = 64, clients: int = 0, plain: bool = True
    ) -> list[Callable[[], Side]]:
        """Return a factory for each side; the sides are not started."""
        makers: list[Callable[[], Side]] = []
        if plain:
            makers.append(partial(Plain, road, [self.echo_port, self.bulk_port]))
        makers.append(partial(Stock, road, threads))
        return makers + [
            partial(Tree, name, root, road, threads, clients) for name, root in self.trees.items()
        ]

    @contextlib.contextmanager
    def sides(self, road: Road | None = None) -> Iterator[list[Side]]:
        """Yield all sides, started. Sides without a road stay open for the next group."""
        if road is not None:
            with contextlib.ExitStack() as stack:
                yield [stack.enter_context(make()) for make in self.makers(road)]
            return
        if not all(side.is_running for side in self._kept):
            self.close()
        if not self._kept:
            self._kept = [self._stack.enter_context(make()) for make in self.makers()]
        yield self._kept

    def close(self) -> None:
        """Close the sides that stayed open."""
        self._kept = []
        self._stack.close()

    def turns(self, sides: Sequence[Side], what: str) -> Iterator[Side]:
        """Yield each side once per run, interleaved, in reverse order in every second run."""
        for run in range(self.runs):
            for side in sides if run % 2 == 0 else reversed(sides):
                say(f"{what}: run {run + 1} of {self.runs}, {side.name}")
                yield side

    @contextlib.contextmanager
    def flow(self, side: Side, direction: str, count: int = 1) -> Iterator["Flow"]:
        """Run `count` endless transfers through a side, in a separate process."""
        name = secrets.token_hex(4)
        args = [name, direction, str(count), *side.flow_args(self.bulk_port)]
        argv = [sys.executable, str(HERE / "flow.py"), *args]
        with Proc(argv, env=side.env(), cwd=side.folder, pipes=True) as process:
            flow = Flow(process, name, self.bulk_port if direction == "up" else None)
            yield flow
        if direction == "up" and self.runs > 1:
            flow.wait_drained()


class Flow:
    """The transfers of one flow.py process."""

    def __init__(self, process: Proc, name: str, sink_port: int | None) -> None:
        assert process.popen.stdin is not None
        assert process.popen.stdout is not None
        self._process = process
        self._stdin, self._stdout = process.popen.stdin, process.popen.stdout
        self._name, self._sink_port = name, sink_port
        if self._stdout.readline() != b"ready\n":
            raise RuntimeError(f"bulk did not start:\n{process.text}")

    def bytes(self) -> int:
        """Return the bytes received so far, by flow.py or by the target's sinks."""
        if self._sink_port is None:
            self._stdin.write(b"\n")
            return int(self._stdout.readline())
        with socket.create_connection(("127.0.0.1", self._sink_port)) as sock:
            sock.sendall(f"count {self._name}\n".encode())
            return int(sock.makefile().readline())

    def wait_drained(self) -> None:
        """Wait after an upload until all kernel buffers and queues on the path are empty."""
        before, now = -1, self.bytes()
        while now != before:
            time.sleep(0.3)
            before, now = now, self.bytes()


@contextlib.contextmanager
def targets() -> Iterator[tuple[int, int]]:
    """Yield the ports of two targets: one for echoes, one for bulk."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(2):
            process, (port,) = start_program("target.py")
            stack.enter_context(process)
            ports.append(port)
        yield ports[0], ports[1]


def say(text: str) -> None:
    """Print a step's name to stderr, since stdout is for the table; restart the step's alarm."""
    print(text, file=sys.stderr, flush=True)
    signal.alarm(STEP_TIMEOUT_S)


def give_up(_number: int, _frame: object) -> NoReturn:
    """Handle SIGALRM: raise out of a blocked call, so that the clean-up code runs."""
    raise TimeoutError(f"a step took longer than {STEP_TIMEOUT_S} s")
