"""`python -m benchmarks`: measure, print one table, write JSON and a chart."""

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks import bulk, chart, keystroke, many, starts
from benchmarks.bench import Bench, give_up, targets

ROOT = Path(__file__).resolve().parent.parent

GROUPS: dict[str, Callable[[Bench], None]] = {
    "bulk": bulk.measure_bulk,
    "cpu": bulk.measure_paced,
    "idle": keystroke.measure_idle,
    "beside": keystroke.measure_beside,
    "link": keystroke.measure_link,
    "cold": starts.measure_cold,
    "open": starts.measure_open,
    "clients": many.measure_clients,
    "stopped": many.measure_stopped,
    "long": keystroke.measure_long,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="GROUPS", help=f"of {','.join(GROUPS)}")
    parser.add_argument("--runs", type=int, metavar="N", help="runs to take the median of (5)")
    parser.add_argument("--quick", action="store_true", help="small and once: does it work at all?")
    parser.add_argument("--full", action="store_true", help="with 5,000 clients")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--against", type=Path, help="another one to measure in turns with it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.groups = args.only.split(",") if args.only else list(GROUPS)
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        parser.error(f"no group {unknown[0]!r}: there are {','.join(GROUPS)}")
    if args.runs is None:
        args.runs = 1 if args.quick else 5
    return args


def main() -> int:
    args = parse()
    # For thousands of connections; the child processes inherit the limit.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGALRM, give_up)
    trees = {"relay": args.tree.resolve()}
    if args.against:
        trees["base"] = args.against.resolve()
    begun, load = time.monotonic(), os.getloadavg()[0]
    failed = []
    with contextlib.ExitStack() as stack:
        echo_port, bulk_port = stack.enter_context(targets())
        bench = Bench(trees, args.runs, args.quick, args.full, echo_port, bulk_port)
        stack.callback(bench.close)
        for group in args.groups:
            try:
                GROUPS[group](bench)
            except Exception:  # the other groups' figures stay valid
                failed.append(group)
                traceback.print_exc()
        signal.alarm(0)
    print(bench.results.table("relay", "base" if args.against else None))
    seconds = time.monotonic() - begun
    print(f"\n{machine()}, load before {load:.1f}; runs: {args.runs}; {seconds:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    commits = {side: commit(root) for side, root in trees.items()}
    report = {
        "machine": machine(),
        "load_before": load,
        "commits": commits,
        "runs": args.runs,
        "figures": bench.results.as_json(),
    }
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(chart.draw(bench.results, args.out / f"{name}.png"))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def commit(root: Path) -> str:
    """Return the output of `git describe` for a checkout; empty without git data."""
    argv = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(argv, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
