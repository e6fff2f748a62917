"""Three hundred broken connections, seeded: no byte is lost, no tunnel hangs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certs import Certs
from tests.support.oracle import Oracle, Stream, check_every_kind_struck

# By hand: RELAY_ORACLE_HITS=1000 RELAY_ORACLE_SEED=7 make survival ARGS='-k plain -s'
HITS = int(os.environ.get("RELAY_ORACLE_HITS", "300"))
TLS_HITS = max(1, HITS // 5)
SEED = int(os.environ.get("RELAY_ORACLE_SEED", "1"))
SLOTS = int(os.environ.get("RELAY_ORACLE_TUNNELS", "6"))
# A hit takes a third of a second at most on a slow machine.
pytestmark = pytest.mark.timeout(120 + HITS)


def test_no_byte_is_lost_when_both_legs_break_all_the_time_plain(tmp_path: Path) -> None:
    """ws://, both ways at once, to the end of every tunnel."""
    result = Oracle(tmp_path, hits=HITS, seed=SEED, slots=SLOTS).run()
    print(result)
    check_every_kind_struck(result, HITS)


@pytest.mark.debian("openssl")
def test_no_byte_is_lost_when_both_legs_break_all_the_time_tls(
    tmp_path: Path, certs: Certs
) -> None:
    """wss:// of gunicorn: an end without close_notify, and handshakes cut inside TLS."""
    result = Oracle(tmp_path, hits=TLS_HITS, seed=SEED, slots=SLOTS, certs=certs).run()
    print(result)
    assert result.tally.hits >= TLS_HITS


def test_the_oracle_fails_when_nothing_resumes(tmp_path: Path) -> None:
    """The proof that it can: with --resume-timeout 0 the first broken leg is found."""
    oracle = Oracle(tmp_path, hits=HITS, seed=SEED, slots=2, resumes=False)
    with pytest.raises(AssertionError, match="seed"):
        oracle.run()
    assert oracle.tally.hits < HITS


def test_the_oracle_fails_when_a_byte_is_doubled_lost_or_changed() -> None:
    """Each is found at the byte itself, whatever the sum of them is."""
    changes: tuple[Callable[[bytes], bytes], ...] = (
        lambda data: data[:500] + data[400:],
        lambda data: data[:400] + data[500:],
        lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:],
        lambda data: data[65536:] + data[:65536],
    )
    for change in changes:
        stream = Stream("seed")
        data = b""
        for _ in range(3):
            piece = stream.next_piece()
            stream.note_sent(piece)
            data += piece
        with pytest.raises(AssertionError, match="other bytes at offset"):
            stream.check(change(data))
