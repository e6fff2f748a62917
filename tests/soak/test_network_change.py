"""A laptop that changes its network, with real routes: a network namespace with two ways out.

Here and not among the tests of every change: it needs root, and `ip netns`.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Pipes, proxy_argv, proxy_env, start_client, start_server
from tests.support.settings import LONG
from tests.support.targets import EchoTarget

NAMESPACE = "relay-laptop"
SERVER_ADDRESS = "10.200.9.1"
# The way to the server is looked at every 2 s, and a link that may be dead has 3 s.
BACK_S = 7.0
pytestmark = LONG


def ip(*args: str) -> None:
    """Run one `ip` command."""
    subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def laptop() -> Iterator[str]:
    """A namespace that reaches SERVER_ADDRESS by va, and by vb when va is down."""
    ip("netns", "add", NAMESPACE)
    try:
        ip("address", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
        for number, name in enumerate(("va", "vb"), 1):
            net = f"10.200.{number}"
            ip("link", "add", f"{name}-host", "type", "veth", "peer", name, "netns", NAMESPACE)
            ip("address", "add", f"{net}.1/24", "dev", f"{name}-host")
            ip("link", "set", f"{name}-host", "up")
            ip("-n", NAMESPACE, "address", "add", f"{net}.2/24", "dev", name)
            ip("-n", NAMESPACE, "link", "set", name, "up")
            way = ("default", "via", f"{net}.1", "metric", str(number))
            ip("-n", NAMESPACE, "route", "add", *way)
        yield NAMESPACE
    finally:
        ip("netns", "delete", NAMESPACE)  # And with it the veth pairs.
        ip("address", "delete", f"{SERVER_ADDRESS}/32", "dev", "lo")


def test_session_goes_on_when_the_laptop_changes_its_network(laptop: str, tmp_path: Path) -> None:
    """The old connection is dead and nobody says so; the default ping interval is 20 s."""
    with (
        start_server(tmp_path, args=["--bind", f"{SERVER_ADDRESS}:8765"]) as server,
        start_client(server.url),
        EchoTarget() as target,
    ):
        url = f"ws://{SERVER_ADDRESS}:8765"
        argv = ["ip", "netns", "exec", laptop, *proxy_argv(url, port=target.port)]
        with Pipes(argv, env=proxy_env()) as proxy:
            proxy.send(b"before")
            assert proxy.receive_exactly(6) == b"before"
            begun = time.monotonic()
            ip("-n", laptop, "link", "set", "va", "down")
            proxy.send(b"after")
            assert proxy.receive_exactly(5, BACK_S) == b"after"
            print(f"\nback after {time.monotonic() - begun:.1f} s")
            proxy.close_stdin()
            assert proxy.receive_all() == b""
            assert proxy.wait() == 0
