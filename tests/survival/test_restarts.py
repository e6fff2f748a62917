"""Restarts of the server, and cut links, under real ssh: the user sees a pause and nothing else."""

import hashlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import debian
from tests.support.debian import Sshd
from tests.support.fleet import FleetSize, Restart, check_fleet_returns
from tests.support.link import Link
from tests.support.ports import free_port
from tests.support.processes import (
    Proc,
    Server,
    proxy_argv,
    proxy_env,
    start_client,
    start_server,
)
from tests.support.ssh import Terminal
from tests.support.targets import pseudo_random
from tests.support.waiting import eventually

RESTARTS = 20
FILE_BYTES = 200_000_000
# The rate to which scp keeps itself, so that all restarts find it at work. Nothing flows while
# a server is away; during a SIGHUP the bytes go on, and that takes a second.
SCP_KBIT = {"kill": 100_000, "terminate": 100_000, "reload": 50_000}
COPY_S = 240.0
pytestmark = pytest.mark.timeout(2 * COPY_S)
LOOK_S = 0.01
# A worker that replaces another: the tunnels change over while both are up.
SIGHUP_STALL_S = 2.0
# One that was killed: the server's own start and the user's random waits are in it.
KILL_STALL_S = 12.0
# Keys follow each other faster than the legs' delay, so some are always in flight.
KEY_S = 0.005
KEY_DELAY_MS = 20.0
CUTS = 5
KEYS_BETWEEN = 50
KEYS_S = 90.0
# Bytes in flight count on these ways.
LEG = {"user": "user", "client": "client", "server": "user"}


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real sshd, whose shells are quick to start."""
    config = "SetEnv SHLVL=1"
    with debian.run_sshd(tmp_path_factory.mktemp("sshd"), config=config) as running:
        yield running


class Restarts:
    """A server on one port, whatever happens to its process, and a client."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.port = free_port()
        self.server: Server = self._start()
        self.url = self.server.url
        self.client = stack.enter_context(start_client(self.url))

    def _start(self) -> Server:
        return self._stack.enter_context(start_server(self._folder, port=self.port))

    def kill(self) -> None:
        """kill -9 to master and worker, and another server."""
        self.server.kill()
        self.server.wait()
        self.server = self._start()

    def terminate(self) -> None:
        """SIGTERM, its drain, and another server."""
        self.server.terminate()
        self.server.wait()
        self.server = self._start()

    def reload(self) -> None:
        """SIGHUP to the master: the worker is replaced, the listener stays."""
        before = self.server.worker_pid
        self.server.signal(signal.SIGHUP)
        eventually(lambda: self.server.worker_pid != before, 10.0, message="no new worker")


class Growth:
    """Watches the size of a file at 10 ms steps, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = 0
        self.grown_at: list[float] = []  # whenever it was larger than at the step before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="growth")

    def __enter__(self) -> "Growth":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def longest_pause_s(self, since: float, until: float) -> float:
        """The longest time without growth of those that ended in this span."""
        pairs = zip(self.grown_at, self.grown_at[1:], strict=False)
        return max((end - begin for begin, end in pairs if since < end <= until), default=0.0)

    def _run(self) -> None:
        while not self._done.wait(LOOK_S):
            size = self._path.stat().st_size if self._path.exists() else 0
            if size > self.size:
                self.size = size
                self.grown_at.append(time.monotonic())


def write_file(path: Path) -> str:
    """Write it; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in pseudo_random(FILE_BYTES, "scp"):
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def copy_through_restarts(
    folder: Path, sshd: Sshd, *, how: str, is_upload: bool
) -> tuple[list[float], list[float]]:
    """scp 200 MB while the server is restarted 20 times; the stalls and the outages, in s."""
    wanted = write_file(folder / "source")
    with ExitStack() as stack:
        relay = Restarts(folder, stack)
        restart: Callable[[], None] = getattr(relay, how)
        proxy = debian.proxy_command(proxy_argv(relay.url, port=sshd.port))
        scp = [debian.program("scp"), "-q", "-l", str(SCP_KBIT[how]), *sshd.options]
        scp += ["-o", f"ProxyCommand={proxy}"]
        far = f"{sshd.user}@device:{folder}"
        names = (
            [str(folder / "source"), f"{far}/copy"]
            if is_upload
            else [f"{far}/source", str(folder / "copy")]
        )
        growth = stack.enter_context(Growth(folder / "copy"))
        copy = stack.enter_context(Proc([*scp, *names], env=proxy_env()))
        begun_at: list[float] = []
        outages_s: list[float] = []
        for number in range(RESTARTS):
            due = (number + 1) * FILE_BYTES // (RESTARTS + 2)
            eventually(
                lambda due=due: growth.size >= due or not copy.is_running,
                COPY_S / RESTARTS * 2,
                message=f"{how} {number}: {growth.size} of {due} bytes came; {relay.client.text}",
            )
            assert copy.is_running, f"ended before {how} {number}: {copy.text}"
            begun_at.append(time.monotonic())
            restart()
            outages_s.append(time.monotonic() - begun_at[-1])
        assert growth.size < FILE_BYTES, "the last restart came too late"
        assert copy.wait(COPY_S) == 0, copy.text
        assert copy.lines == []
        ended_at = time.monotonic()
        assert "Traceback" not in relay.server.text + relay.client.text
    came = hashlib.sha256((folder / "copy").read_bytes()).hexdigest()
    assert came == wanted
    spans = zip(begun_at, [*begun_at[1:], ended_at], strict=True)
    stalls_s = [growth.longest_pause_s(since, until) for since, until in spans]
    print(f"{how}, stall by restart: {' '.join(f'{each:.2f}' for each in stalls_s)} s")
    print(f"{how}, until it was up again: {' '.join(f'{each:.2f}' for each in outages_s)} s")
    return stalls_s, outages_s


