"""Readers that stop cost the server their windows once, and nothing as time goes on."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support.flows import Mark, transfer
from tests.support.processes import Relay, resident_bytes, running_relay
from tests.support.raw import RawUser
from tests.support.settings import LONG, setting
from tests.support.targets import (
    ENDLESS,
    DuplexTarget,
    SourceTarget,
    pseudo_random_sha256,
    wait_stuck,
)

READERS = setting("READERS", 40)
ROUNDS = setting("ROUNDS", 10)
BULK_BYTES = setting("MEMORY_MB", 64) * 1024 * 1024
# All windows of a client's leg in one direction. The allocator keeps up to as much again in
# pieces that it cannot give back; it stops growing after some ten rounds.
BUDGET = 64 * 1024 * 1024
SLACK = 24 * 1024 * 1024
pytestmark = LONG


def test_memory_stays_flat_when_readers_stop(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Rounds of stopped readers beside a bulk transfer: the same memory after each round."""
    begun = time.monotonic()
    with running_relay(tmp_path, threads=64) as relay:
        worker = relay.server.worker_pid
        base = resident_bytes(worker)
        stuck = [stop_readers(relay, number) for number in range(ROUNDS)]
        after = resident_bytes(worker)
    figure(
        f"{READERS} stopped readers, {ROUNDS} rounds, {time.monotonic() - begun:.0f} s: server"
        f" {base / 1e6:.0f} MB at first, with them {min(stuck) / 1e6:.0f} to"
        f" {max(stuck) / 1e6:.0f} MB, {after / 1e6:.0f} MB after"
    )
    assert max(stuck) - base < 2 * BUDGET
    # Warm after the first rounds; what comes later would be a leak.
    warm = max(stuck[: len(stuck) // 2])
    assert max(stuck[len(stuck) // 2 :]) - warm < SLACK


def stop_readers(relay: Relay, round_number: int) -> int:
    """Tunnels whose user reads nothing; the server's memory while they are stuck."""
    mark = Mark.now(relay)
    with ExitStack() as stack:
        source = stack.enter_context(SourceTarget(ENDLESS))
        for number in range(READERS):
            user = stack.enter_context(RawUser(relay.url))
            # As greedy as can be: the server grants what its budget allows.
            user.send_open(
                port=source.port, tunnel_id=f"{round_number:016x}{number:016x}", limit=1 << 40
            )
        for number in range(READERS):
            wait_stuck(source.conversation(number), 0.1)
        with DuplexTarget(BULK_BYTES, "down") as target, relay.proxy(target.port) as proxy:
            came = transfer(proxy, BULK_BYTES, "up")
            assert (came.status, came.lines) == (0, [])
            assert came.sha256 == pseudo_random_sha256(BULK_BYTES, "down")
        memory = resident_bytes(relay.server.worker_pid)
    mark.wait_all_closed(READERS + 1, 5.0)
    return memory
