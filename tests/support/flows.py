"""Steps that several end-to-end tests take: marks in logs, tunnels, transfers, ssh."""

from __future__ import annotations

import concurrent.futures
import hashlib
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support.processes import Pipes, Proc, Relay, proxy_argv, proxy_env
from tests.support.secrecy import check_no_secret
from tests.support.targets import pseudo_random
from tests.support.waiting import eventually

T = TypeVar("T")

# No end of a tunnel takes longer where there is a FIN or an RST (docs/protocol.md).
AT_ONCE_S = 1.0
_LOGS = ("server", "client")


def lines_since(process: Proc, mark: int) -> list[str]:
    """Return the lines that `process` wrote after `mark`, a former `line_count`."""
    while True:
        count = process.line_count
        lines = process.lines
        if process.line_count == count:
            first_kept = count - len(lines)
            return lines[max(0, mark - first_kept) :]


@dataclass(frozen=True)
class Mark:
    """A place in the logs of a relay: the lines behind it belong to one test."""

    relay: Relay
    server_line: int
    client_line: int

    @classmethod
    def now(cls, relay: Relay) -> Mark:
        """Mark both logs, once all earlier tunnels have ended in both."""
        start = cls(relay, 0, 0)

        def is_quiet() -> bool:
            seen = start.tunnels()
            return all(seen[f"{who} opened"] == seen[f"{who} closed"] for who in _LOGS)

        eventually(is_quiet, message="a tunnel of the test before is left")
        return cls(relay, relay.server.line_count, relay.client.line_count)

    @property
    def server_lines(self) -> list[str]:
        return lines_since(self.relay.server, self.server_line)

    @property
    def client_lines(self) -> list[str]:
        return lines_since(self.relay.client, self.client_line)

    def tunnels(self) -> dict[str, int]:
        """Return how many tunnels each log has opened and closed."""
        return {
            "server opened": count(self.server_lines, r"tunnel (started|opened) "),
            "server closed": count(self.server_lines, "tunnel closed "),
            "client opened": count(self.client_lines, "tunnel opened "),
            "client closed": count(self.client_lines, "tunnel closed "),
        }

    def reasons(self) -> tuple[list[str], list[str]]:
        """The reasons of all `tunnel closed` lines, (server's, client's)."""
        return reasons(self.server_lines), reasons(self.client_lines)

    def wait_all_closed(self, opened: int, timeout_s: float = AT_ONCE_S) -> None:
        """Wait until both logs have `opened` tunnels, all of them closed."""
        wanted = dict.fromkeys(self.tunnels(), opened)
        becomes(self.tunnels, wanted, timeout_s)


def count(lines: Iterable[str], regex: str) -> int:
    """Return in how many lines `regex` is found."""
    return sum(re.search(regex, line) is not None for line in lines)


def reasons(lines: Iterable[str]) -> list[str]:
    """The reason of each `tunnel closed` line."""
    found = (re.search(r"tunnel closed .*?reason=(\w+)", line) for line in lines)
    return [match[1] for match in found if match]


def becomes(look: Callable[[], T], wanted: T, timeout_s: float = AT_ONCE_S) -> None:
    """Wait until `look` returns `wanted`; raise AssertionError with its last value if not."""

    def check() -> bool:
        seen = look()
        assert seen == wanted, f"{seen!r} is not {wanted!r}"
        return True

    eventually(check, timeout_s)


def connections_to(port: int) -> list[str]:
    """The states of this machine's connections to 127.0.0.1:`port` that are not yet over."""
    time_wait = "06"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[3] for row in rows if row[2].endswith(f":{port:04X}") and row[3] != time_wait]


def side_by_side(tasks: Sequence[Callable[[], T]], at_once: int | None = None) -> list[T]:
    """Run all tasks in threads, at most `at_once` at a time; raise the first failure."""
    with concurrent.futures.ThreadPoolExecutor(at_once or len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def run(
    argv: Sequence[str], *, timeout_s: float = 30.0, data: bytes | None = b"", **options: object
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, as the proxy user: the token is in its environment.

    AssertionError if it writes a secret that was noted before.
    """
    options.setdefault("env", proxy_env())
    done: subprocess.CompletedProcess[bytes] = subprocess.run(  # type: ignore[call-overload]
        argv, input=data, capture_output=True, timeout=timeout_s, **options
    )
    check_no_secret(" ".join(map(str, argv)), done.stdout, done.stderr)
    return done


def relay_argv(relay: Relay, port: int, url: str | None = None) -> list[str]:
    """The proxy command's argument list for `port` at this relay's client."""
    return proxy_argv(url or relay.url, port=port)


@dataclass(frozen=True)
class Transfer:
    """The output of a tunnel, and the rate of both ways together."""

    sha256: str
    size: int
    status: int
    lines: list[str]
    seconds: float


def transfer(proxy: Pipes, size: int, seed: int | str, timeout_s: float = 60.0) -> Transfer:
    """Send pseudo_random(size, seed) and EOF while reading stdout to its end."""
    begun = time.monotonic()
    digest = hashlib.sha256()

    def send() -> None:
        for chunk in pseudo_random(size, seed):
            proxy.send(chunk, timeout_s)
        proxy.close_stdin()

    def receive() -> int:
        received = 0
        while data := proxy.receive(1 << 20, timeout_s):
            digest.update(data)
            received += len(data)
        return received

    _, received = side_by_side([send, receive])
    status = proxy.wait()
    seconds = time.monotonic() - begun
    return Transfer(digest.hexdigest(), received or 0, status, proxy.lines, seconds)
