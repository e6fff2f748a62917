"""Sessions of real ssh through a relay, and a terminal for one."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time

from tests.support.debian import Sshd
from tests.support.flows import (
    AT_ONCE_S,
    Mark,
    becomes,
    connections_to,
    count,
    lines_since,
    relay_argv,
    run,
    side_by_side,
)
from tests.support.processes import (
    Relay,
    open_sockets,
    thread_count,
)

# A slow shell's time, as a person at a terminal sees it; not the relay's.
SHELL_S = 10.0


def ssh_argv(relay: Relay, sshd: Sshd, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    return sshd.ssh_argv(relay_argv(relay, sshd.port), *command, options=options)


class Terminal:
    """A program on a pseudo terminal of its own. A context manager."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self._ours, theirs = os.openpty()
        self.popen = subprocess.Popen(
            argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.screen = b""

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait_for(self, ending: bytes) -> None:
        """Wait until the screen ends with `ending`; raise AssertionError if it never does."""
        deadline = time.monotonic() + SHELL_S
        while not self.screen.endswith(ending):
            assert self.look(max(0.0, deadline - time.monotonic())), self.screen

    def look(self, timeout_s: float) -> bool:
        """Add the next output to the screen; return False if none comes in `timeout_s`."""
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
        self.screen += os.read(self._ours, 4096)
        return True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        os.close(self._ours)


def check_short_sessions(relay: Relay, sshd: Sshd, sessions: int) -> None:
    """Run `ssh host true` `sessions` times, 8 at once; the sessions must leave nothing behind."""
    no_states: list[str] = []
    becomes(lambda: connections_to(sshd.port), no_states, SHELL_S)
    worker = relay.server.worker_pid

    def held() -> tuple[int, int, int]:
        client = relay.client.pid
        return open_sockets(worker), open_sockets(client), thread_count(client)

    before = held()
    mark, sshd_mark = Mark.now(relay), sshd.process.line_count
    argv = ssh_argv(relay, sshd, "true")
    done = side_by_side([lambda: run(argv)] * sessions, 8)
    ended_at = time.monotonic()
    assert [(each.returncode, each.stderr) for each in done] == [(0, b"")] * sessions

    mark.wait_all_closed(sessions)
    becomes(lambda: connections_to(sshd.port), no_states)
    becomes(held, before)
    assert time.monotonic() - ended_at <= AT_ONCE_S
    for side in mark.reasons():
        assert set(side) <= {"user_gone", "eof"}, "an end that no user would cause"

    # Each session has ended with a disconnect, and none was cut off.
    def goodbyes() -> int:
        return count(lines_since(sshd.process, sshd_mark), "^Received disconnect from")

    becomes(goodbyes, sessions)
    bad = re.compile("Connection reset|Connection closed by|error|fatal", re.IGNORECASE)
    assert not [line for line in lines_since(sshd.process, sshd_mark) if bad.search(line)]
