"""Bulk beside a keystroke: its own process, so that no reader shares an interpreter with it.

    flow.py NAME down|up COUNT tcp HOST:PORT...    plain connections
    flow.py NAME down|up COUNT run ARGV...         so many processes of this command line

Says "ready" once all COUNT of them are under way, then a line with the bytes so far for each
line on its standard input, and ends with that. NAME is its sinks'. A standalone program.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading

BLOCK = memoryview(os.urandom(65536))


def open_fds(how: str, rest: list[str]) -> tuple[int, int]:
    """Where to read and where to write."""
    if how == "tcp":
        host, _, port = rest[0].partition(":")
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = sock.detach()
        return fd, fd
    process = subprocess.Popen(rest, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    return os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())


def run(index: int, direction: str, fds: tuple[int, int], counts: list[int]) -> None:
    """One transfer without end."""
    read_fd, write_fd = fds
    with contextlib.suppress(OSError):
        if direction == "down":
            while data := os.read(read_fd, 1 << 18):
                counts[index] += len(data)
        else:
            while True:
                counts[index] += os.write(write_fd, BLOCK)


def main() -> None:
    name, direction, count, how, *rest = sys.argv[1:]
    all_fds = [open_fds(how, rest) for _ in range(int(count))]
    command = "source 0 262144 0" if direction == "down" else f"sink 0 {name}"
    for _, write_fd in all_fds:
        os.write(write_fd, command.encode() + b"\n")
    for read_fd, _ in all_fds:
        answer = b""
        while len(answer) < 3:
            more = os.read(read_fd, 3 - len(answer))
            if not more:
                raise SystemExit("a bulk tunnel did not open")
            answer += more
    counts = [0] * len(all_fds)
    for index, fds in enumerate(all_fds):
        args = (index, direction, fds, counts)
        threading.Thread(target=run, args=args, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(sum(counts), flush=True)


if __name__ == "__main__":
    main()
