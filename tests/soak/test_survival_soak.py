"""Twenty thousand broken connections, and 500 tunnels that come back after one restart."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certs import Certs
from tests.support.fleet import FleetSize, Restart, check_fleet_returns
from tests.support.oracle import Oracle, check_every_kind_struck
from tests.support.settings import LONG, setting

HITS = setting("ORACLE_HITS", 20_000)
TLS_HITS = setting("ORACLE_TLS_HITS", 2_000)
SEED = setting("ORACLE_SEED", 1)
SLOTS = 8
pytestmark = LONG


def test_no_byte_is_lost_when_connections_break_by_the_thousand(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """The oracle of `make survival`, for half an hour."""
    result = Oracle(tmp_path, hits=HITS, seed=SEED, slots=SLOTS).run()
    figure(str(result))
    check_every_kind_struck(result, HITS)


@pytest.mark.debian("openssl")
def test_no_byte_is_lost_when_tls_connections_break_by_the_thousand(
    tmp_path: Path, certs: Certs, figure: Callable[[str], None]
) -> None:
    """The same over wss://."""
    result = Oracle(tmp_path, hits=TLS_HITS, seed=SEED, slots=SLOTS, certs=certs).run()
    figure(str(result))
    check_every_kind_struck(result, TLS_HITS)


@pytest.mark.parametrize("how", ["kill", "terminate", "reload"])
def test_all_tunnels_come_back_when_the_server_of_fifty_clients_is_restarted(
    tmp_path: Path, how: Restart, figure: Callable[[str], None]
) -> None:
    """500 tunnels of 50 clients within 10 s, and /healthz answers all the while."""
    figure(check_fleet_returns(tmp_path, FleetSize(clients=50, tunnels=500), how))
