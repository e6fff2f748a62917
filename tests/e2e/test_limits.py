"""Limits of the server as a proxy user meets them: one sentence, an exit code, or just slower."""

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.processes import running_relay, start_proxy
from tests.support.raw import RawUser
from tests.support.targets import EchoTarget, SourceTarget, pseudo_random_sha256

KIB = 1024


def test_paced_download_is_whole_and_takes_its_time(tmp_path: Path) -> None:
    """1.5 MiB at 512 KiB a second: a second's worth at once, then the rate."""
    size = 1536 * KIB
    env = {"HTTP_NETWORK_RELAY_BYTES_PER_SECOND": str(512 * KIB)}
    with (
        running_relay(tmp_path, env=env) as relay,
        SourceTarget(size) as target,
        start_proxy(relay.server.url, port=target.port) as proxy,
    ):
        begun = time.monotonic()
        received = proxy.receive_exactly(size, timeout_s=20)
        assert 1.8 < time.monotonic() - begun < 5
        assert hashlib.sha256(received).hexdigest() == pseudo_random_sha256(size)
        proxy.close_stdin()
        assert proxy.wait() == 0


def test_login_waits_its_turn_when_its_user_owes_too_much(tmp_path: Path) -> None:
    """The real ends begin with next to no credit, and go on when it comes; eofs and all."""
    env = {"HTTP_NETWORK_RELAY_BYTES_PER_SECOND": str(64 * KIB)}
    with (
        running_relay(tmp_path, env=env) as relay,
        EchoTarget() as target,
        ExitStack() as stack,
    ):
        for number in range(2):
            user = stack.enter_context(RawUser(relay.url))
            user.send_open(tunnel_id=f"{number:032x}", port=target.port)
            assert user.recv_control("opened")["limit"] > 0
        begun = time.monotonic()
        # More than can be paid off while the proxy command starts.
        said = b"x" * 48 * KIB
        finished = stack.enter_context(relay.proxy(target.port)).finish(said)
        assert (finished.status, finished.stdout, finished.lines) == (0, said, [])
        assert 0.5 < time.monotonic() - begun < 5
        relay.server.wait_for_line("tunnel slowed reason=bytes_per_second")


def test_user_reads_why_when_a_limit_is_reached(tmp_path: Path) -> None:
    """One line, and the exit code of docs/limits.md."""
    env = {"HTTP_NETWORK_RELAY_IDLE_TIMEOUT": "4", "HTTP_NETWORK_RELAY_TUNNELS_PER_USER": "1"}
    with (
        running_relay(tmp_path, env=env) as relay,
        EchoTarget() as target,
        start_proxy(relay.server.url, port=target.port) as idle,
    ):
        idle.send(b"hello")
        assert idle.receive_exactly(5) == b"hello"
        with start_proxy(relay.server.url, port=target.port) as second:
            assert second.wait() == 6
            assert "as many tunnels are open with this token as may be (1)" in second.text
        assert idle.wait() == 1
        assert "nothing went through the tunnel for 4 s" in idle.text
        relay.client.wait_for_line("tunnel closed .*reason=idle_timeout")
