"""A relay behind TLS whose sockets are checked, and the loads that it carries."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import debian
from tests.support.certs import Certs
from tests.support.flows import count, side_by_side, transfer
from tests.support.link import Link
from tests.support.processes import (
    Pipes,
    Proc,
    Server,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.targets import (
    Conversation,
    DuplexTarget,
    Target,
    pseudo_random_sha256,
)

FRONTS = ("nginx", "gunicorn")
# A line on which TLS records come late and in pieces.
JITTER = {"delay_ms": 2.0, "jitter_ms": 15.0}


@dataclass
class TlsRelay:
    """A relay whose legs are all `wss` through one link, and the file of the TLS check."""

    server: Server
    client: Proc
    link: Link
    ca_file: Path
    check_file: Path

    @property
    def url(self) -> str:
        return f"wss://127.0.0.1:{self.link.port}"

    def proxy(self, port: int, *, args: tuple[str, ...] | None = None) -> Pipes:
        if args is None:
            args = ("--ca-file", str(self.ca_file))
        return start_proxy(self.url, port=port, args=args, checking_tls_file=self.check_file)

    @property
    def shared_tls(self) -> str:
        """Return the reports of the checking sockets: empty without a fault."""
        return self.check_file.read_text() if self.check_file.exists() else ""


@contextmanager
def tls_relay(folder: Path, certs: Certs, front: str, *, threads: int = 32) -> Iterator[TlsRelay]:
    """A server behind `front` and a client, all checked."""
    check_file = folder / "tls-shared"
    with ExitStack() as stack:
        enter = stack.enter_context
        server = enter(
            start_server(
                folder,
                threads=threads,
                tls=certs.pair if front == "gunicorn" else None,
                checking_tls_file=check_file,
            )
        )
        port = server.port
        if front == "nginx":
            port = enter(debian.run_nginx_tls(folder / "nginx", port, *certs.pair)).port
        link = enter(Link(port))
        client = enter(
            start_client(
                f"wss://127.0.0.1:{link.port}",
                args=["--ca-file", str(certs.ca)],
                checking_tls_file=check_file,
            )
        )
        yield TlsRelay(server, client, link, certs.ca, check_file)


def check_bulk(relay: TlsRelay, size: int) -> float:
    """Send `size` bytes each way at once through one tunnel; return MB/s, both ways together."""
    with DuplexTarget(size, "down") as target, relay.proxy(target.port) as proxy:
        came = transfer(proxy, size, "up", timeout_s=60 + size / 1e6)
        assert (came.status, came.lines, came.size) == (0, [], size)
        assert came.sha256 == pseudo_random_sha256(size, "down")
        conversation = target.conversation()
        # The target may not have read all bytes that its kernel has received.
        assert conversation.wait_ended() == "eof"
        assert conversation.received_bytes == size
        assert conversation.received_sha256 == pseudo_random_sha256(size, "up")
    assert relay.shared_tls == ""
    return 2 * size / came.seconds / 1e6


class GreetingTarget(Target):
    """Sends at once when a connection comes, then echoes."""

    GREETING = b"hello from the target\n" * 50

    def serve(self, conversation: Conversation) -> None:
        conversation.send(self.GREETING)
        while data := conversation.recv():
            conversation.send(data)


def check_short_tunnels(relay: TlsRelay, tunnels: int, at_once: int = 8) -> None:
    """Run so many proxy commands through the jittering link; all must succeed."""
    relay.link.delay_ms, relay.link.jitter_ms = JITTER["delay_ms"], JITTER["jitter_ms"]
    before = relay.link.connections_accepted
    try:
        with GreetingTarget() as target:

            def one(number: int) -> None:
                said = f"tunnel {number}\n".encode() * 100
                with relay.proxy(target.port) as proxy:
                    done = proxy.finish(said, timeout_s=30)
                assert (done.status, done.lines) == (0, []), f"tunnel {number}"
                assert done.stdout == target.GREETING + said

            side_by_side([functools.partial(one, number) for number in range(tunnels)], at_once)
    finally:
        relay.link.delay_ms = relay.link.jitter_ms = 0.0
    assert relay.shared_tls == ""
    assert relay.client.is_running
    # Every tunnel went through the link, and the client's leg was never lost.
    assert relay.link.connections_accepted - before == tunnels
    assert count(relay.client.lines, "registered") == 1
