"""A user's bytes paced by credit, and tunnels that are idle or too old.

The server's Tunnel stands between two real ends (http_network_relay/end/stream.py),
which check every ack. The pacer's thread does not run: a test looks for it, with its own clock.
"""

import json
import threading
from typing import Any

import pytest

from http_network_relay.end.stream import Ack, Stream
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.wire.constants import MIN_WINDOW_BYTES
from server.config import Config
from server.limits.pacer import Pacer
from server.limits.policy import Policy, PolicyObserver
from server.tunnels.flow_counters import FIRST_CREDIT_BYTES
from server.tunnels.tunnel import Tunnel
from tests.support.clock import Clock
from tests.support.controls import from_dict
from tests.support.server.fake_legs import (
    CAP,
    OPEN,
    RESUME,
    RESUMED,
    FakeClientLeg,
    FakeUserLeg,
    taken,
)
from tests.support.waiting import eventually

KIB = 1024
MIB = 1024 * KIB
RATE = 100 * KIB
ENDLESS = b"x" * 64 * KIB


class Ends:
    """A tunnel through the server, with both of its ends: `user` and `client`."""

    def __init__(self, bench: "Bench", user: str, number: int) -> None:
        self.bench = bench
        self.client_leg, self.user_leg = bench.client_leg, FakeUserLeg()
        self.user, self.client = Stream(CAP), Stream(CAP)
        control = {**OPEN, "tunnel_id": f"{number:032x}", "limit": MIN_WINDOW_BYTES}
        record = PolicyObserver(bench.policy, from_dict(control), user, "addr")
        self.tunnel = Tunnel(
            self.client_leg, self.user_leg, from_dict(control), user, "*", observer=record
        )
        with self.client_leg.channels.lock:
            frame = self.tunnel.assign_locked(CAP)
        self.client.out.limit = json.loads(frame.payload)["limit"]
        self.tunnel.on_client_control(
            from_dict({"type": "opened", "limit": MIN_WINDOW_BYTES, "grace_s": 0})
        )
        self.arrived = {"up": 0, "down": 0}
        self.ended: list[dict[str, Any]] = []

    def say(self, way: str, data: bytes) -> None:
        """The source has these bytes."""
        (self.user if way == "up" else self.client).out.take(data)

    def pass_on(self) -> None:
        """Let everything reach the other side that may; the consumers take all at once."""
        for way, sender, receiver in (
            ("up", self.user, self.client),
            ("down", self.client, self.user),
        ):
            while (piece := sender.out.next_piece()) is not None:
                if way == "up":
                    self.tunnel.on_user_data(bytes(piece))
                else:
                    self.tunnel.on_client_data(memoryview(bytes(piece)))
                receiver.into.on_data(len(piece), self.bench.clock.now)
                self.arrived[way] += len(piece)
                ack = receiver.into.on_delivered(len(piece), self.bench.clock.now, drained=True)
                if ack is not None:
                    self._ack(way, ack)
            if (count := sender.out.next_eof()) is not None:
                control = {"type": "eof", "count": count}
                if way == "up":
                    self.tunnel.on_user_control(from_dict(control))
                else:
                    self.tunnel.on_client_control(from_dict(control))
                receiver.into.on_eof(count)
                ack = receiver.into.on_eof_delivered(self.bench.clock.now)
                assert ack is not None
                self._ack(way, ack)

    def _ack(self, way: str, ack: Ack) -> None:
        control = {
            "type": "ack",
            "delivered": ack.delivered,
            "limit": ack.limit,
            "eof": ack.eof,
        }
        if way == "up":
            self.tunnel.on_client_control(from_dict(control))
        else:
            self.tunnel.on_user_control(from_dict(control))
        self.read()

    def read(self) -> None:
        """The ends take in what the server has for them; a limit that fell would raise."""
        for frame_sender, end in (
            (self.user_leg.frame_sender, self.user),
            (self.client_leg.frame_sender, self.client),
        ):
            for frame in taken(frame_sender):
                if not isinstance(frame, dict) or frame.get("channel", self.tunnel.channel) != (
                    self.tunnel.channel
                ):
                    continue
                if frame["type"] == "opened":
                    end.out.limit = frame["limit"]
                elif frame["type"] == "ack":
                    end.out.on_ack(Ack(frame["delivered"], frame["limit"], frame["eof"]))
                elif frame["type"] in ("reset", "refused"):
                    self.ended.append(frame)


