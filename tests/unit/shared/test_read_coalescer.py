"""When bytes of a source are let come together."""

from __future__ import annotations

import pytest

from http_network_relay.end.read_coalescer import ReadCoalescer

WANTED = 61_440
FIRST_WAIT_S = 0.0025
LONGEST_WAIT_S = 0.005


def waits(pieces: list[tuple[int, float]], wanted: int = WANTED) -> list[float]:
    """The waits after reads of so many bytes, each so long after it could have come."""
    gather, now, told = ReadCoalescer(wanted), 100.0, []
    for size, after_s in pieces:
        now += after_s
        told.append(gather.wait_s(size, wanted, now))
        now += told[-1]
    return told


def test_small_pieces_in_quick_succession_are_gathered() -> None:
    """From the fifth on, and longer where what came is far from what a read takes."""
    told = waits([(16_384, 0.00065)] * 8)
    assert told == [0.0] * 4 + [FIRST_WAIT_S] + [LONGEST_WAIT_S] * 3


@pytest.mark.parametrize(
    ("size", "after_s"),
    [(4_095, 0.0001), (16_384, 0.0011), (WANTED, 0.0001)],
    ids=["keystrokes", "slow", "as fast as we are"],
)
def test_nothing_waits_otherwise(size: int, after_s: float) -> None:
    """Keystrokes and their echoes, pieces that come slowly, and a source that is never empty."""
    assert waits([(size, after_s)] * 20) == [0.0] * 20


def test_a_pause_or_a_keystroke_begins_anew() -> None:
    """What waits goes on for as long as it comes like that."""
    quick, pause, key = (16_384, 0.0005), (16_384, 0.01), (36, 0.0005)
    both = [FIRST_WAIT_S, LONGEST_WAIT_S]
    assert waits([quick] * 6 + [pause] + [quick] * 6)[4:-1] == both + [0.0] * 4 + both
    assert waits([quick] * 6 + [key] + [quick] * 4)[6:] == [0.0] * 4 + [FIRST_WAIT_S]


def test_a_sleep_that_took_too_long_ends_nothing() -> None:
    """On a busy machine half of the sleeps do."""
    quick, late = (16_384, 0.0005), (WANTED * 7 // 8, 0.0024)
    assert waits([quick] * 5 + [late] * 3)[4:] == [FIRST_WAIT_S] * 4


class Source:
    """Writes pieces of `piece` bytes at `rate` bytes a second into a buffer; read by a Gather."""

    def __init__(self, rate: float, piece: int, buffer: float, read_s: float = 0.0001) -> None:
        self.rate, self.piece, self.buffer, self.read_s = rate, piece, buffer, read_s
        self.gather, self.now = ReadCoalescer(WANTED), 100.0
        self.written = 0.0  # with the part of a piece that is not there yet
        self.taken = 0
        self.reads: list[int] = []

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.written = min(self.taken + self.buffer, self.written + self.rate * seconds)

    def waiting(self) -> int:
        # Of a piece that has no room, a part is there; else it comes whole.
        is_full = self.written >= self.taken + self.buffer
        whole = self.written if is_full else self.written // self.piece * self.piece
        return int(whole) - self.taken

    def run(self, seconds: float) -> float:
        """Read for so long; return the bytes a second."""
        until, before = self.now + seconds, self.taken
        while self.now < until:
            while (waiting := self.waiting()) <= 0:
                self.pass_time(0.00001)
            size = min(waiting, WANTED)
            self.taken += size
            self.reads.append(size)
            self.pass_time(self.read_s)
            self.pass_time(self.gather.wait_s(size, WANTED, self.now))
        return (self.taken - before) / seconds


def test_reads_are_nearly_whole_messages_at_200_mbit() -> None:
    """Not whole ones with a piece behind each: 16 KiB a read at the beginning, then over 48."""
    source = Source(25e6, 16_384, 1e9)
    source.run(0.1)
    source.reads.clear()
    assert source.run(2) == pytest.approx(25e6, rel=0.01)
    assert sum(source.reads) / len(source.reads) > 48 * 1024


@pytest.mark.parametrize("rate", [150e6, 300e6, 600e6])
@pytest.mark.parametrize("piece", [8_192, 32_768, 65_536])
def test_fast_source_is_not_held_up_by_a_pipe_that_fills(rate: float, piece: int) -> None:
    """A pipe holds 64 KiB: a writer into it stands still while we wait for more."""
    source = Source(rate, piece, 65_536)
    free = Source(rate, piece, 65_536)
    free.gather.wait_s = lambda *_: 0.0  # type: ignore[method-assign]
    assert source.run(3) > 0.9 * free.run(3)
