"""What a relay lives through: readers that stop, restarts, and company on the same client."""

import functools
import hashlib
import os
import re
import select
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.flows import AT_ONCE_S, becomes, relay_argv
from tests.support.ports import free_port
from tests.support.processes import (
    NO_RESUME,
    Finished,
    Pipes,
    Proc,
    Relay,
    Server,
    proxy_env,
    running_relay,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import RawUser
from tests.support.targets import (
    ENDLESS,
    DuplexTarget,
    EchoTarget,
    SilentTarget,
    SourceTarget,
    black_hole_port,
    pseudo_random_bytes,
    pseudo_random_sha256,
    wait_stuck,
)
from tests.support.waiting import eventually

INTERVAL_S = 0.5
SILENT_INTERVALS = 5
GONE_S = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
KEYSTROKES = 300
SLOWEST_KEYSTROKE_S = 0.5
# So much went through: bytes flow.
FLOWING_BYTES = 2_000_000


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """With short ping intervals everywhere, so that silence would soon be death."""
    folder = tmp_path_factory.mktemp("relay")
    client = {"ping_interval_s": INTERVAL_S}
    with running_relay(folder, ping_interval_s=INTERVAL_S, client=client) as running:
        yield running


@contextmanager
def beside(task: Callable[[threading.Event], object]) -> Iterator[threading.Event]:
    """Run `task(stop)` beside the test until the block ends, or it does by itself."""
    stop = threading.Event()
    thread = threading.Thread(target=task, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()


def test_nothing_dies_when_stdout_stays_unread(relay: Relay) -> None:
    """Five ping intervals without a read of stdout while the upload goes on; then all comes."""
    size = 8 * 1024 * 1024  # Far more than every window and pipe on the way.
    rounds = 10
    with (
        DuplexTarget(size, "down") as target,
        relay.proxy(target.port, ping_interval_s=INTERVAL_S) as proxy,
    ):
        conversation = target.conversation()
        piece = pseudo_random_bytes(100_000, "up")
        begun = time.monotonic()
        stuck_at = -1
        for number in range(1, rounds + 1):
            proxy.send(piece)
            conversation.wait_received(number * len(piece), AT_ONCE_S)
            # The next piece comes in its part of the five intervals.
            due_at = begun + number * SILENT_INTERVALS * INTERVAL_S / rounds
            eventually(lambda due_at=due_at: time.monotonic() >= due_at)
            if number == rounds // 2:
                stuck_at = conversation.sent_bytes
        assert conversation.sent_bytes == stuck_at < size, "the download was never stuck"
        assert proxy.is_running
        proxy.close_stdin()
        digest, received = hashlib.sha256(), 0
        while data := proxy.receive(1 << 20):
            digest.update(data)
            received += len(data)
        assert (received, digest.hexdigest()) == (size, pseudo_random_sha256(size, "down"))
        assert proxy.wait(AT_ONCE_S) == 0
        assert proxy.lines == []
        assert conversation.received_bytes == rounds * len(piece)


def pump(proxy: Pipes, stop: threading.Event) -> None:
    """Both ways at full speed until it ends or the test says stop."""
    chunk = pseudo_random_bytes(65536, "pump")
    poll = select.poll()
    poll.register(proxy.stdin.fileno(), select.POLLOUT)
    poll.register(proxy.stdout.fileno(), select.POLLIN)
    while not stop.is_set():
        for fd, event in poll.poll(50):
            try:
                if event & select.POLLOUT:
                    os.write(fd, chunk)
                elif not os.read(fd, 1 << 20):
                    return
            except BlockingIOError:
                pass
            except OSError:
                return


def test_all_is_closed_and_comes_back_when_the_server_is_stopped(tmp_path: Path) -> None:
    """SIGTERM, SIGINT, SIGQUIT in full flow, with a stuck reader: gone in 2 s with 1012."""
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, port=port))
        client = stack.enter_context(start_client(server.url))
        for number in STOP_SIGNALS:
            check_server_stop(server, number)
            mark = client.line_count
            server = stack.enter_context(start_server(tmp_path, port=port))
            # By itself, as soon as the server is back.
            client.wait_for_line("registered", 2.0, after=mark)
        with EchoTarget() as target, start_proxy(server.url, port=target.port) as proxy:
            assert proxy.finish(b"as before") == Finished(0, b"as before", [])