class Bench:
    """A policy whose pacer is looked at by hand."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        config = Config(**settings)
        self.policy = Policy(config)
        self.policy.pacer = Pacer(config, clock=self.clock)
        self.client_leg = FakeClientLeg()
        self.tunnels: list[Ends] = []

    def open(self, user: str = "u", client_leg: FakeClientLeg | None = None) -> Ends:
        # A client's leg of its own for each: its frame_sender is then read by one.
        self.client_leg = client_leg or FakeClientLeg()
        self.tunnels.append(Ends(self, user, len(self.tunnels)))
        return self.tunnels[-1]

    def run(self, seconds: float, step_s: float = 0.05) -> None:
        """Let time pass."""
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            # Until nothing moves at this moment.
            while True:
                before = [dict(ends.arrived) for ends in self.tunnels]
                self.policy.pacer.look()
                for ends in self.tunnels:
                    ends.read()
                    ends.pass_on()
                if before == [ends.arrived for ends in self.tunnels]:
                    break


@pytest.mark.parametrize("way", ["up", "down"])
def test_bytes_come_at_the_rate_when_there_are_always_more(way: str) -> None:
    """A second's worth at once, then the rate, to the byte and not above it."""
    bench = Bench(bytes_per_s=RATE)
    ends = bench.open()
    for _ in range(40):
        ends.say(way, ENDLESS)
    bench.run(10)
    bound = RATE * 10 + RATE
    assert bound - 64 * KIB < ends.arrived[way] <= bound


def test_rate_holds_for_all_tunnels_of_a_user_and_each_gets_its_share() -> None:
    """Eight downloads are as fast as one; another user is not concerned."""
    bench = Bench(bytes_per_s=RATE)
    mine, other = [bench.open() for _ in range(8)], bench.open("other")
    for ends in [*mine, other]:
        for _ in range(60):
            ends.say("down", ENDLESS)
    bench.run(20)
    total = sum(ends.arrived["down"] for ends in mine)
    assert RATE * 20 * 0.9 < total <= RATE * 21
    shares = [ends.arrived["down"] for ends in mine]
    assert max(shares) - min(shares) <= 80 * KIB
    assert RATE * 20 * 0.9 < other.arrived["down"] <= RATE * 21


def test_keystrokes_pass_when_a_download_of_the_same_user_takes_all() -> None:
    """A tunnel that needs little is never without credit."""
    bench = Bench(bytes_per_s=RATE)
    bulk, shell = bench.open(), bench.open()
    for _ in range(100):
        bulk.say("down", ENDLESS)
    for _ in range(200):
        shell.say("down", b"k" * 1000)
        shell.pass_on()
        assert not shell.client.out._unsent
        bench.run(0.1)
    assert shell.arrived["down"] == 200_000


def test_bytes_are_not_slowed_when_they_stay_below_the_rate() -> None:
    """Megabytes pass within a moment if the tokens are there, with windows that grow."""
    bench = Bench(bytes_per_s=64 * MIB)
    ends = bench.open()
    for _ in range(16 * 20):
        ends.say("up", ENDLESS)
    bench.run(0.05)
    assert ends.arrived["up"] == 20 * MIB


@pytest.mark.parametrize("way", ["up", "down"])
def test_new_tunnels_are_no_way_around_the_rate(way: str) -> None:
    """Their first credit is a debt of their user, who may owe a second's worth and no more."""
    bench = Bench(bytes_per_s=RATE)
    for _ in range(100):
        ends = bench.open()
        for _ in range(4):
            ends.say(way, ENDLESS)
        ends.read()
        ends.pass_on()
        ends.tunnel.user_lost()
        bench.run(0.1)
    total = sum(ends.arrived[way] for ends in bench.tunnels)
    assert RATE * 9 < total <= RATE * 12
    # What is owed is soon paid, and then a tunnel has all again.
    bench.run(2)
    late = bench.open()
    for _ in range(20):
        late.say(way, ENDLESS)
    late.read()
    late.pass_on()
    assert late.arrived[way] == FIRST_CREDIT_BYTES
    bench.run(5)
    assert late.arrived[way] > RATE * 5


