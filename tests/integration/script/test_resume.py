"""The proxy command, the real file in a process, against a relay played by hand: coming back."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ssh_proxy_command as script
from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from tests.support.client.by_hand import PlayedLeg, PlayedServer
from tests.support.controls import encode
from tests.support.processes import ROOT, child_environment
from tests.support.secrecy import check_no_secret, note_secrets, secret_of
from tests.support.targets import pseudo_random_bytes
from tests.support.waiting import eventually

KIB = 1024
WINDOW = MIN_WINDOW_BYTES
SECRET = secret_of("pu-command")
RESTART = ("503 No", "server_restart", {"Retry_After": "0"})


class Command:
    """The proxy command with pipes."""

    def __init__(self, port: int, *more: str, script: Path = ROOT / "ssh_proxy_command.py") -> None:
        argv = [sys.executable, str(script), "lab-1", "127.0.0.1", "22"]
        argv += ["tcp", "--server-url", f"ws://127.0.0.1:{port}", *more]
        env = {**child_environment(), "HTTP_NETWORK_RELAY_SECRET_KEY": SECRET}
        note_secrets(SECRET)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def read(self, size: int) -> bytes:
        """Exactly so many bytes of its stdout."""
        data = self.stdout.read(size)
        assert len(data) == size
        return data

    def wait(self, timeout_s: float = 10.0) -> tuple[int, str]:
        """Its exit code, and what it wrote to stderr."""
        self.process.wait(timeout_s)
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode()
        check_no_secret("the proxy command", said)
        return self.process.returncode, said

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@pytest.fixture
def server() -> Iterator[PlayedServer]:
    """A relay whose legs the test plays."""
    with PlayedServer() as played:
        yield played


@pytest.fixture
def run(server: PlayedServer) -> Iterator[Callable[..., Command]]:
    """Start a proxy command of that relay, with more arguments."""
    commands: list[Command] = []

    def start(*more: str, **options: Path) -> Command:
        commands.append(Command(server.port, *more, **options))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


def answer_open(leg: PlayedLeg, *, limit: int = WINDOW, grace_s: int = 120) -> dict[str, Any]:
    """Be the client that has reached the target; the `open` that came."""
    opening = leg.control("open")
    leg.say("opened", limit=limit, grace_s=grace_s)
    return opening


def answer_resume(
    leg: PlayedLeg, received: int = 0, delivered: int = 0, limit: int = WINDOW
) -> dict[str, Any]:
    """Be the client that still has it; the `resume` that came."""
    resume = leg.control("resume")
    leg.say("resumed", received=received, delivered=delivered, limit=limit)
    return resume


def finish(leg: PlayedLeg, command: Command, up: int, down: int) -> None:
    """End both directions cleanly: exit 0, not a word."""
    command.stdin.close()
    leg.say("eof", count=down)
    assert leg.control("eof")["count"] == up
    leg.say("ack", delivered=up, limit=2**40, eof=True)
    leg.until(lambda: any(c["type"] == "ack" and c["eof"] for c in leg.controls))
    assert leg.wait_close() == 1000
    leg.cut()
    assert command.wait() == (0, "")


def lose(leg: PlayedLeg, how: str) -> None:
    if how == "detached":
        leg.say("detached", code="client_lost")
    elif how == "restart":
        leg.close(1012)
    else:
        leg.cut(rst=how == "RST")


# Coming back.


@pytest.mark.parametrize("how", ["FIN", "RST", "restart", "detached"])
def test_lost_leg_is_resumed_with_the_tunnel_in_a_header_and_true_counts(
    server: PlayedServer, run: Callable[..., Command], how: str
) -> None:
    """All of the `open` again; the attempt grows; each position is what has come."""
    command = run()
    leg = server.leg()
    opening = answer_open(leg)
    with pytest.raises(KeyError):
        leg.visitor.header("HTTP-Network-Relay-Tunnel")
    command.write(b"typed")
    leg.wait_bytes(5)
    for attempt in (1, 2, 3):
        leg.send(b"answer")
        assert command.read(6) == b"answer"
        lose(leg, how)
        leg = server.leg()
        assert leg.visitor.header("HTTP-Network-Relay-Tunnel") == opening["tunnel_id"]
        assert leg.visitor.header("Authorization") == f"Bearer {SECRET}"
        resume = answer_resume(leg, 5, 5, 5 + WINDOW)
        came = 6 * attempt
        assert (resume["received"], resume["delivered"]) == (came, came)
        assert resume["limit"] == came + WINDOW
        same = ("client", "host", "port", "protocol", "tunnel_id", "resume_token", "grace_s")
        assert {name: resume[name] for name in same} == {name: opening[name] for name in same}
        assert resume["attempt"] == attempt
    assert opening["grace_s"] == 120
    finish(leg, command, 5, 18)


def test_transfer_both_ways_over_many_cuts_is_exact(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """Bytes are lost on the way in both directions, and none at the ends."""
    up, down = pseudo_random_bytes(600 * KIB, "up"), pseudo_random_bytes(600 * KIB, "down")
    command = run()
    leg = server.leg()
    answer_open(leg)
    typist = threading.Thread(target=lambda: (command.write(up), command.stdin.close()))
    got_down = bytearray()
    reader = threading.Thread(target=lambda: got_down.extend(command.stdout.read()))
    typist.start()
    reader.start()
    got_up = bytearray()
    sent, limit, cuts = 0, WINDOW, 0
    while len(got_up) < len(up):
        step = down[sent : min(limit, sent + 100 * KIB)]
        leg.send(step)
        sent += len(step)
        wanted = min(len(up) - len(got_up), 90 * KIB)
        got_up += leg.wait_bytes(wanted)
        assert up[: len(got_up)] == got_up
        if len(got_up) == len(up):
            break
        leg.cut(rst=bool(cuts % 2))
        cuts += 1
        leg = server.leg()
        resume = answer_resume(leg, len(got_up), len(got_up), len(got_up) + WINDOW)
        assert resume["attempt"] == cuts
        assert resume["delivered"] <= resume["received"] <= len(down)
        sent, limit = resume["received"], resume["limit"]
    while sent < len(down):
        step = down[sent:limit]
        leg.send(step)
        sent += len(step)
        if sent < len(down):
            at = limit
            leg.until(lambda at=at: max([0, *limits(leg)]) > at)
            limit = max(limits(leg))
    leg.say("eof", count=len(down))
    assert leg.control("eof")["count"] == len(up)
    leg.say("ack", delivered=len(up), limit=2**40, eof=True)
    assert leg.wait_close() == 1000
    leg.cut()
    typist.join()
    reader.join()
    assert command.wait() == (0, "")
    assert got_down == down
    assert got_up == up
    assert cuts >= 4


def limits(leg: PlayedLeg) -> list[int]:
    return [control["limit"] for control in leg.controls if control["type"] == "ack"]


def test_replay_follows_the_limit_of_the_new_channel(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """Lower than before: nothing beyond it goes out, and nothing new before what is old."""
    command = run()
    leg = server.leg()
    answer_open(leg, limit=1000)
    command.write(b"a" * 1000 + b"b" * 1000)
    leg.wait_bytes(1000)
    leg.cut()
    leg = server.leg()
    answer_resume(leg, 100, 100, 600)
    assert leg.wait_bytes(500) == b"a" * 500
    leg.say("ack", delivered=600, limit=1200, eof=False)
    assert leg.wait_bytes(1100) == b"a" * 900 + b"b" * 200


@pytest.mark.parametrize(
    "told",
    [("client_offline", "refused"), ("busy", "refused"), ("server_restart", "refused"),
     ("busy", "503"), ("server_restart", "503"), ("too_many", "429"), ("internal_error", "500")],
    ids=lambda told: "-".join(told),
)  # fmt: skip
def test_resume_that_is_refused_for_now_is_tried_again(
    server: PlayedServer, run: Callable[..., Command], told: tuple[str, str]
) -> None:
    """On a new leg, with a greater attempt where one was made."""
    code, by = told
    command = run()
    leg = server.leg()
    answer_open(leg)
    if by != "refused":
        server.refusals.extend([(f"{by} No", code, {"Retry_After": "0"})] * 2)
    leg.cut()
    if by == "refused":
        for attempt in (1, 2):
            leg = server.leg()
            assert leg.control("resume")["attempt"] == attempt
            leg.say("refused", code=code, message="for now")
    leg = server.leg()
    assert answer_resume(leg)["attempt"] == (3 if by == "refused" else 1)
    assert server.refused == ([] if by == "refused" else [code] * 2)
    finish(leg, command, 0, 0)


def test_retry_after_is_waited_for(server: PlayedServer, run: Callable[..., Command]) -> None:
    """However soon the backoff would come."""
    run()
    leg = server.leg()
    answer_open(leg)
    server.refusals.append(("503 No", "busy", {"Retry_After": "1"}))
    begun = time.monotonic()
    leg.cut()
    server.leg()
    assert server.refused == ["busy"]
    assert time.monotonic() - begun > 0.9


# What ends it.


@pytest.mark.parametrize("code", ["unknown_tunnel", "superseded", "client_unknown", "target_reset"])
def test_resume_that_is_refused_for_good_is_exit_1_with_its_sentence(
    server: PlayedServer, run: Callable[..., Command], code: str
) -> None:
    """One line; no more tries."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    leg.cut()
    leg = server.leg()
    leg.control("resume")
    leg.say("refused", code=code, message="the reason of the day")
    exit_code, line = command.wait()
    assert exit_code == 1
    assert line.count("\n") == 1
    assert line.count("the reason of the day") == 1
    assert "127.0.0.1:22 at lab-1" in line
    assert not server.has_leg()


