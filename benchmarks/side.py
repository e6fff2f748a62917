"""The base of all sides of the comparison: processes, road and tunnels."""

import contextlib
import os
import select
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from benchmarks.processes import HERE, environment, start_program
from benchmarks.target import OK
from tests.support.certs import make_certs
from tests.support.debian import run_nginx_tls
from tests.support.ports import free_port
from tests.support.processes import (
    CLIENT_NAME,
    CLIENT_SECRET,
    TOKEN,
    Proc,
    write_credentials,
)
from tests.support.waiting import eventually

# Seconds for the next bytes of a tunnel.
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Road:
    """The path between the two ends: a link (None: loopback), and nginx with TLS."""

    delay_ms: float = 0.0
    mbit: float = 0.0
    nginx: bool = False


class IdleOrder(TypedDict):
    """The input of holder.py for idle connections, without the number."""

    port: int
    request: str
    login: str
    answer: str


class Tunnel:
    """One connection to a target: two descriptors, and the tunnel's process, if any."""

    def __init__(self, read_fd: int, write_fd: int, process: Proc | None) -> None:
        self.read_fd, self.write_fd, self.process = read_fd, write_fd, process
        self._poll = select.poll()
        self._poll.register(read_fd, select.POLLIN)

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes; raises RuntimeError at eof and at the deadline."""
        if not self._poll.poll(DEADLINE_S * 1000):
            raise RuntimeError(f"nothing came: {self.process!r}")
        data = os.read(self.read_fd, size)
        if not data:
            text = self.process.text if self.process else "a plain connection"
            raise RuntimeError(f"a tunnel ended early: {text}")
        return data

    def read_exactly(self, size: int) -> None:
        while size:
            size -= len(self.read(min(size, 1 << 18)))

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.write_fd, view) :]

    def command(self, line: str) -> None:
        """Send the target's command line, and wait for the answer."""
        self.write(line.encode() + b"\n")
        self.read_exactly(len(OK))

    def __enter__(self) -> "Tunnel":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.close()  # closes the pipes too
        else:
            os.close(self.read_fd)


class Side:
    """One side of the comparison. A context manager: tunnels can be opened inside."""

    name = ""

    def __init__(self, road: Road | None = None, threads: int = 64) -> None:
        self.road = road or Road()
        self.threads = threads
        self.stack = contextlib.ExitStack()
        self.server: Proc | None = None
        self.client: Proc | None = None
        self.url = ""
        self.folder = Path()
        self.ca_file: Path | None = None

    def __enter__(self) -> "Side":
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.stack = stack
            self.start()
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stack.close()

    @property
    def is_running(self) -> bool:
        """Whether all started processes still run."""
        return all(process is None or process.is_running for process in (self.server, self.client))

    def start(self) -> None:
        """Start the processes that all tunnels share."""

    def argv(self, port: int) -> list[str]:
        """Return the command line of a tunnel's process."""
        raise NotImplementedError

    def env(self) -> dict[str, str]:
        """Return the environment of a tunnel's process."""
        return environment(HERE)

    def flow_args(self, port: int) -> list[str]:
        """Return the arguments with which flow.py opens a tunnel."""
        return ["run", *self.argv(port)]

    def spawn(self, argv: Sequence[str]) -> Tunnel:
        process = Proc(argv, env=self.env(), cwd=self.folder, pipes=True)
        stdin, stdout = process.popen.stdin, process.popen.stdout
        assert stdin is not None
        assert stdout is not None
        return Tunnel(stdout.fileno(), stdin.fileno(), process)

    def tunnel(self, port: int) -> Tunnel:
        return self.spawn(self.argv(port))

    def stdio_tunnel(self, port: int) -> Tunnel:
        """Open a tunnel over a process's standard input and output, for any side."""
        return self.spawn(self.argv(port))

    def open_once(self, port: int) -> float:
        """Open and close one tunnel; return the seconds from the handshake's end to the open."""
        raise NotImplementedError

    def idle_server(self) -> tuple[int, IdleOrder]:
        """Return the id of the process that bears idle connections, and how to open them."""
        raise NotImplementedError

    def processes(self) -> dict[str, int]:
        """Return role -> process id of the processes that all tunnels share."""
        found = {"server": self.server, "client": self.client}
        return {role: process.pid for role, process in found.items() if process is not None}

    def start_link(self, *ports: int) -> list[int]:
        """Start one link for all `ports`, if the road has a link; return the ports to dial."""
        if not self.road.mbit:
            return list(ports)
        options = ("--delay-ms", self.road.delay_ms, "--mbit", self.road.mbit)
        process, link_ports = start_program("link.py", *ports, *options)
        self.stack.enter_context(process)
        return link_ports

    def start_server(self, root: Path, app: str) -> int:
        """Start gunicorn as in the README, with this side's threads; return the port."""
        port = free_port()
        argv = [sys.executable, "-m", "gunicorn", "--threads", str(self.threads)]
        credentials_file = write_credentials(self.folder, self.credentials())
        setting = {
            "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(credentials_file),
            # No limit: the benchmark measures the cost of an open, not the rate limit.
            "HTTP_NETWORK_RELAY_OPENS_PER_SECOND": "0",
        }
        server = Proc(
            [*argv, "--bind", f"127.0.0.1:{port}", app], env=environment(root, **setting), cwd=root
        )
        self.server = self.stack.enter_context(server)
        eventually(lambda: is_healthy(server, port), 20.0, message=f"no answer:\n{server.text}")
        return port

    def credentials(self) -> object:
        return {"clients": {CLIENT_NAME: CLIENT_SECRET}, "proxy_users": [TOKEN]}

    def front(self, port: int) -> tuple[str, int]:
        """Start nginx before `port`, if the road has nginx; return the scheme and the port."""
        if not self.road.nginx:
            return "ws", port
        certs = make_certs(self.folder)
        self.ca_file = certs.ca
        nginx = run_nginx_tls(self.folder / "nginx", port, certs.cert, certs.key)
        return "wss", self.stack.enter_context(nginx).port


def is_healthy(server: Proc, port: int) -> bool:
    """Return whether the server answers; raises RuntimeError if the server has ended."""
    if not server.is_running:
        raise RuntimeError(f"a server ended:\n{server.text}")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