def test_first_credit_is_bounded_when_many_tunnels_begin_at_once() -> None:
    """Before the pacer has looked once; and each of them gets some later, in its turn."""
    bench = Bench(bytes_per_s=RATE)
    for _ in range(100):
        ends = bench.open()
        for way in ("up", "down"):
            ends.say(way, b"x" * 4096)
    first = [ends.tunnel.down.limit for ends in bench.tunnels]
    assert sum(first) == 2 * RATE
    assert first[:3] == [FIRST_CREDIT_BYTES] * 3
    assert set(first[4:]) == {0}
    assert sum(ends.tunnel.up.limit for ends in bench.tunnels) == 2 * RATE
    bench.run(10)
    assert all(ends.arrived == {"up": 4096, "down": 4096} for ends in bench.tunnels)


def test_login_is_quick_when_its_user_keeps_to_the_rate() -> None:
    """One after the other, while a download takes all there is: each begins with a message."""
    bench = Bench(bytes_per_s=RATE)
    bulk = bench.open()
    for _ in range(100):
        bulk.say("down", ENDLESS)
    bench.run(3)
    for _ in range(10):
        login = bench.open()
        assert (login.tunnel.up.limit, login.tunnel.down.limit) == (FIRST_CREDIT_BYTES,) * 2
        login.say("down", b"x" * 4000)
        login.read()
        login.pass_on()
        assert login.arrived["down"] == 4000
        login.tunnel.user_lost()
        bench.run(0.1)


def test_credit_is_given_back_when_the_client_refuses() -> None:
    """What a tunnel has borrowed that never was, it has not used."""
    bench = Bench(bytes_per_s=RATE)
    for _ in range(10):
        tunnel, _, user_leg = unanswered(bench, OPEN)
        assert tunnel.down.limit == FIRST_CREDIT_BYTES
        tunnel.on_client_control(
            from_dict({"type": "refused", "code": "target_refused", "message": ""})
        )
        assert [m["type"] for m in taken(user_leg.frame_sender)] == ["refused"]
        bench.run(0.05)
    assert not bench.policy.pacer.shaper._meters


def test_resume_begins_where_the_end_stands_when_its_user_owes_too_much() -> None:
    """No credit at all, at either end; and more later, by an ack."""
    bench = Bench(bytes_per_s=RATE)
    for _ in range(10):
        bench.open()
    control = {**RESUME, "limit": 300_000}
    tunnel, client_leg, user_leg = unanswered(bench, control)
    assert tunnel.down.limit == RESUME["received"]
    tunnel.on_client_control(from_dict(dict(RESUMED)))
    (resumed,) = taken(user_leg.frame_sender)
    assert resumed["limit"] == RESUMED["received"]
    bench.clock.advance(20)
    bench.policy.pacer.look()
    for frame_sender, stands in (
        (client_leg.frame_sender, RESUME),
        (user_leg.frame_sender, RESUMED),
    ):
        (ack,) = taken(frame_sender)
        assert (ack["type"], ack["delivered"]) == ("ack", stands["delivered"])
        assert ack["limit"] > stands["received"]


def test_credit_that_was_not_used_is_given_back() -> None:
    """A hundred short sessions cost what they carried."""
    bench = Bench(bytes_per_s=RATE)
    for _ in range(100):
        ends = bench.open()
        ends.say("down", b"x" * 100)
        bench.run(0.05)
        ends.tunnel.user_lost()
    bulk = bench.open()
    for _ in range(20):
        bulk.say("down", ENDLESS)
    bench.run(1)
    assert bulk.arrived["down"] > RATE * 1.5