@pytest.mark.parametrize(
    ("status", "code"),
    [("401 No", "unauthorized"), ("403 No", "forbidden"), ("426 No", "version_unsupported")],
)
def test_leg_that_is_refused_for_good_is_exit_1_with_its_sentence(
    server: PlayedServer, run: Callable[..., Command], status: str, code: str
) -> None:
    """A token that was withdrawn meanwhile; a tunnel that was open is a lost one."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    server.refusals.append((status, code, {}))
    leg.cut()
    exit_code, line = command.wait()
    assert exit_code == 1
    assert line.count("\n") == 1
    assert line.count("because") == 1
    assert SECRET not in line


@pytest.mark.parametrize("how", ["refused by HTTP", "refused", "no answer", "nobody there"])
def test_grace_that_is_over_is_exit_1_with_the_loss_and_the_last_failure(
    server: PlayedServer, run: Callable[..., Command], how: str
) -> None:
    """Within it and not much later, whatever the last try waits for."""
    command = run()
    leg = server.leg()
    answer_open(leg, grace_s=1)
    begun = time.monotonic()
    if how == "refused by HTTP":
        server.refusals.extend([RESTART] * 500)
    elif how == "nobody there":
        server.hand.stop_listening()
    leg.cut()
    if how == "refused":
        while command.process.poll() is None:
            with contextlib.suppress(queue.Empty, OSError):
                leg = server.leg(0.1)
                leg.control("resume")
                leg.say("refused", code="client_offline", message="the client is away")
    elif how == "no answer":
        server.leg().control("resume")
    exit_code, line = command.wait(5.0)
    assert 0.9 < time.monotonic() - begun < 3.0
    assert exit_code == 1
    assert line.count("\n") == 1
    assert "the connection to the relay 127.0.0.1 was lost" in line
    if how.startswith("refused"):
        assert "not resumed within 1 s" in line
        assert ("because" if how == "refused by HTTP" else "the client is away") in line


@pytest.mark.parametrize("whose", ["ours", "the client's"])
def test_lost_leg_is_exit_1_at_once_without_grace(
    server: PlayedServer, run: Callable[..., Command], whose: str
) -> None:
    """--resume-timeout 0, at either end: as if resume had never been."""
    command = run("--resume-timeout", "0") if whose == "ours" else run()
    leg = server.leg()
    opening = answer_open(leg, grace_s=120 if whose == "ours" else 0)
    assert opening["grace_s"] == (0 if whose == "ours" else 120)
    leg.send(b"before")
    leg.cut()
    begun = time.monotonic()
    assert command.read(6) == b"before"
    exit_code, line = command.wait()
    assert time.monotonic() - begun < 1.5
    assert exit_code == 1
    assert line.count("\n") == 1
    assert "the connection to the relay 127.0.0.1 was lost" in line
    assert not server.has_leg()


def test_impossible_answer_is_exit_1(server: PlayedServer, run: Callable[..., Command]) -> None:
    """More received than was ever sent."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    leg.cut()
    answer_resume(server.leg(), received=1)
    exit_code, line = command.wait()
    assert exit_code == 1
    assert line.count("\n") == 1
    assert "broke the protocol" in line


