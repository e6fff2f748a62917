"""The benchmark's processes, and their CPU time and memory from /proc."""

import os
import re
import sys
from pathlib import Path

from tests.support.processes import Proc, child_environment

HERE = Path(__file__).resolve().parent

_TICKS = os.sysconf("SC_CLK_TCK")
# Bytes of a thread's kernel stack in Linux on a 64-bit machine (THREAD_SIZE).
KERNEL_STACK_BYTES = 16 * 1024


def environment(root: Path, **extra: str) -> dict[str, str]:
    """Return the environment for programs of the checkout `root`."""
    return child_environment({"PYTHONPATH": str(root), **extra})


def start_program(name: str, *args: object) -> tuple[Proc, list[int]]:
    """Start a program of this folder that prints ports; return the process and the ports."""
    argv = [sys.executable, str(HERE / name), *(str(arg) for arg in args)]
    process = Proc(argv, env=environment(HERE), cwd=HERE)
    try:
        line = process.wait_for_line(r"^listening \d+")
    except BaseException:
        process.close()
        raise
    return process, [int(port) for port in line.split()[1:]]


def family(pid: int) -> list[int]:
    """Return the ids of a process and all descendants."""
    pids = [pid]
    for each in pids:  # grows during the loop
        try:
            tasks = os.listdir(f"/proc/{each}/task")
            for task in tasks:
                text = Path(f"/proc/{each}/task/{task}/children").read_text()
                pids += [int(child) for child in text.split()]
        except OSError:
            continue  # the process has ended
    return pids


def cpu_s(pid: int) -> float:
    """Return the user and system CPU seconds of a process and all children, ended ones too."""
    ticks = 0
    for each in family(pid):
        try:
            text = Path(f"/proc/{each}/stat").read_text()
        except OSError:
            continue
        # Fields 14 to 17 of proc(5), counted from the last `)`, since the name may contain spaces.
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:15])
    return ticks / _TICKS


def pss_bytes(pid: int) -> int:
    """Return the PSS of a process and all children: each shared page counts in part."""
    total = 0
    for each in family(pid):
        text = Path(f"/proc/{each}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert match is not None
        total += int(match[1]) * 1024
    return total


def kernel_stack_bytes(pid: int) -> int:
    """Return the bytes of kernel stacks of all threads of a process and all children."""
    return sum(len(os.listdir(f"/proc/{each}/task")) for each in family(pid)) * KERNEL_STACK_BYTES
