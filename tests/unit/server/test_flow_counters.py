"""The server's counts of one direction, and the budget that tunnels share."""

from collections.abc import Callable

import pytest

from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from http_network_relay.wire.errors import TunnelError
from server.tunnels.flow_counters import FIRST_CREDIT_BYTES, FlowCounters, WindowBudget

KIB = 1024
MIB = 1024 * KIB
BUDGET = 64 * MIB
CAP = 4 * MIB


def direction(budget: WindowBudget | None = None, asked: int = 300 * KIB) -> FlowCounters:
    made = FlowCounters(budget or WindowBudget(BUDGET), CAP)
    made.raise_limit(asked)
    return made


def send(to: FlowCounters, size: int) -> None:
    """Count `size` bytes in messages as large as may be."""
    while size:
        to.on_data(min(size, 64 * KIB))
        size -= min(size, 64 * KIB)


Act = Callable[[FlowCounters], object]
# What a peer may not do, after 100 bytes were sent and 40 of them were acked.
WRONG: dict[str, Act] = {
    "overrun by one": lambda d: send(d, 300 * KIB - 99),
    "empty message": lambda d: d.on_data(0),
    "message too large": lambda d: d.on_data(64 * KIB + 1),
    "ack beyond sent": lambda d: d.on_ack(101, 300 * KIB, False),
    "ack that falls": lambda d: d.on_ack(39, 300 * KIB, False),
    "limit that falls": lambda d: d.on_ack(40, 300 * KIB - 1, False),
    "eof ack without eof": lambda d: d.on_ack(100, 300 * KIB, True),
    "eof count too small": lambda d: d.on_eof(99),
    "eof count too large": lambda d: d.on_eof(101),
    "data after eof": lambda d: (d.on_eof(100), d.on_data(1)),
    "second eof": lambda d: (d.on_eof(100), d.on_eof(100)),
    "eof ack before the bytes": lambda d: (d.on_eof(100), d.on_ack(99, 300 * KIB, True)),
}


@pytest.mark.parametrize("case", WRONG)
def test_direction_raises_when_a_peer_breaks_the_rules(case: str) -> None:
    """Each is an error of that tunnel (docs/protocol.md, "Channels and errors")."""
    sent = direction()
    send(sent, 100)
    sent.on_ack(40, 300 * KIB, False)

    with pytest.raises(TunnelError):
        WRONG[case](sent)


def test_direction_takes_all_of_its_window_and_ends() -> None:
    """Up to the very limit, then eof, then its ack: no error on the way."""
    sent = direction()
    send(sent, 300 * KIB)
    assert sent.forwarded == sent.limit == 300 * KIB
    sent.on_eof(300 * KIB)
    sent.on_ack(300 * KIB, 300 * KIB, False)
    assert not sent.eof_acked
    sent.on_ack(300 * KIB, 300 * KIB, True)
    assert sent.eof_acked
    sent.on_ack(300 * KIB, 300 * KIB, False)
    assert sent.eof_acked


@pytest.mark.parametrize(
    ("asked", "granted"),
    [(0, 0), (1000, 1000), (CAP, CAP), (CAP + 1, CAP), (2**53, CAP)],
)
def test_raised_limit_lowers_what_is_above_the_cap(asked: int, granted: int) -> None:
    """A limit is passed on as asked up to the cap, and lowered silently above it."""
    assert direction(asked=asked).limit == granted


def test_raised_limit_follows_delivered_and_never_falls() -> None:
    """The cap moves along with what was delivered."""
    sent = direction(asked=2**53)
    assert sent.limit == CAP
    send(sent, MIB)
    assert sent.on_ack(MIB, 2**53, False) == CAP + MIB
    assert sent.on_ack(MIB, 2**53, False) == CAP + MIB


def test_raised_limit_keeps_the_smallest_window_when_the_budget_is_used_up() -> None:
    """Large windows leave room for newcomers, and nobody falls below 256 KiB."""
    budget = WindowBudget(BUDGET)
    greedy = [direction(budget, asked=2**53) for _ in range(64)]

    assert greedy[0].limit == CAP
    assert greedy[-1].limit == MIN_WINDOW_BYTES
    assert budget.free >= 0
    assert sum(d.limit for d in greedy) <= BUDGET

    small = greedy[-1]
    send(small, 200 * KIB)
    assert small.on_ack(200 * KIB, 2**53, False) == 200 * KIB + MIN_WINDOW_BYTES


def test_budget_is_whole_again_when_all_have_released() -> None:
    """What windows took, grew by and shrank by comes back to the last byte."""
    budget = WindowBudget(BUDGET)
    directions = [direction(budget, asked=2**53) for _ in range(20)]
    for number, sent in enumerate(directions):
        send(sent, number * 10_000)
        sent.on_ack(number * 10_000, 2**53, False)
    for sent in directions:
        sent.release()
    assert budget.free == BUDGET


def test_window_given_back_serves_others() -> None:
    """A receiver that asks for less as it goes frees budget for its neighbours."""
    budget = WindowBudget(4 * MIB)
    large = direction(budget, asked=2**21)
    assert large.limit == 2 * MIB
    free = budget.free
    send(large, 2 * MIB)
    assert large.on_ack(2 * MIB, 2 * MIB + 256 * KIB, False) == 2 * MIB + 256 * KIB
    assert budget.free == free + 2 * MIB - 256 * KIB