def check_server_stop(server: Server, number: signal.Signals) -> None:
    """Stop it while bytes flow both ways, one reader is stuck and one peer reads nothing."""
    with ExitStack() as stack:
        enter = stack.enter_context
        flow = enter(DuplexTarget(ENDLESS))
        source = enter(SourceTarget(ENDLESS))
        silent = enter(SilentTarget())
        flowing = [enter(start_proxy(server.url, port=flow.port, env=NO_RESUME)) for _ in range(2)]
        stuck = enter(start_proxy(server.url, port=source.port, env=NO_RESUME))
        wait_stuck(source.conversation(0))
        # A peer that never reads, so that the server's writes to it are stuck.
        unread = enter(RawUser(server.url))
        unread.send_open(port=source.port, tunnel_id="2" * 32, limit=1 << 30)
        wait_stuck(source.conversation(1))
        # A peer by hand that sees what the server says at the end.
        watcher = enter(RawUser(server.url))
        watcher.send_open(port=silent.port)
        watcher.recv_control("opened")
        for proxy in flowing:
            enter(beside(functools.partial(pump, proxy)))
        for index in range(len(flowing)):
            flow.conversation(index).wait_received(FLOWING_BYTES)

        asked_at = time.monotonic()
        server.signal(number)
        assert watcher.recv_control("going_away", GONE_S)["spread_ms"] > 0
        assert watcher.recv_control("detached", GONE_S)["code"] == "server_restart"
        assert watcher.recv_close(GONE_S)[0] == 1012
        assert server.wait(GONE_S) == 0
        took_s = time.monotonic() - asked_at
        print(f"{number.name}: gone after {took_s:.2f} s")
        assert took_s <= GONE_S
        for proxy in [*flowing, stuck]:
            # A second for what came before, which the stuck one does not take.
            assert proxy.wait(2 * AT_ONCE_S) == 1
            assert len(proxy.lines) == 1
            assert "restarted" in proxy.lines[0]
        assert not re.search("ERROR|Traceback", server.text)


def test_all_tunnels_work_when_the_master_gets_sighup(tmp_path: Path) -> None:
    """The rolling path: another worker, the same master; old tunnels change over, new ones open."""
    with running_relay(tmp_path) as relay, EchoTarget() as target:
        first_worker = relay.server.worker_pid
        with relay.proxy(target.port) as old:
            old.send(b"x")
            assert old.receive_exactly(1) == b"x"
            relay.server.signal(signal.SIGHUP)
            for number in range(3):
                with relay.proxy(target.port) as proxy:
                    data = b"tunnel %d" % number
                    assert proxy.finish(data) == Finished(0, data, [])
            becomes(lambda: relay.server.worker_pid != first_worker, True, GONE_S)
            assert old.finish(b"y") == Finished(0, b"y", [])
        assert relay.server.is_running


def test_users_are_told_when_the_client_is_stopped(tmp_path: Path) -> None:
    """SIGTERM to the client in flow, with a stuck reader and a dial: exit 0 in 2 s."""
    with ExitStack() as stack:
        enter = stack.enter_context
        relay = enter(running_relay(tmp_path))
        flow, source = enter(DuplexTarget(ENDLESS)), enter(SourceTarget(ENDLESS))
        silent = enter(SilentTarget(receive_buffer_bytes=65536))
        dialling = enter(relay.proxy(enter(black_hole_port())))
        flowing, stuck = enter(relay.proxy(flow.port)), enter(relay.proxy(source.port))
        flooding = enter(relay.proxy(silent.port))
        enter(beside(functools.partial(pump, flowing)))
        flow.conversation().wait_received(FLOWING_BYTES)
        wait_stuck(source.conversation())
        assert flooding.send_some(bytes(64 << 20)) < 64 << 20

        asked_at = time.monotonic()
        relay.client.terminate()
        assert relay.client.wait(GONE_S) == 0
        took_s = time.monotonic() - asked_at
        print(f"client gone after {took_s:.2f} s")
        assert took_s <= GONE_S
        for proxy in (flowing, stuck, flooding, dialling):
            assert proxy.wait(2 * AT_ONCE_S) == 1
            assert len(proxy.lines) == 1
            assert "the client on the device was stopped" in proxy.lines[0]
        assert not re.search("ERROR|Traceback", relay.client.text)


def test_keystrokes_pass_when_the_same_client_is_busy(relay: Relay) -> None:
    """Beside a bulk download, a stopped reader and a target that reads nothing."""
    with ExitStack() as stack:
        enter = stack.enter_context
        source, silent = enter(SourceTarget(ENDLESS)), enter(SilentTarget())
        echo = enter(EchoTarget())
        enter(relay.proxy(source.port, ping_interval_s=INTERVAL_S))  # whose stdout is not read
        flooding = enter(relay.proxy(silent.port, ping_interval_s=INTERVAL_S))
        size = 64 << 20
        assert flooding.send_some(bytes(size)) < size
        wait_stuck(source.conversation(0))
        # By a shell, so that this process does not read the bulk itself.
        line = f"exec {shlex.join(relay_argv(relay, source.port))} </dev/null >/dev/null"
        enter(Proc(["sh", "-c", line], env=proxy_env(ping_interval_s=INTERVAL_S)))
        bulk = source.conversation(1)
        bulk.wait(lambda me: me.sent_bytes > FLOWING_BYTES)
        keys = enter(relay.proxy(echo.port, ping_interval_s=INTERVAL_S))
        keys.send(b"k")
        assert keys.receive_exactly(1) == b"k"

        begun, bulk_before = time.monotonic(), bulk.sent_bytes
        took_s = []
        for _ in range(KEYSTROKES):
            pressed_at = time.monotonic()
            keys.send(b"k")
            assert keys.receive_exactly(1) == b"k"
            took_s.append(time.monotonic() - pressed_at)
        seconds = time.monotonic() - begun
        rate = (bulk.sent_bytes - bulk_before) / seconds / 1e6
        p50, p99 = percentile(took_s, 50), percentile(took_s, 99)
        print(f"keystroke p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms beside {rate:.0f} MB/s")
        assert p99 < SLOWEST_KEYSTROKE_S
        assert rate > 1, "the download was stuck too"


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