def test_reset_on_the_new_leg_ends_the_tunnel(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """With its sentence; what came before it is handed on."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    leg.cut()
    leg = server.leg()
    answer_resume(leg)
    leg.send(b"last")
    leg.say("reset", code="target_reset", message="the target reset the connection")
    assert command.read(4) == b"last"
    leg.close(1000)
    exit_code, line = command.wait()
    assert exit_code == 1
    assert "the target reset the connection" in line


# The user goes away while there is no leg.


def without_leg(server: PlayedServer, leg: PlayedLeg, state: str) -> PlayedLeg | None:
    """Bring it into one of the three waits of a resume; the leg by which it has asked."""
    if state == "waits to try":
        server.refusals.extend([("503 No", "busy", {"Retry_After": "60"})])
        leg.cut()
        eventually(lambda: server.refused)
    elif state == "dials":
        asked = threading.Event()
        server.hand._serve = lambda visitor: (visitor.read_head(), asked.set(), visitor.wait_gone())  # type: ignore[assignment]
        leg.cut()
        assert asked.wait(5.0)
    else:
        leg.cut()
        leg = server.leg()
        leg.control("resume")
        return leg
    return None


def ends(leg: PlayedLeg | None, command: Command, exit_code: int) -> None:
    """Within a second, and not a word. A relay answers the close of a leg."""
    begun = time.monotonic()
    if leg is not None:
        assert leg.wait_close() == 1000
        leg.cut()
    assert command.wait() == (exit_code, "")
    assert time.monotonic() - begun < 1.0


STATES = ["waits to try", "dials", "has asked"]


@pytest.mark.parametrize(
    ("state", "number"),
    [*((state, signal.SIGHUP) for state in STATES),
     (STATES[0], signal.SIGTERM), (STATES[0], signal.SIGINT)],
)  # fmt: skip
def test_signal_without_a_leg_ends_it_within_a_second(
    server: PlayedServer, run: Callable[..., Command], state: str, number: signal.Signals
) -> None:
    """128+n, and not a word: so every ssh session ends."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    asked = without_leg(server, leg, state)
    command.process.send_signal(number)
    ends(asked, command, 128 + number)


# The thread that ends the tunnel is held up until main has left the leg.
LATE = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {root!r})
import ssh_proxy_command as script

