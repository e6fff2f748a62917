"""How many tunnels a user may have, and may open a second."""

from dataclasses import dataclass

import pytest

from http_network_relay.wire.errors import Refused
from server.config import Config
from server.limits.quotas import Limits
from tests.support.clock import Clock


@dataclass(eq=False)
class FakeTunnel:
    """A tunnel as far as it is counted."""

    tunnel_id: str
    client: str = "gw"
    is_resume: bool = False
    is_over: bool = False

    @property
    def place(self) -> tuple[str, str]:
        return self.client, self.tunnel_id


def spend(limits: Limits, count: int, user: str = "u", kind: str = "open") -> int:
    """Try `count` times; how many were let through."""
    codes = []
    for _ in range(count):
        try:
            limits.count_open(user, kind)
        except Refused as exc:
            codes.append(exc.code)
    assert set(codes) <= {"too_many_opens"}
    return count - len(codes)


def test_opens_are_refused_when_the_bucket_is_empty() -> None:
    """Ten seconds' worth at once, then as many as the rate."""
    clock = Clock()
    limits = Limits(Config(opens_per_s=5), clock=clock)
    assert spend(limits, 100) == 50
    clock.advance(1)
    assert spend(limits, 100) == 5
    clock.advance(3600)
    assert spend(limits, 100) == 50


def test_resumes_are_not_starved_when_somebody_opens_without_end() -> None:
    """Tunnels that are alive come back from a bucket of their own, and users have their own."""
    limits = Limits(Config(opens_per_s=5), clock=Clock())
    spend(limits, 1000)
    assert spend(limits, 100, kind="resume") == 50
    assert spend(limits, 100, user="other") == 50


def test_all_tunnels_of_a_user_come_back_when_they_try_again() -> None:
    """64 resumes at one a second, each again after its 5 s at most: done within a minute."""
    clock = Clock()
    limits = Limits(Config(opens_per_s=1), clock=clock)
    left, seconds = 64, 0
    while left:
        left -= spend(limits, left, kind="resume")
        clock.advance(1)
        seconds += 1
    assert seconds <= 60


def test_slow_rate_lets_one_through() -> None:
    """Less than one a second still starts with one."""
    clock = Clock()
    limits = Limits(Config(opens_per_s=0.1), clock=clock)
    assert spend(limits, 5) == 1
    clock.advance(9)
    assert spend(limits, 5) == 0
    clock.advance(1.1)
    assert spend(limits, 5) == 1


def test_no_rate_refuses_nobody() -> None:
    """0 is off."""
    assert spend(Limits(Config(opens_per_s=0), clock=Clock()), 5000) == 5000


def test_buckets_that_are_full_again_are_forgotten() -> None:
    """Names that come and go leave nothing."""
    clock = Clock()
    limits = Limits(Config(opens_per_s=5), clock=clock)
    for number in range(5000):
        clock.advance(0.01)
        limits.count_open(f"user-{number}", "open")
    assert len(limits._opens) <= 1001


def test_user_is_refused_when_all_their_tunnels_are_open() -> None:
    """One that is over makes room in that moment, before anybody has said so."""
    limits = Limits(Config(tunnels_per_user=2))
    tunnels = [FakeTunnel("a"), FakeTunnel("b")]
    for tunnel in tunnels:
        limits.admit("u", tunnel)
    with pytest.raises(Refused, match=r"as may be .2.; end one") as caught:
        limits.admit("u", FakeTunnel("c"))
    assert caught.value.code == "user_full"
    limits.admit("other", FakeTunnel("c"))
    tunnels[0].is_over = True
    limits.admit("u", FakeTunnel("c"))


def test_resume_does_not_count_beside_its_own_tunnel() -> None:
    """The older leg may be dead and not known to be."""
    limits = Limits(Config(tunnels_per_user=2))
    for name in ("a", "b"):
        limits.admit("u", FakeTunnel(name))
    # Twice: neither is in the other's way.
    for name in ("a", "b", "a"):
        limits.admit("u", FakeTunnel(name, is_resume=True))
    for tunnel in (FakeTunnel("c"), FakeTunnel("c", is_resume=True)):
        with pytest.raises(Refused):
            limits.admit("u", tunnel)


@pytest.mark.parametrize(
    "more",
    [
        FakeTunnel("a"),
        FakeTunnel("a", client="other"),
        FakeTunnel("a", client="other", is_resume=True),
    ],
    ids=["an open of that id", "at another client", "a resume at another client"],
)
def test_equal_id_makes_no_room_when_it_is_another_tunnel(more: FakeTunnel) -> None:
    """The id is the user's choice: only the resume of that very tunnel is the same tunnel."""
    limits = Limits(Config(tunnels_per_user=1))
    limits.admit("u", FakeTunnel("a"))
    with pytest.raises(Refused):
        limits.admit("u", more)
    # Nor does a second one of that id count for nothing once there is room.
    limits = Limits(Config(tunnels_per_user=2))
    for tunnel in (FakeTunnel("a"), more):
        limits.admit("u", tunnel)
    with pytest.raises(Refused):
        limits.admit("u", FakeTunnel("c"))


def test_nothing_is_kept_of_tunnels_that_ended() -> None:
    """Neither of those that were refused elsewhere."""
    limits = Limits(Config(tunnels_per_user=2))
    for number in range(10):
        tunnel = FakeTunnel(str(number))
        limits.admit("u", tunnel)
        limits.forget("u", tunnel)
        limits.forget("u", tunnel)
    assert limits._tunnels == {}
