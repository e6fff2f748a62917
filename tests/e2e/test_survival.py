"""What a relay lives through: readers that stop, restarts, and company on the same client."""

import functools
import hashlib
import os
import re
import select
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.flows import AT_ONCE_S, becomes, lines_since, side_by_side
from tests.support.ports import free_port
from tests.support.processes import (
    Pipes,
    Relay,
    resident_bytes,
    running_relay,
    start_client,
    start_proxy,
    start_server,
    thread_count,
)
from tests.support.raw import RawUser
from tests.support.targets import (
    DuplexTarget,
    EchoTarget,
    RecordingTarget,
    SilentTarget,
    SourceTarget,
    Target,
    pseudo_random,
    pseudo_random_bytes,
    pseudo_random_sha256,
)
from tests.support.waiting import eventually

INTERVAL_S = 0.5
SILENT_INTERVALS = 5
GONE_S = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
KEYSTROKES = 300
SLOWEST_KEYSTROKE_S = 0.5


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """With short ping intervals everywhere, so that silence would soon be death."""
    folder = tmp_path_factory.mktemp("relay")
    client = {"ping_interval_s": INTERVAL_S}
    with running_relay(folder, ping_interval_s=INTERVAL_S, client=client) as running:
        yield running


@contextmanager
def in_thread(task: "functools.partial[object]") -> Iterator[threading.Event]:
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
            client.wait_for_line("registered", 2.0, after=mark)
        with EchoTarget() as target, start_proxy(server.url, port=target.port) as proxy:
            assert proxy.finish(b"as before").stdout == b"as before"


def check_server_stop(server: "Server", number: signal.Signals) -> None:
    with ExitStack() as stack:
        enter = stack.enter_context
        source, target, silent = enter(SourceTarget(1 << 40)), enter(FlowTarget()), SilentTarget()
        enter(silent)
        flowing = [enter(start_proxy(server.url, port=target.port)) for _ in range(2)]
        stuck = enter(start_proxy(server.url, port=source.port))
        # A raw peer whose target says nothing: it sees what the server says at the end.
        raw = enter(RawUser(server.url))
        raw.send_open(port=silent.port)
        raw.recv_control("opened")
        # And one that never reads: the server's writes to it are stuck.
        deaf = enter(RawUser(server.url))
        deaf.send_open(port=source.port, tunnel_id="2" * 32, limit=1 << 30)
        for proxy in flowing:
            enter(in_thread(functools.partial(pump, proxy)))
        for conversation in [target.conversation(0), target.conversation(1)]:
            conversation.wait_received(1_000_000)
        for conversation in [source.conversation(0), source.conversation(1)]:
            is_stuck(conversation)

        asked_at = time.monotonic()
        server.signal(number)
        assert raw.recv_control("going_away", GONE_S)["spread_ms"] > 0
        assert raw.recv_control("detached", GONE_S)["code"] == "server_restart"
        assert raw.recv_close(GONE_S)[0] == 1012
        assert server.wait(GONE_S) == 0
        took_s = time.monotonic() - asked_at
        print(f"{number.name}: gone after {took_s:.2f} s")
        assert took_s <= GONE_S
        for proxy in [*flowing, stuck]:
            assert proxy.wait(AT_ONCE_S) == 1
            assert len(proxy.lines) == 1
            assert "restarted" in proxy.lines[0]
        assert "ERROR" not in server.text