on_change, leave = script.Carrier._on_change, script.Carrier._leave
has_left = threading.Event()

def on_change_late(self):
    if self._end.is_over:
        Path({over!r}).touch()
        has_left.wait(10.0)
    on_change(self)

def leave_and_tell(self):
    is_over = self._end.is_over
    leave(self)
    if is_over:
        has_left.set()

script.Carrier._on_change, script.Carrier._leave = on_change_late, leave_and_tell
sys.exit(script.main(sys.argv[1:]))
"""


def test_user_who_goes_away_as_the_resume_is_answered_is_told_to_the_client(
    server: PlayedServer, run: Callable[..., Command], tmp_path: Path
) -> None:
    """Whoever sees it first: else the client would keep the target for the whole grace."""
    late, over = tmp_path / "late.py", tmp_path / "over"
    late.write_text(LATE.format(root=str(ROOT), over=str(over)))
    command = run(script=late)
    leg = server.leg()
    answer_open(leg)
    asked = without_leg(server, leg, "has asked")
    assert asked is not None
    command.process.send_signal(signal.SIGHUP)
    eventually(over.exists)
    asked.say("resumed", received=0, delivered=0, limit=WINDOW)
    assert asked.control("reset")["code"] == "user_gone"
    ends(asked, command, 128 + signal.SIGHUP)


@pytest.mark.parametrize("state", STATES)
def test_reader_of_stdout_that_goes_away_without_a_leg_ends_it(
    server: PlayedServer, run: Callable[..., Command], state: str
) -> None:
    """Noticed without a byte to write; it counts as SIGPIPE."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    asked = without_leg(server, leg, state)
    command.stdout.close()
    ends(asked, command, 141)


