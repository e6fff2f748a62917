"""While a tunnel's legs are lost, its ends keep their windows, however often that happens."""

import threading
from pathlib import Path

import pytest

from tests.support.link import Link
from tests.support.processes import (
    Pipes,
    resident_bytes,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.targets import EchoTarget
from tests.support.waiting import eventually

MIB = 2**20
WINDOW = 4 * MIB
# A way on which windows grow to their cap, both ways.
DELAY_MS = 25.0
CUTS = 3
BETWEEN_BYTES = 24 * MIB
CHUNK = bytes(256 * 1024)
# Each end keeps what it sent and what its consumer has not taken: a window and 1 MiB each way.
MOST_KEPT = 2 * (WINDOW + MIB)


pytestmark = pytest.mark.timeout(300)


class Flood:
    """Writes all that the proxy command takes, and reads all that comes back; two threads."""

    def __init__(self, proxy: Pipes) -> None:
        self._proxy = proxy
        self.echoed = 0
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"flood:{run.__name__}")
            for run in (self._write, self._read)
        ]

    def __enter__(self) -> "Flood":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._proxy.kill()
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        while not self._is_over.is_set():
            try:
                self._proxy.send(CHUNK, 60.0)
            except BrokenPipeError:
                return

    def _read(self) -> None:
        while data := self._proxy.receive(len(CHUNK), 60.0):
            self.echoed += len(data)


def test_ends_keep_no_more_than_their_windows_however_often_they_are_cut(tmp_path: Path) -> None:
    """Under a fast source on both sides: measured in the real processes."""
    with (
        start_server(tmp_path) as server,
        Link(server.port, delay_ms=DELAY_MS) as client_link,
        Link(server.port, delay_ms=DELAY_MS) as user_link,
        start_client(client_link.url) as client,
        EchoTarget() as target,
        start_proxy(user_link.url, port=target.port) as proxy,
    ):
        proxy.send(b"x")
        assert proxy.receive_exactly(1) == b"x"
        before = {each.pid: resident_bytes(each.pid) for each in (client, proxy)}
        grown: list[tuple[int, ...]] = []
        with Flood(proxy) as flood:
            for _ in range(CUTS):
                wanted = flood.echoed + BETWEEN_BYTES
                eventually(lambda wanted=wanted: flood.echoed >= wanted, 60.0)
                eventually(lambda: all(client_link.in_flight + user_link.in_flight))
                for link in (client_link, user_link):
                    link.cut(stay_down=True)
                grown.append(settled(before))
                for link in (client_link, user_link):
                    link.restore()
        print("kept by client and proxy command, MiB:", *(_mib(each) for each in grown))
        assert max(max(each) for each in grown) < MOST_KEPT


def settled(before: dict[int, int]) -> tuple[int, ...]:
    """How much more the processes hold, once that does not change any more."""
    looks: list[tuple[int, ...]] = []

    def is_settled() -> bool:
        looks.append(tuple(resident_bytes(pid) - bytes_ for pid, bytes_ in before.items()))
        return len(looks) > 20 and looks[-1] == looks[-20]

    eventually(is_settled, 20.0)
    return looks[-1]


def _mib(sizes: tuple[int, ...]) -> str:
    return "/".join(f"{size / MIB:.1f}" for size in sizes)
