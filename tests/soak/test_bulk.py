"""A gigabyte each way at once through one tunnel, byte-exact: plain, nginx, gunicorn's TLS."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certs import Certs
from tests.support.flows import transfer
from tests.support.processes import Relay, resident_bytes, running_relay
from tests.support.settings import LONG, setting
from tests.support.targets import DuplexTarget, pseudo_random_sha256
from tests.support.tls_relay import FRONTS, check_bulk, tls_relay

SIZE = setting("BULK_MB", 1024) * 1024 * 1024
pytestmark = LONG
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def test_bytes_are_equal_when_a_gigabyte_goes_both_ways(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Over ws://; prints the rate and the server's CPU time per GB."""
    with running_relay(tmp_path) as relay:
        worker = relay.server.worker_pid
        before_s = cpu_s(worker)
        rate = check_plain(relay)
        cpu = (cpu_s(worker) - before_s) / (2 * SIZE / 1e9)
        memory = resident_bytes(worker) / 1e6
        figure(
            f"{SIZE >> 20} MiB each way, {rate:.0f} MB/s both ways together,"
            f" server {cpu:.2f} s CPU per GB, {memory:.0f} MB resident"
        )


def check_plain(relay: Relay) -> float:
    """One tunnel, both ways at once; MB/s both ways together."""
    with DuplexTarget(SIZE, "down") as target, relay.proxy(target.port) as proxy:
        came = transfer(proxy, SIZE, "up", timeout_s=60 + SIZE / 1e6)
        assert (came.status, came.lines, came.size) == (0, [], SIZE)
        assert came.sha256 == pseudo_random_sha256(SIZE, "down")
        assert target.conversation().wait_ended() == "eof"
        assert target.conversation().received_sha256 == pseudo_random_sha256(SIZE, "up")
        return 2 * SIZE / came.seconds / 1e6


@pytest.mark.debian("nginx", "openssl")
@pytest.mark.parametrize("front", FRONTS)
def test_bytes_are_equal_when_a_gigabyte_goes_both_ways_over_tls(
    tmp_path: Path, certs: Certs, front: str, figure: Callable[[str], None]
) -> None:
    """Over wss://, with the check for shared TLS objects in all three programs."""
    with tls_relay(tmp_path, certs, front) as relay:
        figure(f"{SIZE >> 20} MiB each way, {check_bulk(relay, SIZE):.0f} MB/s both ways together")
