"""Bulk through one tunnel: MB/s, and CPU seconds per GB of each program. Loopback."""

import time

from benchmarks.bench import Bench
from benchmarks.processes import cpu_s
from benchmarks.results import Figure, Goal
from benchmarks.side import Side, Tunnel

MB = 1_000_000
# Bytes of one read or write, as in the sources and sinks.
_CHUNK_BYTES = 1 << 18
ROLES = ("server", "client", "proxy", "all")

SPEED = {
    "down": Figure("bulk.down", "bulk down", "MB/s", Goal("plain", ">=", 0.55)),
    "up": Figure("bulk.up", "bulk up", "MB/s", Goal("plain", ">=", 0.35)),
}
SERVER_GOAL = {"down": Goal("value", "<=", 1.5), "up": Goal("value", "<=", 1.8)}
PACED_RATE = 25 * MB
PACED_CHUNK_BYTES = 16 * 1024


def measure_bulk(bench: Bench) -> None:
    """Measure the greatest speed, down and up."""
    bench.results.declare(*SPEED.values())
    with bench.sides() as sides:
        for side in bench.turns(sides, "bulk"):
            for direction in ("down", "up"):
                size = (16 if bench.is_quick else 128 if side.name == "stock" else 512) * MB
                with side.stdio_tunnel(bench.bulk_port) as tunnel:
                    seconds, cpu = transfer(side, tunnel, direction, size, f"{_CHUNK_BYTES} 0")
                bench.results.add(SPEED[direction], side.name, size / seconds / MB)
                add_cpu(bench, side, f"bulk {direction}", cpu, size, SERVER_GOAL[direction], 5.0)


def measure_paced(bench: Bench) -> None:
    """Measure a download whose target writes 16 KiB at a time at 200 Mbit/s."""
    size = (8 if bench.is_quick else 100) * MB
    with bench.sides() as sides:
        for side in bench.turns(sides, "paced"):
            with side.stdio_tunnel(bench.bulk_port) as tunnel:
                pace = f"{PACED_CHUNK_BYTES} {PACED_RATE}"
                _, cpu = transfer(side, tunnel, "down", size, pace)
            add_cpu(bench, side, "16 KiB at 200 Mbit/s", cpu, size, None, 8.0)


def transfer(
    side: Side, tunnel: Tunnel, direction: str, size: int, pace: str
) -> tuple[float, dict[str, float]]:
    """Transfer `size` bytes; return the seconds, and the CPU seconds of each role.

    Both clocks start at the open tunnel and stop when the reader has the last byte.
    """
    tunnel.command(f"source {size} {pace}" if direction == "down" else f"sink {size} bulk")
    pids = dict(side.processes())
    if tunnel.process is not None:
        pids["proxy"] = tunnel.process.pid
    before = {role: cpu_s(pid) for role, pid in pids.items()}
    begun = time.monotonic()
    if direction == "down":
        tunnel.read_exactly(size)
    else:
        block = memoryview(bytes(_CHUNK_BYTES))
        for offset in range(0, size, _CHUNK_BYTES):
            tunnel.write(block[: size - offset])
        tunnel.read_exactly(len(b"done\n"))
    seconds = time.monotonic() - begun
    return seconds, {role: cpu_s(pid) - before[role] for role, pid in pids.items()}


def add_cpu(
    bench: Bench,
    side: Side,
    title: str,
    cpu: dict[str, float],
    size: int,
    server_goal: Goal | None,
    bound: float,
) -> None:
    """Record a figure for each role, and one for the sum."""
    bench.results.declare(*(cpu_figure(title, role, server_goal, bound) for role in ROLES))
    for role, seconds in {**cpu, "all": sum(cpu.values())}.items():
        figure = cpu_figure(title, role, server_goal, bound)
        bench.results.add(figure, side.name, seconds * 1000 * MB / size)


def cpu_figure(title: str, role: str, server_goal: Goal | None, bound: float) -> Figure:
    """Return the figure of a role; `bound` is the goal of the sum."""
    goals = {"server": server_goal, "all": Goal("value", "<=", bound)}
    return Figure(f"cpu.{title}.{role}", f"CPU {title}: {role}", "s/GB", goals.get(role))