def test_eof_and_reset_are_never_held_when_the_tokens_are_used_up() -> None:
    """The eof follows its last byte, its ack comes at once, and a reset overtakes."""
    bench = Bench(bytes_per_s=RATE)
    bulk, short = bench.open(), bench.open()
    for _ in range(100):
        bulk.say("down", ENDLESS)
    bench.run(2)
    short.say("up", b"bye")
    short.user.out.end()
    short.client.out.end()
    short.pass_on()
    assert short.user.out.eof_acked
    assert short.tunnel.is_over
    bulk.tunnel.on_client_control(
        from_dict({"type": "reset", "code": "client_stopped", "message": ""})
    )
    bulk.read()
    assert [end["code"] for end in bulk.ended] == ["client_stopped"]


def test_pacer_keeps_nothing_of_tunnels_that_ended() -> None:
    """Neither entries nor tokens, once the debt is paid."""
    bench = Bench(bytes_per_s=RATE, max_age_s=3600)
    for number in range(50):
        bench.open(f"user-{number}").tunnel.user_lost()
    bench.run(2)
    assert not bench.policy.pacer.lifetimes._entries
    assert not bench.policy.pacer.shaper._entries
    assert not bench.policy.pacer.shaper._meters
    assert len(bench.policy.pacer.shaper._tokens) == 0
    assert len(bench.policy.pacer.lifetimes._ages) == 50


def test_limits_leave_in_order_when_two_threads_raise_them() -> None:
    """An ack that is counted but not yet queued holds the pacer up: else a limit would fall."""
    bench = Bench(bytes_per_s=RATE)
    limits: list[int] = []
    counted, raised = threading.Event(), threading.Event()

    class SlowOutbox(FrameSender):
        def put_ack(self, channel: int, frame: Any) -> None:
            if not counted.is_set():
                counted.set()
                assert not raised.wait(0.1)
            limits.append(json.loads(frame.payload)["limit"])
            super().put_ack(channel, frame)

    def raise_limit() -> None:
        counted.wait(5)
        ends.tunnel.raise_limit(False, 1000)
        raised.set()

    client_leg = FakeClientLeg()
    client_leg.frame_sender = SlowOutbox()
    ends = bench.open(client_leg=client_leg)
    ends.read()
    thread = threading.Thread(target=raise_limit)
    thread.start()
    ack = {"type": "ack", "delivered": 0, "limit": MIN_WINDOW_BYTES, "eof": False}
    ends.tunnel.on_user_control(from_dict(ack))
    thread.join()
    assert limits == [FIRST_CREDIT_BYTES, FIRST_CREDIT_BYTES + 1000]


# Idle, and too old.


def test_tunnel_ends_when_it_was_idle_for_too_long() -> None:
    """Both ends are reset with the code and a sentence; the budget is free again."""
    bench = Bench(idle_timeout_s=60)
    ends = bench.open()
    bench.run(59, 0.5)
    assert not ends.tunnel.is_over
    bench.run(2, 0.5)
    assert [end["code"] for end in ends.ended] == ["idle_timeout"] * 2
    assert "60 s" in ends.ended[0]["message"]
    assert ends.tunnel.is_over


@pytest.mark.parametrize("way", ["up", "down"])
def test_tunnel_is_not_idle_when_a_byte_goes_either_way(way: str) -> None:
    """One a minute is enough; half-closed tunnels count alike."""
    bench = Bench(idle_timeout_s=60)
    ends = bench.open()
    (ends.client if way == "up" else ends.user).out.end()
    for _ in range(10):
        ends.say(way, b"k")
        bench.run(50, 0.5)
    assert not ends.tunnel.is_over


def test_tunnel_ends_when_it_is_too_old_however_busy() -> None:
    """With a code of its own."""
    bench = Bench(idle_timeout_s=60, max_age_s=100)
    ends = bench.open()
    for _ in range(99):
        ends.say("up", b"k")
        bench.run(1, 0.5)
    assert not ends.tunnel.is_over
    bench.run(2, 0.5)
    assert [end["code"] for end in ends.ended] == ["max_age"] * 2


