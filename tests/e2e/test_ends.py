"""The table of ends of docs/protocol.md, row by row, with real processes.

Each row acts on a live tunnel that has carried bytes both ways, and then looks at every
column: the consumer's bytes, how the target saw the end, the exit code and the line on
stderr, the reason in both logs, and within how long.
"""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from tests.support.flows import AT_ONCE_S, becomes, count, lines_since, reasons, side_by_side
from tests.support.link import Link
from tests.support.processes import (
    CLIENT_SECRET,
    ROOT,
    TOKEN,
    Pipes,
    Proc,
    Server,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import RawClient, RawUser
from tests.support.targets import Conversation, RecordingTarget, pseudo_random_bytes
from tests.support.waiting import eventually

INTERVAL_S = 0.8
# The shortest that the wire can tell.
GRACE_S = 1
KEPT = ("proxy command SIGKILLed", "client SIGKILLed", "server SIGKILLed")
# Added for the test: processes on a busy machine are late.
MARGIN_S = 0.5
SILENCE_S = 2.5 * INTERVAL_S + MARGIN_S

# All together less than the smallest window: a user who goes does not wait for credit.
UP, DOWN = pseudo_random_bytes(150_000, "up"), pseudo_random_bytes(150_000, "down")
# Written in the instant before the end.
LAST_UP, LAST_DOWN = pseudo_random_bytes(50_000, "last up"), pseudo_random_bytes(50_000, "last")

# The log of a program that plays a host which is gone: not looked at.
GONE = "(gone)"

NAMES = [f"device-{number}" for number in range(40)]
CREDENTIALS = {"clients": {name: CLIENT_SECRET + name for name in NAMES}, "proxy_users": [TOKEN]}
_names = iter(NAMES)


@dataclass
class World:
    """One live tunnel with all its processes and sockets."""

    server: Server
    client: Proc
    proxy: Pipes
    target: Conversation
    user_link: Link
    client_link: Link
    name: str

    def server_lines(self) -> list[str]:
        """Return the server's lines about this tunnel."""
        return [line for line in self.server.lines if f" client={self.name} " in line]


Act = Callable[[World], object]


@dataclass(frozen=True)
class Row:
    """One row of the table. None where the column has nothing to see yet."""

    act: Act
    # Bytes at the user's consumer and at the target, beyond what came before.
    more_down: bytes = b""
    more_up: bytes = b""
    # The consumer sees the end of its stream.
    stdout_ends: bool = True
    # How the target saw it.
    target_sees: Literal["eof", "reset"] | None = None
    status: int | None = None
    # On stderr: the one line, or none.
    line: str | None = None
    server_reason: str | None = None
    client_reason: str | None = None
    within_s: float = AT_ONCE_S
    # What the process that was stopped does when it goes on.
    afterwards: Callable[[World], object] | None = None
    # The target does not end when the user does; else it closes at once, as sshd does.
    target_stays: bool = False
    # The legs go through links, which can freeze.
    through_links: bool = False
    # The server itself is hurt, so it is not the shared one.
    hurts_server: bool = False


def user_ends(world: World) -> None:
    world.proxy.send(LAST_UP)
    world.proxy.close_stdin()


def target_ends(world: World) -> None:
    world.target.send(LAST_DOWN)
    world.target.shutdown_write()


def both_end(world: World) -> None:
    user_ends(world)
    target_ends(world)


def user_goes(world: World) -> None:
    world.proxy.send(LAST_UP)
    world.proxy.signal(signal.SIGHUP)


def stdout_closes(world: World) -> None:
    world.proxy.send(LAST_UP)
    world.proxy.close_stdout()


def client_is_told_to_stop(world: World) -> None:
    world.target.send(LAST_DOWN)
    assert world.proxy.receive_exactly(len(LAST_DOWN)) == LAST_DOWN
    world.client.terminate()


def proxy_goes_on(world: World) -> None:
    """Its leg was ended meanwhile, so it ends at once."""
    world.proxy.cont()
    assert world.proxy.wait(AT_ONCE_S) == 1
    assert len(world.proxy.lines) == 1


def client_goes_on(world: World) -> None:
    """It resets the target, and comes back."""
    mark = world.client.line_count
    world.client.cont()
    assert world.target.wait_ended(AT_ONCE_S) == "reset"
    world.client.wait_for_line("tunnel closed .*reason=leg_lost", AT_ONCE_S, after=mark)
    world.client.wait_for_line("registered", AT_ONCE_S, after=mark)


def server_goes_on(world: World) -> None:
    """It sees that both legs have gone; the client is back at once."""
    mark = world.client.line_count
    world.server.cont()
    world.server.wait_for_line("tunnel closed .*reason=(user|client)_(lost|replaced)", AT_ONCE_S)
    world.client.wait_for_line("registered", 2 * AT_ONCE_S, after=mark)


# The names are those of the table in docs/protocol.md.
ROWS = {
    "`eof` up: standard input ends": Row(
        user_ends, more_up=LAST_UP, stdout_ends=False, target_sees="eof", target_stays=True
    ),
    "`eof` down: the target sends FIN": Row(target_ends, more_down=LAST_DOWN),
    "both eofs": Row(
        both_end,
        more_up=LAST_UP,
        more_down=LAST_DOWN,
        target_stays=True,
        target_sees="eof",
        status=0,
        server_reason="eof",
        client_reason="eof",
    ),
    "reset: the client is stopped": Row(
        client_is_told_to_stop,
        more_down=LAST_DOWN,
        target_sees="reset",
        status=1,
        line="the client on the device was stopped",
        server_reason="client_stopped",
        client_reason="client_stopped",
    ),
    "reset: the user has gone (signal n)": Row(
        user_goes,
        more_up=LAST_UP,
        target_sees="eof",
        status=128 + signal.SIGHUP,
        server_reason="user_gone",
        client_reason="user_gone",
    ),
    "detached: the server is stopped": Row(
        lambda world: world.server.terminate(),
        target_sees="reset",
        status=1,
        line="being restarted",
        server_reason="server_restart",
        client_reason="leg_lost",
        hurts_server=True,
    ),
    "proxy command SIGKILLed": Row(
        lambda world: world.proxy.kill(),
        target_sees="reset",
        status=-signal.SIGKILL,
        server_reason="user_lost",
        client_reason="user_lost",
    ),
    "client SIGKILLed": Row(
        lambda world: world.client.kill(),
        target_sees="eof",  # by the kernel, which knows no better
        status=1,
        line="client's connection",
        server_reason="client_lost",
    ),
    "server SIGKILLed": Row(
        lambda world: world.server.kill(),
        target_sees="reset",
        status=1,
        line="the connection to the relay 127.0.0.1 was lost",
        client_reason="leg_lost",
        hurts_server=True,
    ),
    "proxy command SIGSTOPped": Row(
        lambda world: world.proxy.stop(),
        stdout_ends=False,
        target_sees="reset",
        server_reason="user_lost",
        client_reason="user_lost",
        within_s=SILENCE_S,
        afterwards=proxy_goes_on,
    ),
    "client SIGSTOPped": Row(
        lambda world: world.client.stop(),
        status=1,
        line="client's connection",
        server_reason="client_lost",
        within_s=SILENCE_S,
        afterwards=client_goes_on,
    ),
    "server SIGSTOPped": Row(
        lambda world: world.server.stop(),
        target_sees="reset",
        status=1,
        line="nothing was heard",
        client_reason="leg_lost",
        within_s=SILENCE_S,
        afterwards=server_goes_on,
        hurts_server=True,
    ),
    "proxy user's host gone without FIN": Row(
        lambda world: world.user_link.freeze(),
        target_sees="reset",
        # Its host only seems gone, so the proxy command can be looked at too.
        status=1,
        line="nothing was heard",
        server_reason="user_lost",
        client_reason="user_lost",
        within_s=SILENCE_S,
        through_links=True,
    ),
    "client's host gone without FIN": Row(
        lambda world: world.client_link.freeze(),
        target_sees="reset",
        status=1,
        line="client's connection",
        server_reason="client_lost",
        client_reason="leg_lost",
        within_s=SILENCE_S,
        through_links=True,
    ),
    "server's host gone without FIN": Row(
        lambda world: (world.user_link.freeze(), world.client_link.freeze()),
        target_sees="reset",
        status=1,
        line="nothing was heard",
        server_reason=GONE,
        client_reason="leg_lost",
        within_s=SILENCE_S,
        through_links=True,
    ),
    "consumer closed: EPIPE on standard output": Row(
        stdout_closes,
        more_up=LAST_UP,
        stdout_ends=False,
        target_sees="eof",
        status=128 + signal.SIGPIPE,
        server_reason="user_gone",
        client_reason="user_gone",
    ),
    "consumer closed: RST from the target": Row(
        lambda world: world.target.reset(),
        status=1,
        line="the target reset the connection",
        server_reason="target_reset",
        client_reason="target_reset",
    ),
}
# Rows of that table which are not tested here.
ELSEWHERE = {
    "reset: a tunnel error",  # our programs make none: see the test below
    "target's host gone without FIN",  # two minutes of the kernel's keepalive
}


def begin_server(folder: Path) -> Server:
    return start_server(folder, threads=16, credentials=CREDENTIALS, ping_interval_s=INTERVAL_S)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For the rows that do not hurt the server."""
    with begin_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def begin(row: Row, server: Server, stack: ExitStack, grace_s: int = 0) -> World:
    """A client and a tunnel that has carried UP and DOWN."""
    grace = ["--resume-timeout", str(grace_s)]
    user_link = stack.enter_context(Link(server.port))
    client_link = stack.enter_context(Link(server.port))
    name = next(_names)
    client = start_client(
        client_link.url if row.through_links else server.url,
        name=name,
        secret=CLIENT_SECRET + name,
        ping_interval_s=INTERVAL_S,
        args=grace,
    )
    stack.enter_context(client)
    target = stack.enter_context(RecordingTarget(close_on_eof=not row.target_stays))
    proxy = start_proxy(
        user_link.url if row.through_links else server.url,
        name=name,
        port=target.port,
        ping_interval_s=INTERVAL_S,
        args=grace,
    )
    stack.enter_context(proxy)
    conversation = target.conversation()
    conversation.send(DOWN)
    proxy.send(UP)
    assert proxy.receive_exactly(len(DOWN)) == DOWN
    conversation.wait_received(len(UP))
    return World(server, client, proxy, conversation, user_link, client_link, name)


SILENT = [name for name, row in ROWS.items() if row.within_s == SILENCE_S]


@pytest.fixture(scope="module")
def silent(
    shared_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AssertionError | None]:
    """The rows that mostly wait, done side by side: each one's failure, if any."""
    folders = {name: tmp_path_factory.mktemp("row") for name in SILENT}

    def one(name: str) -> AssertionError | None:
        try:
            check_row(ROWS[name], shared_server, folders[name])
        except AssertionError as exc:
            return exc
        return None

    return dict(zip(SILENT, side_by_side([partial(one, name) for name in SILENT]), strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_tunnel_ends_as_the_table_says(
    name: str,
    shared_server: Server,
    silent: dict[str, AssertionError | None],
    tmp_path: Path,
) -> None:
    """What each side sees of an end, and how soon."""
    if name not in SILENT:
        check_row(ROWS[name], shared_server, tmp_path)
    elif (failure := silent[name]) is not None:
        raise failure


def check_row(row: Row, server: Server, folder: Path) -> None:
    """Make a tunnel, end it, and look at all columns."""
    with ExitStack() as stack:
        if row.hurts_server:
            server = stack.enter_context(begin_server(folder))
        world = begin(row, server, stack)
        acted_at = time.monotonic()
        try:
            row.act(world)
            check_ends(row, world, acted_at + row.within_s)
            if row.afterwards is not None:
                row.afterwards(world)
            for process in (world.server, world.client):
                assert not re.search("ERROR|Traceback", process.text)
        except AssertionError as exc:
            after_s = time.monotonic() - acted_at
            logs = [
                f"{process!r}\n" + "\n".join(process.lines[-20:])
                for process in (world.server, world.client, world.proxy)
            ]
            raise AssertionError("\n\n".join([f"after {after_s:.2f} s: {exc}", *logs])) from exc


def check_ends(row: Row, world: World, deadline: float) -> None:
    """Every column, in the time that is left."""

    def left_s() -> float:
        return max(0.001, deadline - time.monotonic())

    proxy, target = world.proxy, world.target
    if row.target_sees is not None:
        assert target.wait_ended(left_s()) == row.target_sees
    target.wait_received(len(UP) + len(row.more_up), left_s())
    if row.status is not None:
        assert proxy.wait(left_s()) == row.status
    if row.stdout_ends:
        already = row.more_down if row.act is client_is_told_to_stop else b""
        assert already + proxy.receive_all(left_s()) == row.more_down
    closed = {
        "server": (world.server_lines, row.server_reason),
        "client": (lambda: world.client.lines, row.client_reason),
    }
    for who, (lines, reason) in closed.items():
        if reason == GONE:
            continue
        if reason is not None:
            eventually(lambda lines=lines: reasons(lines()), left_s(), message=f"{who}: no line")
        assert reasons(lines()) == ([reason] if reason is not None else []), who
    # What must not have happened, now that all the rest has.
    assert target.received == UP + row.more_up
    if row.server_reason == row.client_reason == "eof":
        counts = f"up={len(UP + LAST_UP)} down={len(DOWN + LAST_DOWN)} "
        for lines, _ in closed.values():
            assert count(lines(), f"tunnel closed .*{counts}") == 1
    if row.target_sees is None:
        assert target.ended is None
    if row.status is None:
        assert proxy.is_running
    if row.line is None:
        assert proxy.lines == []
    else:
        assert len(proxy.lines) == 1
        assert row.line in proxy.lines[0]
        assert "; " in proxy.lines[0], "it says what to try"


@pytest.mark.parametrize("name", KEPT)
def test_tunnel_is_kept_for_the_grace_when_a_leg_is_lost(name: str, tmp_path: Path) -> None:
    """The same end, so much later; the line says why nobody came back."""
    row = ROWS[name]
    with ExitStack() as stack:
        server = stack.enter_context(begin_server(tmp_path))
        world = begin(row, server, stack, grace_s=GRACE_S)
        acted_at = time.monotonic()
        row.act(world)
        proxy, target = world.proxy, world.target
        if row.status == 1:
            assert proxy.wait(GRACE_S + AT_ONCE_S) == row.status
            assert time.monotonic() - acted_at >= GRACE_S
            assert row.line is not None
            assert row.line in proxy.text
            assert f"not resumed within {GRACE_S} s" in proxy.text
            assert len(proxy.lines) == 1
        if row.target_sees == "reset":
            assert target.wait_ended(GRACE_S + AT_ONCE_S) == "reset"
            assert time.monotonic() - acted_at >= GRACE_S
        if row.client_reason is not None:
            world.client.wait_for_line(f"tunnel closed .*reason={row.client_reason}")
            assert count(world.client.lines, "tunnel detached") == 1


def table_of_ends() -> dict[str, list[str]]:
    """The table of docs/protocol.md: the end -> the other columns."""
    page = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    table = page.split("### The table of ends")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_rows_are_those_of_the_protocol_page() -> None:
    """Each row of the page is here, and what is here of codes and reasons is what it says."""
    table = table_of_ends()
    assert set(ROWS) | ELSEWHERE == set(table)
    for name, row in ROWS.items():
        _, _, exit_code, server_line, client_line, within = table[name]
        for reason, line in ((row.server_reason, server_line), (row.client_reason, client_line)):
            # A host that is gone shows nothing; the program that plays it does.
            assert reason is None or line == GONE or f"`reason={reason}`" in line, name
        assert within == ("1 s" if row.within_s == AT_ONCE_S else "*T*"), name
        by_name = {"128+n": 128 + signal.SIGHUP, "137, from its shell": -signal.SIGKILL}
        if exit_code.isdecimal() or exit_code in by_name:
            assert row.status == by_name.get(exit_code) or row.status == int(exit_code), name


def test_tunnel_ends_alone_when_a_peer_breaks_its_rules(shared_server: Server) -> None:
    """A tunnel error of a user, and one of a client: the row that our programs cannot make."""
    name, raw_name = next(_names), next(_names)
    with (
        start_client(shared_server.url, name=name, secret=CLIENT_SECRET + name) as client,
        RecordingTarget() as target,
        RawUser(shared_server.url) as user,
        RawClient(shared_server.url, raw_name, CLIENT_SECRET + raw_name) as raw_client,
        start_proxy(shared_server.url, name=raw_name, port=1) as proxy,
    ):
        mark = shared_server.line_count
        user.send_open(client=name, port=target.port)
        assert user.recv_control("opened")
        conversation = target.conversation()
        user.send_control({"type": "eof", "count": 1})  # of bytes that never came
        assert user.recv_control("reset")["code"] == "protocol_error"
        assert user.recv_close(AT_ONCE_S)[0] == 1000
        assert conversation.wait_ended(AT_ONCE_S) == "reset"
        client.wait_for_line("tunnel closed .*reason=protocol_error", AT_ONCE_S)

        channel = raw_client.recv_control("open")["channel"]
        raw_client.send_opened(channel)
        raw_client.send_on(channel, b"good")
        assert proxy.receive_exactly(4) == b"good"
        raw_client.send_control_on(channel, "eof", count=3)
        assert proxy.receive_all(AT_ONCE_S) == b""
        assert proxy.wait(AT_ONCE_S) == 1
        assert len(proxy.lines) == 1
        assert raw_client.recv_control("reset")["code"] == "protocol_error"
        becomes(
            lambda: reasons(lines_since(shared_server, mark)), ["protocol_error", "protocol_error"]
        )
        assert client.is_running
        # The client's leg goes on: a second tunnel, as if nothing had been.
        with start_proxy(shared_server.url, name=name, port=target.port) as good:
            assert good.finish(b"bytes").status == 0