# Ends of the streams around a loss.


def test_end_of_stdin_without_a_leg_is_told_by_the_next(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """Behind what was written before it."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    server.refusals.append(("503 No", "busy", {"Retry_After": "1"}))
    leg.cut()
    eventually(lambda: server.refused)
    command.write(b"meanwhile")
    command.stdin.close()
    leg = server.leg()
    answer_resume(leg)
    assert leg.control("eof")["count"] == 9
    assert leg.data[0] == b"meanwhile"
    leg.say("eof", count=0)
    leg.say("ack", delivered=9, limit=WINDOW + 9, eof=True)
    assert leg.wait_close() == 1000
    leg.cut()
    assert command.wait() == (0, "")


def test_last_ack_that_was_lost_is_fetched_by_a_resume(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """Both eofs were said, its own is not known to have arrived: the user comes and asks."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    command.write(b"up")
    command.stdin.close()
    leg.control("eof")
    leg.say("eof", count=0)
    leg.until(lambda: any(c["type"] == "ack" and c["eof"] for c in leg.controls))
    assert command.stdout.read() == b""
    leg.cut()
    leg = server.leg()
    assert answer_resume(leg, 2, 2, 2 + WINDOW)["received"] == 0
    leg.say("eof", count=0)
    # Both are said again on this channel, and the ack comes only behind the eof.
    assert leg.control("eof")["count"] == 2
    leg.until(lambda: any(c["type"] == "ack" and c["eof"] for c in leg.controls))
    assert leg.data == {}
    leg.say("ack", delivered=2, limit=2 + WINDOW, eof=True)
    assert leg.wait_close() == 1000
    leg.cut()
    assert command.wait() == (0, "")


# A server that goes away.


def test_next_leg_comes_up_while_the_old_one_works_and_then_takes_over(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """`going_away`: nothing stops while the new one is dialled, also when that is refused first."""
    command = run()
    old = server.leg()
    opening = answer_open(old)
    server.refusals.extend([RESTART] * 100)
    old.say("going_away", spread_ms=100)
    eventually(lambda: server.refused)
    command.write(b"up")
    assert old.wait_bytes(2) == b"up"
    old.send(b"down")
    assert command.read(4) == b"down"
    server.refusals.clear()
    leg = server.leg()
    assert leg.visitor.header("HTTP-Network-Relay-Tunnel") == opening["tunnel_id"]
    assert set(server.refused) == {"server_restart"}
    resume = answer_resume(leg, 2, 2, WINDOW + 2)
    assert (resume["attempt"], resume["received"]) == (1, 4)
    # The old leg was left, without a word that could end the tunnel.
    with contextlib.suppress(OSError):
        while old.close_code is None:
            old.read()
    assert all(control["type"] != "reset" for control in old.controls)
    finish(leg, command, 2, 4)


def test_old_leg_that_is_lost_before_the_next_is_up_is_no_harm(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """The server was faster; the dial that is under way is used."""
    command = run()
    old = server.leg()
    answer_open(old)
    server.refusals.extend([RESTART] * 2)
    old.say("going_away", spread_ms=0)
    eventually(lambda: server.refused)
    old.say("detached", code="server_restart")
    old.close(1012)
    leg = server.leg()
    assert answer_resume(leg)["attempt"] == 1
    finish(leg, command, 0, 0)
    assert not server.has_leg()


def test_tunnel_that_ends_while_the_next_leg_is_dialled_ends_cleanly(
    server: PlayedServer, run: Callable[..., Command]
) -> None:
    """Nobody needs that leg; exit 0 does not wait for it."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    server.refusals.extend([RESTART] * 100)
    leg.say("going_away", spread_ms=0)
    eventually(lambda: server.refused)
    begun = time.monotonic()
    finish(leg, command, 0, 0)
    assert time.monotonic() - begun < 1.5


@pytest.mark.parametrize("moment", ["next leg is dialled", "next leg is up"])
def test_signal_while_the_server_goes_away_is_a_normal_end(
    server: PlayedServer, run: Callable[..., Command], moment: str
) -> None:
    """reset user_gone on the leg that works, if one does; 128+n within a second."""
    command = run()
    leg = server.leg()
    answer_open(leg)
    if moment == "next leg is dialled":
        server.refusals.extend([RESTART] * 100)
    leg.say("going_away", spread_ms=0)
    if moment == "next leg is dialled":
        eventually(lambda: server.refused)
    else:
        leg = server.leg()
        answer_resume(leg)
        command.write(b"x")
        leg.wait_bytes(1)
    command.process.send_signal(signal.SIGHUP)
    assert leg.control("reset")["code"] == "user_gone"
    ends(leg, command, 129)


# Moments that no relay can choose: the tunnel ends just before, and just behind, the resume.


class Answering:
    """What Carrier needs of a connection; calls `hook` and then answers `resumed`."""

    def __init__(self, hook: Callable[[], Any] | None) -> None:
        self.frame_sender = script.FrameSender()
        self.gave_up = None
        self.closes: list[int] = []
        self._hook = hook

    def start(self, name: str) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        self.closes.append(code)

    def receive(self, _on_pause: object = None) -> tuple[int, Any]:
        assert self._hook is not None, "waited for an answer that nobody needs"
        self._hook()
        text = encode("resumed", received=0, delivered=0, limit=WINDOW)
        return script.OP_TEXT, text


def detached_carrier(grace_s: float = 60.0) -> Any:
    argv = ["lab-1", "127.0.0.1", "22", "--secret-key", "x", "--server-url", "ws://127.0.0.1:1"]
    settings = script.read_settings(argv, {})
    first: Any = Answering(None)
    carrier: Any = script.Carrier(settings, first, script.Wakeup(), lambda: None)
    carrier._end.on_open(WINDOW, grace_s)
    carrier._end.detach(carrier.leg.channel, script.RelayError("leg_lost", "lost"))
    carrier._leave()
    return carrier


def close_pipe(carrier: Any) -> None:
    os.close(carrier._wakeup.reader)
    os.close(carrier._wakeup._writer)


GONE = script.RelayError("user_gone", "gone")


def test_tunnel_that_ended_before_the_new_leg_was_seen_waits_for_no_answer() -> None:
    """Who ended it saw no leg to close, and nothing else would."""
    carrier = detached_carrier()
    try:
        carrier._end.reset(GONE)
        with pytest.raises(script.RelayError):
            carrier._resume(Answering(None))
    finally:
        close_pipe(carrier)


@pytest.mark.parametrize("how", ["user_gone", "expired"])
def test_tunnel_that_ends_while_the_resume_is_answered_is_not_read_for_ever(how: str) -> None:
    """An expired tunnel closes no leg by itself."""
    carrier = detached_carrier()

    def end_it() -> None:
        if how == "user_gone":
            carrier._end.reset(GONE)
        else:
            carrier._end.grace_s = 0.0
            assert carrier._end.resume_left_s() == 0.0

    try:
        with pytest.raises(script.RelayError):
            carrier._resume(Answering(end_it))
        assert carrier._end.ended.code == ("user_gone" if how == "user_gone" else "leg_lost")
    finally:
        close_pipe(carrier)