def test_age_goes_on_when_a_tunnel_is_resumed() -> None:
    """To drop the leg and come back is no way to stay for ever."""
    bench = Bench(max_age_s=100)
    bench.open()
    bench.run(80, 0.5)
    bench.tunnels[0].tunnel.user_lost()
    bench.run(10, 0.5)
    leg = FakeClientLeg()
    control = {**RESUME, "tunnel_id": f"{0:032x}"}
    record = PolicyObserver(bench.policy, from_dict(control), "u", "addr")
    tunnel = Tunnel(leg, FakeUserLeg(), from_dict(control), "u", "*", observer=record)
    with leg.channels.lock:
        tunnel.assign_locked(CAP)
    resumed = {"type": "resumed", "received": 0, "delivered": 0, "limit": 300_000}
    tunnel.on_client_control(from_dict(resumed))
    bench.run(9, 0.5)
    assert not tunnel.is_over
    bench.run(2, 0.5)
    assert tunnel.is_over


def unanswered(bench: Bench, control: dict[str, Any]) -> tuple[Tunnel, FakeClientLeg, FakeUserLeg]:
    """A tunnel whose client says nothing, but has read that it is asked."""
    client_leg, user_leg = FakeClientLeg(), FakeUserLeg()
    record = PolicyObserver(bench.policy, from_dict(control), "u", "addr")
    tunnel = Tunnel(client_leg, user_leg, from_dict(control), "u", "*", observer=record)
    with client_leg.channels.lock:
        tunnel.assign_locked(CAP)
    return tunnel, client_leg, user_leg


@pytest.mark.parametrize("code", ["idle_timeout", "max_age"])
@pytest.mark.parametrize("first", [OPEN, RESUME], ids=["open", "resume"])
def test_tunnel_ends_when_its_client_never_answers(code: str, first: dict[str, Any]) -> None:
    """The user is refused with the code; a client's tunnel that may live is not reset."""
    bench = Bench(**{f"{code}_s": 60})
    tunnel, client_leg, user_leg = unanswered(bench, first)
    bench.run(59, 0.5)
    assert not tunnel.is_over
    bench.run(2, 0.5)
    assert tunnel.is_over
    (refused,) = taken(user_leg.frame_sender)
    assert (refused["type"], refused["code"]) == ("refused", code)
    assert [end["type"] for end in taken(client_leg.frame_sender)] == (
        ["reset"] if first is OPEN else ["detached"]
    )
    assert not bench.policy.pacer.lifetimes._ages


def test_age_counts_from_the_open_when_the_client_takes_its_time() -> None:
    """The wait for the answer is part of it; idle it is from the answer on."""
    bench = Bench(idle_timeout_s=60, max_age_s=100)
    tunnel, _, _ = unanswered(bench, OPEN)
    bench.run(50, 0.5)
    tunnel.on_client_control(from_dict({"type": "opened", "limit": MIN_WINDOW_BYTES, "grace_s": 0}))
    bench.run(49, 0.5)
    assert not tunnel.is_over
    bench.run(2, 0.5)
    assert tunnel.is_over
    assert list(bench.policy.pacer.lifetimes._ages.values()) == [1000.5]


def test_resume_of_an_old_tunnel_is_judged_when_the_client_has_accepted_it() -> None:
    """Before that it could not be reset, and would be kept for its grace."""
    bench = Bench(max_age_s=100)
    bench.open()
    bench.run(80, 0.5)
    bench.tunnels[0].tunnel.user_lost()
    bench.run(40, 0.5)
    tunnel, client_leg, _ = unanswered(bench, {**RESUME, "tunnel_id": f"{0:032x}"})
    bench.run(10, 0.5)
    assert not tunnel.is_over
    tunnel.on_client_control(from_dict(dict(RESUMED)))
    bench.run(1, 0.5)
    assert [end["code"] for end in taken(client_leg.frame_sender)] == ["max_age"]


def test_thread_runs_only_when_a_limit_needs_it() -> None:
    """None by default; stop() and join() end it, also one that never ran."""
    for settings, is_on in (({}, False), ({"idle_timeout_s": 1.0}, True)):
        pacer = Pacer(Config(**settings))  # type: ignore[arg-type]
        pacer.start()
        names = [thread.name for thread in threading.enumerate()]
        assert ("pacer:tunnels" in names) == is_on
        pacer.stop()
        pacer.join(5.0)
        eventually(lambda: "pacer:tunnels" not in [t.name for t in threading.enumerate()])
