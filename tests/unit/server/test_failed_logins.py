"""Failed logins: who is over the limit, and what that costs."""

import ipaddress
import threading
import time

import pytest

from server.config import Config
from server.limits.failed_logins import MAX_ENTRIES, FailedLogins
from server.limits.policy import Policy
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def failures(logins: FailedLogins, count: int, name: str = "gw", address: str = "a") -> list[bool]:
    return [logins.count("client", name, address) for _ in range(count)]


def test_failure_is_one_too_many_when_the_limit_is_reached(clock: Clock) -> None:
    """Ten are answered as such; the eleventh is not."""
    logins = FailedLogins(10, 0, clock=clock)
    assert failures(logins, 12) == [False] * 10 + [True] * 2


def test_count_falls_with_time(clock: Clock) -> None:
    """Ten a minute is one each six seconds, and those that were refused did not count."""
    logins = FailedLogins(10, 0, clock=clock)
    failures(logins, 100)
    clock.advance(5.9)
    assert failures(logins, 1) == [True]
    clock.advance(0.2)
    assert failures(logins, 2) == [False, True]
    clock.advance(3600)
    assert failures(logins, 11) == [False] * 10 + [True]


def test_name_has_its_own_count_at_each_address(clock: Clock) -> None:
    """A flood from one place refuses nobody's mistake elsewhere."""
    logins = FailedLogins(10, 0, clock=clock)
    assert failures(logins, 11)[-1]
    assert not logins.count("client", "gw", "b")
    assert not logins.count("client", "other", "a")
    assert not logins.count("user", "gw", "a")


def test_address_has_a_wider_count_over_all_names(clock: Clock) -> None:
    """Who tries names one after the other is stopped too."""
    logins = FailedLogins(10, 50, clock=clock)
    answers = [logins.count("client", f"name-{number}", "a") for number in range(60)]
    assert answers == [False] * 50 + [True] * 10
    assert not logins.count("client", "name-1", "b")


def test_ipv6_is_counted_by_its_64_bits(clock: Clock) -> None:
    """A new address of the same network is no new start."""
    logins = FailedLogins(10, 50, clock=clock)
    answers = [logins.count("user", "", f"2001:db8::{number:x}") for number in range(1, 13)]
    assert answers == [False] * 10 + [True] * 2


def test_zero_turns_a_limit_off(clock: Clock) -> None:
    """Either, or both."""
    assert not any(failures(FailedLogins(0, 0, clock=clock), 1000))
    assert failures(FailedLogins(0, 5, clock=clock), 6)[-1]


def test_table_stays_bounded_when_an_attacker_owns_a_32(clock: Clock) -> None:
    """More networks and names than entries: there are as many as stated, the newest."""
    logins = FailedLogins(10, 50, clock=clock)
    first = int(ipaddress.ip_address("2001:db8::"))
    for number in range(MAX_ENTRIES + 2000):
        address = ipaddress.ip_address(first + (number << 64))
        logins.count("client", f"n{number}", str(address))
    assert len(logins) == MAX_ENTRIES
    # Whoever fails all the time is not pushed out.
    for number in range(MAX_ENTRIES):
        if number % 100 == 0:
            over = logins.count("client", "victim", "203.0.113.7")
        logins.count("client", "x", f"10.{number >> 8}.{number & 255}.1")
    assert over


def test_one_address_cannot_fill_the_table_with_names(clock: Clock) -> None:
    """Over its own limit it makes no entries any more."""
    logins = FailedLogins(10, 50, clock=clock)
    for number in range(1000):
        logins.count("client", f"n{number}", "a")
    assert len(logins) == 51


def test_every_failure_counts_once_when_threads_race() -> None:
    """None is lost between two threads."""
    logins = FailedLogins(1000, 0, clock=Clock())
    answers: list[bool] = []

    def fail() -> None:
        answers.extend(logins.count("user", "", "a") for _ in range(200))

    threads = [threading.Thread(target=fail) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(False) == 1000


def test_no_thread_waits_for_a_failed_login() -> None:
    """A delay would be a way to hold all threads: a refusal takes as long as counting it."""
    policy = Policy(Config(failed_logins=1))
    begun = time.monotonic()
    codes = [policy.failed_login("client", "gw", "203.0.113.7", "no").code for _ in range(500)]
    assert codes == ["unauthorized", *["too_many"] * 499]
    # Far above what a busy machine needs, and far below 500 of any delay that would be felt.
    assert time.monotonic() - begun < 5
