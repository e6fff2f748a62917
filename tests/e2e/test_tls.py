"""wss:// by nginx in front, and by gunicorn with a certificate of its own.

In all three programs the checking TLS socket is installed: two threads inside one TLS
object end the process, and the test with it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certs import Certs
from tests.support.flows import becomes, count
from tests.support.processes import (
    start_client,
    start_proxy,
    start_server,
)
from tests.support.targets import (
    EchoTarget,
)
from tests.support.tls_relay import FRONTS, TlsRelay, check_bulk, check_short_tunnels, tls_relay

pytestmark = pytest.mark.debian("nginx", "openssl")

BULK_BYTES = 64 * 1024 * 1024
SHORT_TUNNELS = 30  # for each front


@pytest.fixture(scope="module", params=FRONTS)
def relay(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certs: Certs
) -> Iterator[TlsRelay]:
    """One relay for each front."""
    with tls_relay(tmp_path_factory.mktemp(request.param), certs, request.param) as running:
        yield running
        # Also when it was the shutdown that two threads met in.
        assert running.shared_tls == ""


@pytest.mark.timeout(180)
def test_bytes_are_equal_when_much_goes_both_ways_at_once(relay: TlsRelay) -> None:
    """64 MB each way through one tunnel, equal SHA-256."""
    check_bulk(relay, BULK_BYTES)


def test_short_tunnels_succeed_when_the_line_jitters(relay: TlsRelay) -> None:
    """Both ends write in the instant after the handshake; each tunnel carries all."""
    check_short_tunnels(relay, SHORT_TUNNELS)


def test_certificate_is_refused_when_its_authority_is_unknown(relay: TlsRelay) -> None:
    """Without --ca-file: exit 6 and one line that says what to do."""
    with EchoTarget() as target, relay.proxy(target.port, args=()) as proxy:
        done = proxy.finish(b"not for strangers")
        assert (done.status, done.stdout, len(done.lines)) == (6, b"", 1)
        assert "certificate of 127.0.0.1 is not trusted" in done.lines[0]
        assert "--ca-file" in done.lines[0]
        assert target.conversations == []


def test_certificate_is_refused_when_it_is_for_another_name(tmp_path: Path, certs: Certs) -> None:
    """By the proxy command with exit 6, and by the client, who says so and goes on trying."""
    pair = (certs.wrong_host_cert, certs.wrong_host_key)
    args = ["--ca-file", str(certs.ca)]
    with (
        start_server(tmp_path, tls=pair) as server,
        start_client(server.url, args=args, wait=False) as client,
        start_proxy(server.url, port=1, args=args) as proxy,
    ):
        done = proxy.finish()
        assert (done.status, done.stdout, len(done.lines)) == (6, b"", 1)
        assert "certificate of 127.0.0.1 is not trusted" in done.lines[0]
        client.wait_for_line("certificate of 127.0.0.1 is not trusted")
        becomes(lambda: count(client.lines, "registered"), 0)
        assert client.is_running
