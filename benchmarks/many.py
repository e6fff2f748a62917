"""Costs of the server for many idle clients, and for many readers that stopped reading."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator

from benchmarks.bench import Bench, say
from benchmarks.processes import HERE, cpu_s, environment, kernel_stack_bytes, pss_bytes
from benchmarks.results import Figure, Goal
from benchmarks.side import IdleOrder, Side
from tests.support.processes import Proc

# The relay's ping interval in seconds: the server pings each client once in this time.
_PING_INTERVAL_S = 20.0
# Few runs: each takes long, and memory varies little between runs.
_MOST_RUNS = 2
# Bytes that each reader takes before the stop, so that the window has grown.
_READ_BYTES = 8_000_000
# Twice the largest window of a tunnel (--max-window).
_TWO_WINDOWS_MB = 8.4


def measure_clients(bench: Bench) -> None:
    """Measure idle clients: user memory and kernel stacks of each, and the CPU of all."""
    for count in [20] if bench.is_quick else [100, 1000, *([5000] if bench.is_full else [])]:
        title = f"{count} idle clients"
        figures = clients_figures(count, title)
        bench.results.declare(*figures)
        for run in range(min(bench.runs, _MOST_RUNS)):
            for make in bench.makers(threads=count * 4 // 3 + 64, clients=count):
                with make() as side:
                    say(f"{title}: run {run + 1}, {side.name}")
                    values = idle_cost(side, count, 0.5 if bench.is_quick else _PING_INTERVAL_S)
                for figure, value in zip(figures, values, strict=True):
                    bench.results.add(figure, side.name, value)


def clients_figures(count: int, title: str) -> list[Figure]:
    """Return the figures for memory, kernel stacks and CPU; only the greatest count has goals."""
    most = count == 5000
    small, calm = Goal("value", "<=", 70), Goal("value", "<=", 5)
    return [
        Figure(f"clients.{count}.pss", f"{title}: memory each", "KB", small if most else None),
        Figure(f"clients.{count}.stacks", f"{title}: kernel stacks, each", "KB"),
        Figure(
            f"clients.{count}.cpu", f"{title}: CPU of them all", "% core", calm if most else None
        ),
    ]


def idle_cost(side: Side, count: int, seconds: float) -> tuple[float, float, float]:
    """Return KB per client, KB of kernel stacks per client, and % of a core over `seconds`."""
    pid, order = side.idle_server()
    memory, stacks = pss_bytes(pid), kernel_stack_bytes(pid)
    with holding(order, count) as holder:
        time.sleep(0.2 if count < 100 else 1.0)  # s, until the last threads idle
        before, begun = cpu_s(pid), time.monotonic()
        time.sleep(seconds)
        percent = (cpu_s(pid) - before) / (time.monotonic() - begun) * 100
        memory, stacks = pss_bytes(pid) - memory, kernel_stack_bytes(pid) - stacks
        if answer(holder, b"\n") != str(count):
            raise RuntimeError(f"{side.name} lost some of its {count} idle clients")
    return memory / count / 1000, stacks / count / 1000, percent


@contextlib.contextmanager
def holding(order: IdleOrder, count: int) -> Iterator[Proc]:
    """Yield a process that holds `count` open idle connections."""
    argv = [sys.executable, str(HERE / "holder.py")]
    with Proc(argv, env=environment(HERE), cwd=HERE, pipes=True) as holder:
        line = json.dumps({**order, "count": count}).encode() + b"\n"
        if answer(holder, line) != "ready":
            raise RuntimeError(f"idle clients were not let in:\n{holder.text}")
        yield holder


def answer(process: Proc, line: bytes) -> str:
    """Write a line to a program of this folder; return the answer."""
    assert process.popen.stdin is not None
    assert process.popen.stdout is not None
    process.popen.stdin.write(line)
    return process.popen.stdout.readline().decode().strip()


def measure_stopped(bench: Bench) -> None:
    """Measure memory while the readers' processes are stopped and the sources keep writing."""
    count = 5 if bench.is_quick else 50
    title = f"{count} stopped readers"
    figures = {
        role: Figure(f"stopped.{role}", f"{title}: {role}, each", "MB", goal)
        for role, goal in (("server", Goal("value", "<=", _TWO_WINDOWS_MB)), ("client", None))
    }
    growth = Figure("stopped.growth", f"{title}: growth in 10 s, each", "MB")
    bench.results.declare(*figures.values(), growth)
    for run in range(min(bench.runs, _MOST_RUNS)):
        for make in bench.makers(plain=False):
            with make() as side, contextlib.ExitStack() as stack:
                say(f"{title}: run {run + 1}, {side.name}")
                before = memory_of(side)
                for _ in range(count):
                    tunnel = stack.enter_context(side.tunnel(bench.bulk_port))
                    tunnel.command("source 0 262144 0")
                    tunnel.read_exactly(_READ_BYTES)
                    assert tunnel.process is not None
                    tunnel.process.signal(signal.SIGSTOP)
                time.sleep(0.2 if bench.is_quick else 3.0)
                first = memory_of(side)
                time.sleep(0.2 if bench.is_quick else 10.0)
                then = memory_of(side)
            for role, bytes_then in then.items():
                bench.results.add(
                    figures[role], side.name, (bytes_then - before[role]) / count / 1e6
                )
            grown = sum(then.values()) - sum(first.values())
            bench.results.add(growth, side.name, grown / count / 1e6)


def memory_of(side: Side) -> dict[str, int]:
    """Return the PSS in bytes by role."""
    return {role: pss_bytes(pid) for role, pid in side.processes().items()}
