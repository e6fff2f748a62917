"""The benchmark's processes, and what the kernel says of them."""

import os
import re
import sys
from pathlib import Path

from tests.support.processes import Proc, child_environment

HERE = Path(__file__).resolve().parent

_TICKS = os.sysconf("SC_CLK_TCK")
# What Linux keeps in the kernel for each thread on a 64-bit machine (THREAD_SIZE).
KERNEL_STACK_BYTES = 16 * 1024


def environment(root: Path, **extra: str) -> dict[str, str]:
    """The environment in which programs of the checkout `root` run."""
    return child_environment({"PYTHONPATH": str(root), **extra})


def start_program(name: str, *args: object) -> tuple[Proc, list[int]]:
    """Start one of this folder's programs that says its ports; the process and they."""
    argv = [sys.executable, str(HERE / name), *(str(arg) for arg in args)]
    process = Proc(argv, env=environment(HERE), cwd=HERE)
    try:
        line = process.wait_for_line(r"^listening \d+")
    except BaseException:
        process.close()
        raise
    return process, [int(port) for port in line.split()[1:]]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    pids = [pid]
    for each in pids:  # which grows as we go
        try:
            tasks = os.listdir(f"/proc/{each}/task")
            for task in tasks:
                text = Path(f"/proc/{each}/task/{task}/children").read_text()
                pids += [int(child) for child in text.split()]
        except OSError:
            continue  # it has ended
    return pids


def cpu_s(pid: int) -> float:
    """CPU seconds so far, user and system, of a process and its children, ended ones too."""
    ticks = 0
    for each in family(pid):
        try:
            text = Path(f"/proc/{each}/stat").read_text()
        except OSError:
            continue
        # After the name, which may hold anything: fields 14 to 17 of proc(5).
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:15])
    return ticks / _TICKS


def pss_bytes(pid: int) -> int:
    """Memory of a process and its children, shared pages by their share."""
    total = 0
    for each in family(pid):
        text = Path(f"/proc/{each}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert match is not None
        total += int(match[1]) * 1024
    return total


def kernel_stack_bytes(pid: int) -> int:
    """What the kernel keeps for the threads of a process and its children."""
    return sum(len(os.listdir(f"/proc/{each}/task")) for each in family(pid)) * KERNEL_STACK_BYTES
