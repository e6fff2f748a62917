"""The long form: `make fuzz`, or `python -m tests.fuzz` where atheris is installed.

Each target runs in a process of its own, with its share of RELAY_FUZZ_RUNS inputs (a million), from
RELAY_FUZZ_SEED. The first fault ends the run; the input that made it is in .fuzz/, and
`python -m tests.fuzz --replay TARGET FILE` plays it again. Of whole legs one message is one
input, and 40 or so make a round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.processes import resident_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
FOUND = ROOT / ".fuzz"
LEGS = "legs"
# Target -> its module, and its part of all inputs in 100.
TARGETS = {
    "controls": ("decoders", 16),
    "data": ("decoders", 2),
    "rules": ("decoders", 12),
    "credentials": ("decoders", 10),
    "addresses": ("decoders", 5),
    "settings": ("decoders", 5),
    "client_frames": ("streams", 9),
    "server_frames": ("streams", 8),
    "heads": ("streams", 6),
    "answers": ("streams", 5),
    "proxies": ("streams", 2),
    "server_legs": ("machines", 4),
    "client_legs": ("machines", 4),
    LEGS: (LEGS, 12),
}
# From the warm-up, a fifth of the inputs, to the end. atheris keeps what it has learnt.
_WARM_PART = 5
_GROWTH_BYTES = {LEGS: 16 * 2**20}
_GUIDED_GROWTH_BYTES = 48 * 2**20
# One input may take so long, on a slow and busy machine; more is a hang.
_HANG_S = 30
# Rounds of whole legs after which nothing of them may be left.
_ROUNDS = 25
_ROUND_BYTES = 1500


class Memory:
    """RSS after the warm-up and at the end, of so many inputs.

    Free pieces are given back first, and threads share two arenas: else glibc keeps some for
    each of thousands of short threads, which grows for an hour and is nobody's leak.
    """

    def __init__(self, name: str, runs: int) -> None:
        self._name, self._runs = name, runs
        self._warm = 0

    def count(self, done: int) -> bool:
        """Look at the memory when it is time; whether that was the end. Exits if it has grown."""
        if not self._warm and done * _WARM_PART >= self._runs:
            self._warm = _resident_bytes()
        if done < self._runs:
            return False
        now = _resident_bytes()
        print(f"{done} {self._warm} {now}", flush=True)
        if now - self._warm > _GROWTH_BYTES.get(self._name, _GUIDED_GROWTH_BYTES):
            print(f"memory has grown by {now - self._warm} bytes", file=sys.stderr, flush=True)
            os._exit(3)
        return True


def _resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes(os.getpid())


def find(name: str) -> tuple[Callable[[bytes], None], list[bytes]]:
    """Return a target that one thread plays, and what it begins with."""
    module: Any = importlib.import_module(f"tests.fuzz.{TARGETS[name][0]}")
    return module.DECODERS[name], module.SEEDS[name]


def run_guided(name: str, runs: int, seed: int) -> None:
    """Let atheris find inputs; never returns."""
    import atheris

    with atheris.instrument_imports(
        include=["http_network_relay", "client", "server", "ssh_proxy_command"]
    ):
        play, seeds = find(name)
    memory = Memory(name, runs)
    done = 0

    def play_and_count(data: bytes) -> None:
        nonlocal done
        play(data)
        done += 1
        if memory.count(done):
            os._exit(0)

    from tests.fuzz.streams import quieted

    with tempfile.TemporaryDirectory() as corpus, quieted():
        for number, data in enumerate(seeds):
            Path(corpus, str(number)).write_bytes(data)
        longest = 20_000 if name == "heads" else 4096
        options = [f"-seed={seed}", f"-timeout={_HANG_S}", f"-max_len={longest}"]
        options.append(f"-artifact_prefix={FOUND}/{name}-")
        atheris.Setup([name, *options, corpus], play_and_count)
        atheris.Fuzz()


def run_legs(runs: int, seed: int) -> None:
    """Play rounds of whole legs, each from bytes of its own."""
    from tests.fuzz.legs import world

    memory = Memory(LEGS, runs)
    rng = random.Random(seed)
    with world() as played:
        rounds = 0
        while not memory.count(played.messages):
            data = rng.randbytes(_ROUND_BYTES)
            try:
                played.play(data)
                rounds += 1
                if rounds % _ROUNDS == 0:
                    played.settle()
            except BaseException:
                (FOUND / f"{LEGS}-crash-{seed}-{rounds}").write_bytes(data)
                raise


def replay(name: str, path: str) -> None:
    """Play one input that was saved."""
    data = Path(path).read_bytes()
    if name != LEGS:
        find(name)[0](data)
        return
    from tests.fuzz.legs import world

    with world() as played:
        played.play(data)


def run_all(names: list[str], runs: int, seed: int) -> int:
    """Run each target in a process; return how to exit."""
    FOUND.mkdir(exist_ok=True)
    for old in FOUND.iterdir():
        old.unlink()
    parts = sum(TARGETS[name][1] for name in names)
    print(f"seed {seed}; RSS in MB after the warm-up and at the end")
    print(f"{'target':<16}{'inputs':>9}{'secs':>8}{'RSS':>8}{'RSS':>8}", flush=True)
    total = 0
    for name in names:
        share = max(100, -(-runs * TARGETS[name][1] // parts))
        log = FOUND / f"{name}.log"
        command = [sys.executable, "-m", "tests.fuzz", "--child", name]
        begun = time.monotonic()
        with log.open("wb") as errors:
            child = subprocess.run(
                [*command, "--runs", str(share), "--seed", str(seed)],
                cwd=ROOT,
                env={**os.environ, "MALLOC_ARENA_MAX": "2"},
                stdout=subprocess.PIPE,
                stderr=errors,
                check=False,
            )
        secs = time.monotonic() - begun
        figures = child.stdout.decode().split()[-3:]
        if child.returncode or len(figures) != 3:
            saved = ", ".join(str(path) for path in FOUND.glob(f"{name}-*")) or "none"
            print(f"{name} failed: log {log}, input {saved}; replay it with --replay {name} FILE")
            return 1
        inputs, warm, end = map(int, figures)
        total += inputs
        print(f"{name:<16}{inputs:>9}{secs:>8.1f}{warm / 1e6:>8.0f}{end / 1e6:>8.0f}", flush=True)
    print(f"{total} inputs, no fault")
    return 0


def main() -> int:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    environ = os.environ.get
    parser.add_argument("--runs", type=int, default=int(environ("RELAY_FUZZ_RUNS", "1000000")))
    parser.add_argument("--seed", type=int, default=int(environ("RELAY_FUZZ_SEED", "1")))
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; repeatable")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        replay(*args.replay)
    elif args.child == LEGS:
        run_legs(args.runs, args.seed)
    elif args.child:
        run_guided(args.child, args.runs, args.seed)
    else:
        return run_all(args.target or list(TARGETS), args.runs, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