@pytest.mark.debian("openssh-client", "openssh-server")
@pytest.mark.parametrize(("how", "is_upload"), [("kill", True), ("terminate", False)])
def test_scp_copies_the_whole_file_when_the_server_is_restarted(
    tmp_path: Path, sshd: Sshd, how: str, is_upload: bool
) -> None:
    """200 MB, 20 times kill -9 or SIGTERM with a new start: equal, and exit 0."""
    stalls_s, _ = copy_through_restarts(tmp_path, sshd, how=how, is_upload=is_upload)
    assert max(stalls_s) < KILL_STALL_S


@pytest.mark.debian("openssh-client", "openssh-server")
def test_scp_hardly_pauses_when_the_master_gets_sighup(tmp_path: Path, sshd: Sshd) -> None:
    """200 MB, 20 times SIGHUP: equal, exit 0, and each pause under two seconds."""
    stalls_s, _ = copy_through_restarts(tmp_path, sshd, how="reload", is_upload=True)
    assert max(stalls_s) < SIGHUP_STALL_S


@pytest.mark.parametrize("how", ["kill", "reload"])
def test_all_tunnels_come_back_when_the_server_is_restarted(tmp_path: Path, how: Restart) -> None:
    """100 tunnels of 10 clients within 10 s, spread so that the server answers all the while."""
    check_fleet_returns(tmp_path, FleetSize(clients=10, tunnels=100), how)


@contextmanager
def terminal_through(
    folder: Path, sshd: Sshd
) -> Iterator[tuple[Terminal, Restarts, dict[str, Link]]]:
    """`ssh -tt` with a link on each leg, running cat: every key comes back once."""
    with ExitStack() as stack:
        relay = Restarts(folder, stack)
        links = {
            leg: stack.enter_context(Link(relay.port, delay_ms=KEY_DELAY_MS))
            for leg in ("user", "client")
        }
        relay.client.close()
        relay.client = stack.enter_context(start_client(links["client"].url))
        argv = sshd.ssh_argv(
            proxy_argv(links["user"].url, port=sshd.port),
            "stty raw -echo; echo go; exec cat",
            options=("-tt",),
        )
        terminal = stack.enter_context(Terminal(argv, proxy_env()))
        terminal.wait_for(b"go\n")
        yield terminal, relay, links


@pytest.mark.debian("openssh-client", "openssh-server")
@pytest.mark.parametrize("what", ["user", "client", "server"])
def test_each_key_shows_once_when_a_leg_is_cut_while_typing(
    tmp_path: Path, sshd: Sshd, what: str
) -> None:
    """A numbered text, typed through five cuts of a leg, or restarts of the server.

    Nothing is awaited before a cut: keys and what they show are on their way then.
    """
    with terminal_through(tmp_path, sshd) as (terminal, relay, links):
        terminal.screen = typed = b""
        cut_at = 0  # so much was typed at the last cut
        in_flight: list[tuple[int, int]] = []
        begun = time.monotonic()
        for number in itertools.count():
            for key in b"%d," % number:
                terminal.type(bytes([key]))
                typed += bytes([key])
                type_on(terminal)
            assert time.monotonic() - begun < KEYS_S, f"{in_flight}, {terminal.screen!r}"
            # The session works again when what was typed after the last cut shows.
            if len(terminal.screen) < cut_at + KEYS_BETWEEN or not all(links[LEG[what]].in_flight):
                continue
            if len(in_flight) == CUTS:
                break
            cut_at = len(typed)
            in_flight.append(cut(relay, links, what))
        while len(terminal.screen) < len(typed):
            assert time.monotonic() - begun < KEYS_S, f"{in_flight}, {terminal.screen!r}"
            type_on(terminal)
        assert terminal.screen == typed
        assert terminal.popen.poll() is None
    hits = sum(up > 0 and down > 0 for up, down in in_flight)
    print(
        f"{len(typed)} keys: cut {what} {len(in_flight)} times, {hits} with bytes both ways, which"
        f" are lost: {in_flight}"
    )
    assert hits > CUTS // 2


def cut(relay: Restarts, links: dict[str, Link], what: str) -> tuple[int, int]:
    """Cut a leg, or kill the server; the bytes that were in flight, up and down."""
    if what == "server":
        in_flight = links[LEG[what]].in_flight
        relay.kill()
        return in_flight
    was = links[what].cut()
    assert was.connections >= 1
    return was.up_bytes, was.down_bytes


def type_on(terminal: Terminal) -> None:
    """The time to the next key; what comes meanwhile shows."""
    until = time.monotonic() + KEY_S
    while (left_s := until - time.monotonic()) > 0:
        terminal.look(left_s)
