"""A laptop that sleeps: its proxy command is stopped, and its connection is lost meanwhile."""

import time
from pathlib import Path

from tests.support.link import Link
from tests.support.processes import Finished, Pipes, running_relay, start_proxy
from tests.support.targets import EchoTarget, RecordingTarget
from tests.support.waiting import eventually

# The timer takes a gap from 5 s on for a sleep, and a wait of 2 s may just have begun.
SLEEP_S = 7.5
# Two until both clocks are looked at and three of waiting for a sign of life; the rest is for a
# busy machine. By silence alone it would take 50 s.
AWAKE_S = 5.0
BUSY_S = 5.0
SHORT_GRACE = {"HTTP_NETWORK_RELAY_RESUME_TIMEOUT": "2"}
SHORT_INTERVAL_S = 0.4


def sleep(proxy: Pipes, link: Link) -> float:
    """Sleep; nothing of the old connection ever comes again. Returns the time of the waking."""
    link.freeze(accept_new=True)
    proxy.stop()
    due_at = time.monotonic() + SLEEP_S
    eventually(lambda: time.monotonic() >= due_at, 2 * SLEEP_S)
    proxy.cont()
    return time.monotonic()


def test_tunnel_goes_on_soon_when_the_laptop_wakes(tmp_path: Path) -> None:
    """Long before the silence would count, with the default ping interval."""
    with (
        running_relay(tmp_path) as relay,
        EchoTarget() as target,
        Link(relay.server.port) as link,
        start_proxy(link.url, port=target.port) as proxy,
    ):
        proxy.send(b"x")
        assert proxy.receive_exactly(1) == b"x"
        woke_at = sleep(proxy, link)
        proxy.send(b"y")
        assert proxy.receive_exactly(1, AWAKE_S + BUSY_S) == b"y"
        print(f"went on {time.monotonic() - woke_at:.2f} s after waking")
        assert proxy.finish(b"z") == Finished(0, b"z", [])


def test_proxy_command_ends_with_its_line_when_the_laptop_slept_too_long(tmp_path: Path) -> None:
    """For longer than grace and silence: no hang, exit 1, and the target was reset meanwhile."""
    with (
        running_relay(tmp_path, ping_interval_s=SHORT_INTERVAL_S) as relay,
        RecordingTarget() as target,
        Link(relay.server.port) as link,
        start_proxy(
            link.url, port=target.port, ping_interval_s=SHORT_INTERVAL_S, env=SHORT_GRACE
        ) as proxy,
    ):
        proxy.send(b"x")
        target.conversation().wait_received(1)
        woke_at = sleep(proxy, link)
        assert target.conversation().ended == "reset"
        assert proxy.receive(timeout_s=AWAKE_S + BUSY_S) == b""
        assert proxy.wait(BUSY_S) == 1
        print(f"ended {time.monotonic() - woke_at:.2f} s after waking: {proxy.lines}")
        (line,) = proxy.lines
        assert "the client does not have this tunnel any more" in line
        assert "reason=user_lost" in relay.client.text
