"""Very many proxy commands and clients on a small machine, all of them real code.

Each proxy command is a process of its own, forked from one that has already imported the
script. The clients are `client.agent.Agent`s in the threads of one process. This file runs as
either of the two, and reads its orders as lines from standard input.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from server.live_legs import SPREAD_MS_PER_LEG
from tests.support.flows import lines_since
from tests.support.ports import free_port
from tests.support.processes import (
    TOKEN,
    Pipes,
    Server,
    child_environment,
    proxy_env,
    start_server,
)
from tests.support.targets import EchoTarget

MESSAGE_BYTES = 32
READY_S = 120.0
# Of the requirement: from the moment at which the server answers.
RETURN_S = 10.0
# A server that all ends reach at once would answer nobody.
HEALTH_S = 3.0
_LEG_UP = re.compile(r"^(\S+ \S+?),(\d+) INFO leg up ")
# The user replaced the leg at the old worker, so the old worker sees the leg lost, not closed.
_TUNNEL_KEPT = re.compile(r"tunnel closed reason=(user_lost|superseded)")
_USER_LEG_UP = re.compile("INFO leg up user=")
# kill -9 and SIGTERM, with a new start; SIGHUP to the master.
Restart = Literal["kill", "terminate", "reload"]


@dataclass(frozen=True)
class FleetSize:
    clients: int
    tunnels: int


def check_fleet_returns(folder: Path, size: FleetSize, how: Restart) -> str:
    """Start a new server or worker; every tunnel must echo again. Return a line of figures."""
    secrets = {f"device-{number}": f"cs-{number:04d}-{'x' * 24}" for number in range(size.clients)}
    port = free_port()
    options: dict[str, Any] = {
        "threads": 2 * (size.clients + size.tunnels),
        "port": port,
        "credentials": {"clients": secrets, "proxy_users": [TOKEN]},
    }
    me = [sys.executable, "-m", "tests.support.fleet"]
    url = f"ws://127.0.0.1:{port}"
    (folder / "clients.json").write_text(json.dumps(secrets))
    with EchoTarget() as target, start_server(folder, **options) as server:
        clients = [*me, "clients", url, str(folder / "clients.json")]
        users = [*me, "users", url, str(target.port), str(size.clients), str(size.tunnels)]
        with Pipes(clients, env=child_environment()) as agents:
            begun = time.monotonic()
            agents.send(b"up\n")
            _answer(agents, READY_S)
            with Pipes(users, env=proxy_env()) as commands:
                _ask(commands, "echo 1", READY_S)
                opened_s = time.monotonic() - begun
                with restarted(server, how, folder, options) as server:
                    mark = server.line_count if how == "reload" else 0
                    up_at = time.monotonic()
                    with Health(server.health, may_refuse=how == "reload") as health:
                        if how == "reload":
                            server.signal(signal.SIGHUP)
                        stall_s = _echo_until_back(commands, server, mark, size.tunnels)
                    back_s = time.monotonic() - up_at
                    lines = lines_since(server, mark)
                    arrivals = _arrivals(lines)
                    kept = sum(bool(_TUNNEL_KEPT.search(line)) for line in lines)
                    assert _ask(commands, "end", READY_S)[0] == 0, commands.text
                    assert "Traceback" not in server.text + agents.text + commands.text
    most = most_at_once(how, size.clients + size.tunnels)
    line = (
        f"{how}, {size.tunnels} tunnels of {size.clients} clients: opened in {opened_s:.1f} s; all"
        f" back {back_s:.2f} s after the server was up; the longest wait for an echo {stall_s:.2f}"
        f" s; at most {max(arrivals)} legs in 100 ms, {most} is a herd; {kept} tunnels had"
        f" another leg before theirs was ended;"
        f" /healthz at worst {health.worst_s * 1000:.0f} ms of {health.count} asked"
    )
    print(line)
    assert back_s <= RETURN_S, line
    assert health.worst_s < HEALTH_S, line
    assert max(arrivals) < most, line
    return line


@contextmanager
def restarted(
    server: Server, how: Restart, folder: Path, options: dict[str, Any]
) -> Iterator[Server]:
    """The server that they come back to; a reload is still to be asked for."""
    if how == "reload":
        yield server
        return
    server.signal(signal.SIGTERM) if how == "terminate" else server.kill()
    server.wait()
    # All ends have failed their first tries, and wait.
    with start_server(folder, **options) as another:
        yield another


def _echo_until_back(commands: Pipes, server: Server, mark: int, tunnels: int) -> float:
    """Echo until each has a leg of the new server; return the longest time of a message."""
    longest_s, number, count = 0.0, 1, 0
    deadline = time.monotonic() + READY_S
    while count < tunnels:
        assert time.monotonic() < deadline, f"only {count} legs came"
        number += 1
        longest_s = max(longest_s, _ask(commands, f"echo {number}", READY_S)[1])
        count = sum(bool(_USER_LEG_UP.search(line)) for line in lines_since(server, mark))
    return longest_s


def most_at_once(how: Restart, legs: int) -> int:
    """How many legs in 100 ms would be a herd: four times the deviation more than is promised.

    A reload spreads them by `spread_ms`. After SIGTERM each tries every 100 to 300 ms, so every
    other one finds the new server in the first 100 ms. After kill -9 they wait for 0.2 s and more
    on the average: from 0 to 0.2 s, doubling, and a start takes longer than the first two waits.
    """
    mean = {"reload": 100 / SPREAD_MS_PER_LEG, "terminate": legs / 2, "kill": legs / 4}[how]
    return int(mean + 4 * mean**0.5)


class Health:
    """Asks /healthz again and again, in a thread of its own.

    `may_refuse`: a worker that is being replaced says that it is, or nothing.
    """

    def __init__(self, ask: Callable[[], int], *, may_refuse: bool) -> None:
        self._ask = ask
        self._may_refuse = may_refuse
        self.worst_s = 0.0
        self.count = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health")

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.05):
            begun = time.monotonic()
            try:
                is_well = self._ask() == 200 or self._may_refuse
            except OSError:
                is_well = self._may_refuse
            self.worst_s = max(self.worst_s, time.monotonic() - begun if is_well else 99.0)
            self.count += 1


def _ask(process: Pipes, line: str, timeout_s: float) -> tuple[float, float]:
    process.send(line.encode() + b"\n")
    first, last = _answer(process, timeout_s).split()
    return float(first), float(last)


def _answer(process: Pipes, timeout_s: float) -> str:
    data = b""
    while not data.endswith(b"\n"):
        more = process.receive(timeout_s=timeout_s)
        assert more, f"{process!r} ended: {process.text}"
        data += more
    return data.decode()


def _arrivals(lines: list[str]) -> list[int]:
    """How many legs came up in each 100 ms in which one did."""
    bins: Counter[int] = Counter()
    for line in lines:
        if match := _LEG_UP.match(line):
            seconds = datetime.fromisoformat(match[1]).timestamp()
            bins[int(seconds * 10) + int(match[2]) // 100] += 1
    return list(bins.values())


# The process of the clients.


def run_clients(url: str, secrets_file: str) -> None:
    import logging

    from client.agent import Agent
    from client.config import read_config

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.setswitchinterval(0.0005)
    agents = []
    for name, secret in json.loads(Path(secrets_file).read_text()).items():
        argv = ["--server_url", url, "--client-name", name]
        env = {**os.environ, "HTTP_NETWORK_RELAY_CLIENT_SECRET": secret}
        agents.append(Agent(read_config(argv, env)))
    sys.stdin.readline()
    for agent in agents:
        agent.start()
    print("started", flush=True)
    sys.stdin.readline()
    os._exit(0)


# The process of the users: one thread, so that it can fork.


class User:
    """One proxy command, forked; its standard input and output are one socket of ours."""

    def __init__(self, number: int, client: str, url: str, port: str) -> None:
        self.number = number
        self.got = b""
        self._sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(theirs.fileno(), 0)
                os.dup2(theirs.fileno(), 1)
                null = os.open(os.devnull, os.O_RDWR)
                # Inherited copies of the others' sockets would keep those connections open.
                os.closerange(3, null)
                os.closerange(null, 65536)
                import ssh_proxy_command

                argv = [client, "127.0.0.1", port, "tcp", "--server_url", url]
                os._exit(ssh_proxy_command.main(argv))
            except BaseException:
                traceback.print_exc()
            os._exit(98)
        theirs.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def say(self, text: bytes) -> None:
        self.got = b""
        self._sock.sendall(text)

    def hear(self) -> None:
        data = self._sock.recv(4096)
        if not data:
            raise SystemExit(f"proxy command {self.number} ended: {os.waitpid(self.pid, 0)[1]}")
        self.got += data

    def end(self) -> int:
        """EOF, and its exit status."""
        self._sock.shutdown(socket.SHUT_WR)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_users(url: str, port: str, clients: str, tunnels: str) -> None:
    import ssh_proxy_command

    sys.stderr.write(f"users of {ssh_proxy_command.__name__}\n")
    users = [
        User(number, f"device-{number % int(clients)}", url, port) for number in range(int(tunnels))
    ]
    try:
        for line in sys.stdin:
            word, _, number = line.strip().partition(" ")
            if word == "echo":
                first_s, last_s = echo(users, number)
                print(f"{first_s:.3f} {last_s:.3f}", flush=True)
            else:
                print(f"{sum(user.end() != 0 for user in users)} 0", flush=True)
                users = []
    finally:
        for user in users:
            os.kill(user.pid, signal.SIGKILL)


def echo(users: list[User], number: str) -> tuple[float, float]:
    """A message of its own through every tunnel, and back; when the first and last came."""
    begun = time.monotonic()
    want: dict[User, bytes] = {}
    poll, by_fd = select.poll(), {}
    for user in users:
        want[user] = f"{number} of {user.number}".ljust(MESSAGE_BYTES).encode()
        user.say(want[user])
        poll.register(user, select.POLLIN)
        by_fd[user.fileno()] = user
    first_s = last_s = 0.0
    while want:
        for fd, _ in poll.poll():
            user = by_fd[fd]
            user.hear()
            if user.got == want.get(user):
                last_s = time.monotonic() - begun
                first_s = first_s or last_s
                del want[user]
            elif not want.get(user, b"").startswith(user.got):
                raise SystemExit(f"proxy command {user.number} got {user.got!r}")
    return first_s, last_s


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {"clients": run_clients, "users": run_users}
    programs[sys.argv[1]](*sys.argv[2:])
