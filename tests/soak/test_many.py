"""Very many short tunnels and sessions: each succeeds, and none leaves anything behind."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import debian
from tests.support.certs import Certs
from tests.support.processes import running_relay
from tests.support.settings import LONG, setting
from tests.support.ssh import check_short_sessions
from tests.support.tls_relay import FRONTS, JITTER, check_short_tunnels, tls_relay

# Half of them through each front.
TUNNELS = setting("TUNNELS", 2000)
SESSIONS = setting("SESSIONS", 500)
pytestmark = LONG


@pytest.mark.debian("nginx", "openssl")
@pytest.mark.parametrize("front", FRONTS)
def test_short_tls_tunnels_succeed_when_there_are_thousands(
    tmp_path: Path, certs: Certs, front: str, figure: Callable[[str], None]
) -> None:
    """Through a jittering link, both ends writing in the instant after the handshake."""
    tunnels = TUNNELS // len(FRONTS)
    begun = time.monotonic()
    with tls_relay(tmp_path, certs, front) as relay:
        check_short_tunnels(relay, tunnels)
        seconds = time.monotonic() - begun
        figure(f"{tunnels} of {tunnels} succeeded in {seconds:.0f} s, jitter {JITTER}, seed 0")


@pytest.mark.debian("openssh-client", "openssh-server")
def test_no_tunnel_is_left_when_hundreds_of_sessions_ended(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """500 times `ssh host true`."""
    begun = time.monotonic()
    with (
        debian.run_sshd(tmp_path / "sshd", config="SetEnv SHLVL=1") as sshd,
        running_relay(tmp_path) as relay,
    ):
        check_short_sessions(relay, sshd, SESSIONS)
    figure(f"{SESSIONS} of {SESSIONS} left nothing, {time.monotonic() - begun:.0f} s")