def test_direction_counts_on_when_it_starts_where_an_end_stands() -> None:
    """After a resume: bytes from `received` on, acks from `delivered` on, the limit anew."""
    sent = FlowCounters(WindowBudget(BUDGET), CAP, 10 * MIB, 9 * MIB)
    assert sent.raise_limit(2**53) == 9 * MIB + CAP
    send(sent, 3 * MIB)
    with pytest.raises(TunnelError):
        sent.on_data(1)
    with pytest.raises(TunnelError):
        sent.on_ack(9 * MIB - 1, 2**53, False)
    assert sent.on_ack(13 * MIB, 2**53, False) == 13 * MIB + CAP
    sent.on_eof(13 * MIB)
    assert not sent.eof_acked
    sent.on_ack(13 * MIB, 2**53, True)
    assert sent.eof_acked


def test_limit_may_be_below_the_bytes_when_a_resume_finds_little_budget() -> None:
    """Then there is no credit until an ack; never less than the smallest window, though."""
    budget = WindowBudget(BUDGET)
    greedy = [direction(budget, asked=2**53) for _ in range(64)]
    assert greedy[-1].limit == MIN_WINDOW_BYTES
    sent = FlowCounters(budget, CAP, 4 * MIB, MIB)
    assert sent.raise_limit(2**53) == MIB + MIN_WINDOW_BYTES
    with pytest.raises(TunnelError):
        sent.on_data(1)
    assert sent.on_ack(4 * MIB, 2**53, False) == 4 * MIB + MIN_WINDOW_BYTES
    sent.on_data(1)


def test_direction_takes_nothing_when_it_would_start_at_what_cannot_be() -> None:
    """More handed on than taken in is an error of the tunnel, and costs no budget."""
    budget = WindowBudget(BUDGET)
    with pytest.raises(TunnelError):
        FlowCounters(budget, CAP, 9, 10)
    assert budget.free == BUDGET
    other = direction(budget)
    with pytest.raises(TunnelError):
        other.start_at(9, 10)
    assert (other.forwarded, other.delivered) == (0, 0)


# Paced: a limit that rises later.


def test_paced_limit_rises_only_when_it_is_raised() -> None:
    """The first is a message; an ack alone changes nothing, and the rest comes as tokens come."""
    budget = WindowBudget(BUDGET)
    sent = FlowCounters(budget, CAP, is_paced=True)
    assert sent.ask_first(MIB) == FIRST_CREDIT_BYTES
    assert sent.begin(FIRST_CREDIT_BYTES) == FIRST_CREDIT_BYTES
    sent.on_data(FIRST_CREDIT_BYTES)
    assert sent.on_ack(FIRST_CREDIT_BYTES, 2 * MIB, False) == FIRST_CREDIT_BYTES
    with pytest.raises(TunnelError, match="window overrun"):
        sent.on_data(1)
    assert sent.raise_by(1000) == 1000
    assert sent.limit == FIRST_CREDIT_BYTES + 1000
    assert sent.raise_by(64 * MIB) == 2 * MIB - FIRST_CREDIT_BYTES - 1000
    assert (sent.headroom, sent.raise_by(1)) == (0, 0)
    sent.release()
    assert budget.free == BUDGET


def test_paced_limit_never_passes_what_the_budget_gives() -> None:
    """Tokens are no window."""
    sent = FlowCounters(WindowBudget(BUDGET), CAP, is_paced=True)
    sent.begin(sent.ask_first(2**53))
    assert FIRST_CREDIT_BYTES + sent.raise_by(2**53) == CAP


def test_paced_direction_waits_when_it_begins_without_credit() -> None:
    """An ack gives none either; the window that is its own is kept for it."""
    budget = WindowBudget(BUDGET)
    sent = FlowCounters(budget, CAP, is_paced=True)
    sent.ask_first(MIB)
    assert sent.begin(0) == 0
    with pytest.raises(TunnelError, match="window overrun"):
        sent.on_data(1)
    assert sent.on_ack(0, MIB, False) == 0
    assert budget.free == BUDGET - MIN_WINDOW_BYTES
    assert sent.raise_by(5000) == 5000
    sent.on_data(5000)


@pytest.mark.parametrize(("asked", "wanted"), [(0, 0), (1000, 1000), (2**53, FIRST_CREDIT_BYTES)])
def test_paced_direction_wants_no_more_than_its_receiver_takes(asked: int, wanted: int) -> None:
    """Nobody is to owe what cannot be used."""
    sent = FlowCounters(WindowBudget(BUDGET), CAP, is_paced=True)
    assert sent.ask_first(asked) == wanted
    assert sent.begin(wanted) == wanted


def test_paced_limit_starts_where_the_receiver_stands_after_a_resume() -> None:
    """The bytes that are sent again need credit too."""
    sent = FlowCounters(WindowBudget(BUDGET), CAP, 10 * MIB, 9 * MIB, is_paced=True)
    assert sent.begin(sent.ask_first(10 * MIB + MIB)) == 10 * MIB + FIRST_CREDIT_BYTES
    assert sent.begun_at == 10 * MIB


def test_paced_limit_rises_no_more_after_the_eof() -> None:
    """Nobody would use it."""
    sent = FlowCounters(WindowBudget(BUDGET), CAP, is_paced=True)
    sent.begin(sent.ask_first(MIB))
    sent.on_eof(0)
    assert (sent.headroom, sent.raise_by(100)) == (0, 0)
