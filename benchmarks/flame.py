"""Flame graphs of the three programs while one tunnel downloads: `python -m benchmarks.flame DIR`.

Needs py-spy (`pip install py-spy`). Counts only threads that hold the interpreter's lock, so no
waits in system calls. Writes DIR/server.svg, client.svg and proxy.svg.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.bench import targets
from benchmarks.processes import HERE
from benchmarks.sides import Tree

_SECONDS = 5


def main(folder: Path) -> None:
    """Record all three programs at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        targets() as (_, bulk_port),
        Tree("relay", HERE.parent) as side,
        side.stdio_tunnel(bulk_port) as tunnel,
    ):
        assert tunnel.process is not None
        pids = {**side.processes(), "proxy": tunnel.process.pid}
        tunnel.command(f"source 0 {1 << 18} 0")
        recorders = [_record(pid, folder / f"{role}.svg") for role, pid in pids.items()]
        while any(recorder.poll() is None for recorder in recorders):
            tunnel.read_exactly(1 << 20)
    for file in folder.glob("*.svg"):
        text = file.read_text("utf-8")
        for place in (f"{sys.prefix}/bin/", f"{HERE.parent}/", sys.prefix, str(HERE.parent)):
            text = text.replace(place, "")  # Published graphs MUST NOT contain local paths.
        file.write_text(text, "utf-8")


def _record(pid: int, file: Path) -> "subprocess.Popen[bytes]":
    options = ["--gil", "--subprocesses", "--rate", "250", "--duration", str(_SECONDS)]
    return subprocess.Popen(
        ["py-spy", "record", *options, "--output", str(file), "--pid", str(pid)]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
