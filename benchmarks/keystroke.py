"""The round trip of a keystroke: alone, beside bulk, and over a slow link with long delay."""

import random
import statistics
import time
from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.results import Figure, Goal
from benchmarks.side import Road, Side, Tunnel

# About the bytes that ssh sends for a key, padding and MAC included.
_KEY = bytes(36)
_WARM_UP_KEYS = 20


def type_keys(tunnel: Tunnel, seconds: float, gap_s: float, keys: int = 1 << 30) -> list[float]:
    """Send keys with random pauses of mean `gap_s`; return the round trips in ms."""
    draw = random.Random(1)
    deadline = time.monotonic() + seconds
    trips: list[float] = []
    while len(trips) < keys and time.monotonic() < deadline:
        time.sleep(draw.uniform(0.5, 1.5) * gap_s)
        begun = time.monotonic()
        tunnel.write(_KEY)
        tunnel.read_exactly(len(_KEY))
        trips.append((time.monotonic() - begun) * 1000)
    return trips


def percentile(values: list[float], percent: int) -> float:
    """Return the value that `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def measure_idle(bench: Bench) -> None:
    """Measure keystrokes without other load."""
    p50 = Figure("key.idle.p50", "keystroke idle p50", "ms", Goal("plain", "<=", 5))
    p99 = Figure("key.idle.p99", "keystroke idle p99", "ms")
    tail = Figure("key.idle.tail", "keystroke idle p99 / p50", "x", Goal("value", "<=", 2.5))
    keys = 50 if bench.is_quick else 1000
    with bench.sides() as sides:
        for side in bench.turns(sides, "idle"):
            with side.tunnel(bench.echo_port) as tunnel:
                tunnel.command("echo")
                type_keys(tunnel, 60.0, 0.003, _WARM_UP_KEYS)
                trips = type_keys(tunnel, 60.0, 0.003, keys)
            bench.results.add(p50, side.name, statistics.median(trips))
            bench.results.add(p99, side.name, percentile(trips, 99))
            bench.results.add(tail, side.name, percentile(trips, 99) / statistics.median(trips))


def measure_beside(bench: Bench) -> None:
    """Measure beside one download, one upload, and 20 downloads of the same client."""
    cases = [("down", 1, True), ("up", 1, True), ("down", 3 if bench.is_quick else 20, False)]
    with bench.sides() as sides:
        for direction, count, has_goal in cases:
            what = f"{count} {direction}"
            for side in bench.turns(sides, f"keystroke beside {what}"):
                seconds = 0.3 if bench.is_quick else 5.0
                goals = (2.0, 10.0, 0.8) if has_goal else None
                beside(bench, side, direction, count, seconds, what, goals)


def measure_link(bench: Bench) -> None:
    """Measure at 40 ms round trip and 20 Mbit/s, direct and through nginx with TLS."""
    for nginx in (True,) if bench.is_quick else (False, True):
        road = Road(delay_ms=20, mbit=20, nginx=nginx)
        where = "20 Mbit/s 40 ms" + (" nginx" if nginx else "")
        with bench.sides(road) as sides:
            for direction in ("up",) if bench.is_quick else ("down", "up"):
                for side in bench.turns(sides, f"{where} {direction}"):
                    seconds = 0.3 if bench.is_quick else 8.0
                    goals = (None, 120.0, 0.85)
                    beside(bench, side, direction, 1, seconds, f"{where} {direction}", goals)


def beside(
    bench: Bench,
    side: Side,
    direction: str,
    count: int,
    seconds: float,
    what: str,
    goals: tuple[float | None, float, float] | None,
) -> None:
    """Measure keystrokes beside `count` bulk transfers, and the share of speed that bulk keeps.

    The share is of the bulk's speed alone just before, or of the link's rate with a link.
    `goals` are for p50, p99 and the share.
    """
    p50_goal, p99_goal, kept_goal = goals or (None, None, None)
    key = f"key.{what}"
    p50 = Figure(f"{key}.p50", f"keystroke beside {what} p50", "ms", at_most(p50_goal))
    p99 = Figure(f"{key}.p99", f"keystroke beside {what} p99", "ms", at_most(p99_goal))
    least = Goal("value", ">=", kept_goal) if kept_goal else None
    kept = Figure(f"{key}.kept", f"keystroke beside {what}: bulk keeps", "part", least)
    with side.tunnel(bench.echo_port) as tunnel:
        tunnel.command("echo")
        type_keys(tunnel, 60.0, 0.003, 5)
        with bench.flow(side, direction, count) as flow:
            time.sleep(min(seconds, 2.0))  # s, for the windows to grow
            speeds = []
            if side.road.mbit:
                speeds.append(side.road.mbit * 125_000)
            else:
                speeds.append(speed(flow.bytes, lambda: time.sleep(seconds / 2)))
            trips: list[float] = []
            gap_s = 0.02
            speeds.append(
                speed(flow.bytes, lambda: trips.extend(type_keys(tunnel, seconds, gap_s)))
            )
    bench.results.add(p50, side.name, statistics.median(trips))
    bench.results.add(p99, side.name, percentile(trips, 99))
    bench.results.add(kept, side.name, speeds[1] / speeds[0])


def measure_long(bench: Bench) -> None:
    """Measure one download at 100 ms round trip and 200 Mbit/s."""
    road = Road(delay_ms=50, mbit=200)
    figure = Figure("long.down", "one stream, 200 Mbit/s 100 ms", "part", Goal("value", ">=", 0.92))
    rise = Figure("long.rise", "one stream, its first 5 s", "part")
    with bench.sides(road) as sides:
        for side in bench.turns(sides, "long link"):
            with bench.flow(side, "down") as flow:
                seconds = 0.3 if bench.is_quick else 5.0
                first = speed(flow.bytes, lambda s=seconds: time.sleep(s))  # type: ignore[misc]
                then = speed(flow.bytes, lambda s=seconds: time.sleep(s))  # type: ignore[misc]
            bench.results.add(figure, side.name, then / (road.mbit * 125_000))
            bench.results.add(rise, side.name, first / (road.mbit * 125_000))


def speed(count: Callable[[], int], meanwhile: Callable[[], object]) -> float:
    """Return the bytes a second while `meanwhile` runs."""
    begun, before = time.monotonic(), count()
    meanwhile()
    return (count() - before) / (time.monotonic() - begun)


def at_most(bound: float | None) -> Goal | None:
    return None if bound is None else Goal("value", "<=", bound)
