"""Bulk beside keystrokes: a separate process, so that the two share no interpreter's lock.

    flow.py NAME down|up COUNT tcp HOST:PORT...    plain connections
    flow.py NAME down|up COUNT run ARGV...         COUNT processes of this command line

Prints "ready" once all COUNT transfers run, then the bytes so far for each line on standard
input, and ends at eof there. NAME is the name of the sinks. A standalone program.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading

BLOCK = memoryview(os.urandom(65536))


def open_fds(how: str, rest: list[str]) -> tuple[int, int]:
    """Open one transfer; return the descriptors to read from and to write to."""
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
    """Run one endless transfer."""
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
