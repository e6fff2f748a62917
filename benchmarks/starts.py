"""The waits before the first byte: the script's start, and the open of a tunnel."""

import socket
import statistics
import subprocess
import sys
import threading
import time

from benchmarks.bench import Bench
from benchmarks.processes import HERE, environment
from benchmarks.results import Figure, Goal
from benchmarks.side import Side
from tests.support.processes import Proc

IMPORTS = "import websocket, ssl, json"


def measure_cold(bench: Bench) -> None:
    """Measure from the process's start to the first byte sent, and to the first byte received."""
    wire = Figure("cold.wire", "cold start to first byte out", "ms")
    over = Figure("cold.ratio", "cold start over the imports", "x", Goal("value", "<=", 1.5))
    imports = Figure("cold.imports", f'python -c "{IMPORTS}"', "ms")
    back = Figure("cold.back", "cold start to first byte back", "ms")
    times = 1 if bench.is_quick else 5
    with bench.sides() as sides:
        for side in bench.turns(sides, "cold start"):
            if side.name != "plain":
                pairs = [(first_byte_out_s(side), imports_s()) for _ in range(times)]
                out = statistics.median(pair[0] for pair in pairs)
                beside = statistics.median(pair[1] for pair in pairs)
                bench.results.add(wire, side.name, out * 1000)
                bench.results.add(imports, side.name, beside * 1000)
                bench.results.add(over, side.name, out / beside)
            backs = [first_byte_back_s(side, bench.echo_port) for _ in range(times)]
            bench.results.add(back, side.name, statistics.median(backs) * 1000)


def imports_s() -> float:
    """Return the seconds for the start of Python and the three imports."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=environment(HERE))
    return time.monotonic() - begun


def first_byte_out_s(side: Side) -> float:
    """Return the seconds until a listener in the server's place reads the first byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        port = listener.getsockname()[1]
        argv = [arg.replace(side.url, f"ws://127.0.0.1:{port}") for arg in side.argv(1)]
        begun = time.monotonic()
        with Proc(argv, env=side.env(), cwd=side.folder, pipes=True):
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                sock.recv(1)
                return time.monotonic() - begun


def first_byte_back_s(side: Side, port: int) -> float:
    """Return the seconds until the target's answer is on standard output."""
    begun = time.monotonic()
    with side.tunnel(port) as tunnel:
        tunnel.command("echo")
        return time.monotonic() - begun


def measure_open(bench: Bench) -> None:
    """Measure from the 101 to `opened`, one at a time, and opens a second by four threads."""
    wait = Figure("open.ms", "open, 101 to opened", "ms", Goal("value", "<=", 3))
    rate = Figure("open.rate", "opens per second", "1/s")
    times = 10 if bench.is_quick else 100
    seconds = 0.2 if bench.is_quick else 3.0
    with bench.sides() as sides:
        for side in bench.turns(sides, "open"):
            waits = [side.open_once(bench.echo_port) for _ in range(times)]
            bench.results.add(wait, side.name, statistics.median(waits) * 1000)
            bench.results.add(rate, side.name, opens_per_second(side, bench.echo_port, seconds))


def opens_per_second(side: Side, port: int, seconds: float) -> float:
    """Return the opens a second of four threads that open and close without a pause."""
    failures: list[BaseException] = []
    counts = [0] * 4
    begun = time.monotonic()

    def run(index: int) -> None:
        try:
            while time.monotonic() < begun + seconds:
                side.open_once(port)
                counts[index] += 1
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError("a tunnel did not open") from failures[0]
    return sum(counts) / (time.monotonic() - begun)
