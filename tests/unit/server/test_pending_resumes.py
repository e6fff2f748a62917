"""A `resume` that waits for its client: opened, refused or forgotten, and once."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.constants import FLUSH_S, OP_CLOSE, OP_TEXT
from http_network_relay.wire.controls import parse_control
from server.access.credentials import Credentials, Login, digest_of, user_name_of
from server.config import Config
from server.legs.client_leg import ClientLeg
from server.legs.pending_resumes import PENDING_RESUME_S
from server.legs.user_leg import UserLeg
from server.relay import Relay
from tests.support.taking import queue_lock, take

INTERVAL_S = 20.0
INSTANCE = "a" * 32
RESUME: dict[str, Any] = {
    "type": "resume",
    "client": "gw",
    "host": "h",
    "port": 22,
    "protocol": "tcp",
    "tunnel_id": "ab" * 16,
    "resume_token": "0" * 64,
    "limit": 262_144,
    "grace_s": 120,
    "attempt": 1,
    "received": 7,
    "delivered": 7,
}
ROUNDS = 100


class FakeTransport:
    """A WebSocket without a network: it reads until it is aborted, and writes nowhere."""

    def __init__(self) -> None:
        self.heard_at = time.monotonic()
        self.aborted = threading.Event()

    def receive(self) -> tuple[int, int]:
        self.aborted.wait()
        return OP_CLOSE, ABNORMAL_CLOSURE

    def start(self, _websocket: object, _frame_sender: FrameSender) -> None:
        """Nobody sends: the tests take what waits."""

    def discard_input(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted.set()

    stop = abort


# Whom the token lets in.
USER = Login("user", user_name_of("t"), digest_of("t"))


class Bench:
    """A relay whose legs have no sockets; `gw` and `other` may connect."""

    def __init__(self) -> None:
        credentials = Credentials.plain({"gw": "gw-secret", "other": "other-secret"}, ["t"])
        self.relay = Relay(Config(ping_interval_s=INTERVAL_S), credentials)
        self.relay._registry.set_capacity(16)

    def user(self) -> UserLeg:
        slot = self.relay.admit_user(USER, "addr", "")
        self.relay.attach(slot, FakeTransport())  # type: ignore[arg-type]
        assert isinstance(slot.leg, UserLeg)
        return slot.leg

    def client(self, name: str = "gw") -> ClientLeg:
        """A client's leg as far as serve() brings it before it reads."""
        slot = self.relay.admit_client(Login("client", name, b""), INSTANCE, "addr")
        self.relay.attach(slot, FakeTransport())  # type: ignore[arg-type]
        assert isinstance(slot.leg, ClientLeg)
        self.relay._pending.open_for(name)
        return slot.leg

    @property
    def pending(self) -> int:
        return len(self.relay._pending)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(params=[0.005, 1e-6], ids=["as-usual", "switching-often"])
def _switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter changes threads seldom, or nearly everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def taken(frame_sender: FrameSender) -> list[Any]:
    """What waits there: controls as objects, a close as its code."""
    frames: list[Any] = []
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        payload = bytes(frame.payload)
        is_close = frame.opcode == OP_CLOSE
        frames.append(int.from_bytes(payload, "big") if is_close else payload)
        if frame.opcode == OP_TEXT:
            frames[-1] = json.loads(payload)
    return frames


def kinds(frame_sender: FrameSender) -> list[Any]:
    return [m["type"] if isinstance(m, dict) else m for m in taken(frame_sender)]


def say(leg: UserLeg, control: dict[str, Any]) -> None:
    leg._on_message(json.dumps(control))


def together(*acts: Callable[[], object]) -> None:
    """Run all at once, each in a thread."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        barrier.wait()
        act()

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def taken_lock(lock: Any) -> Iterator[None]:
    """Another thread is inside."""
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            inside.set()
            done.wait(1)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    yield
    done.set()
    thread.join()


def test_resume_is_opened_when_its_client_comes(bench: Bench) -> None:
    """And only that of this client; it then waits no more."""
    user, other = bench.user(), bench.user()
    say(user, RESUME)
    say(other, {**RESUME, "client": "other"})
    assert kinds(user.frame_sender) == []
    assert bench.pending == 2

    client = bench.client()

    (resume,) = taken(client.frame_sender)
    assert resume == {**RESUME, "channel": 1, "user": USER.name}
    assert user.tunnel is not None
    assert other.tunnel is None
    assert bench.pending == 1


def test_resume_waits_when_its_clients_leg_was_just_closed(bench: Bench) -> None:
    """That client is still registered, and on its way back."""
    user, old = bench.user(), bench.client()
    old.lost()
    say(user, RESUME)
    assert bench.pending == 1
    assert kinds(bench.client().frame_sender) == ["resume"]
    assert taken(user.frame_sender) == []


def test_open_does_not_wait_when_its_client_is_absent(bench: Bench) -> None:
    """There is nothing to keep yet: whoever opens learns it at once."""
    user = bench.user()
    say(user, {**RESUME, "type": "open"})
    assert [m["code"] for m in taken(user.frame_sender)] == ["client_offline"]
    assert bench.pending == 0


def test_resume_does_not_wait_when_nobody_has_its_clients_name(bench: Bench) -> None:
    """Such a client never comes."""
    user = bench.user()
    say(user, {**RESUME, "client": "nobody"})
    assert [m["code"] for m in taken(user.frame_sender)] == ["client_unknown"]
    assert bench.pending == 0


def test_resume_is_refused_when_the_client_does_not_come(bench: Bench) -> None:
    """After ten seconds; then the leg is closed, and cut off where nobody reads that."""
    user = bench.user()
    begun = time.monotonic()
    say(user, RESUME)
    assert user.tick(begun + PENDING_RESUME_S - 0.1) <= time.monotonic() + PENDING_RESUME_S
    assert kinds(user.frame_sender) == []

    now = time.monotonic() + PENDING_RESUME_S
    assert user.tick(now) == now + FLUSH_S
    refused, close = taken(user.frame_sender)
    assert (refused["type"], refused["code"], close) == (
        "refused",
        "client_offline",
        CloseCode.NORMAL,
    )
    assert taken(bench.client().frame_sender) == []

    user.tick(now + FLUSH_S)
    assert user._transport.aborted.is_set()  # type: ignore[attr-defined]
    assert user.reason == "client_offline"
    user.lost()
    assert bench.pending == 0


def test_nothing_follows_the_close_when_a_ping_is_due_then(bench: Bench) -> None:
    """A frame behind a close frame would be an error."""
    user = bench.user()
    say(user, RESUME)
    now = time.monotonic() + INTERVAL_S
    user._transport.heard_at = now
    user.tick(now)
    assert kinds(user.frame_sender) == ["refused", CloseCode.NORMAL]


@pytest.mark.parametrize("name", ["_opening", "outbox"])
def test_timer_does_not_wait_when_a_lock_is_taken(bench: Bench, name: str) -> None:
    """It comes again after some milliseconds, and then says it once."""
    user = bench.user()
    say(user, RESUME)
    now = time.monotonic() + PENDING_RESUME_S
    with taken_lock(user._opening if name == "_opening" else queue_lock(user.frame_sender)):
        assert now < user.tick(now) < now + 0.1
    for _ in range(2):
        user.tick(now + 0.1)
    assert kinds(user.frame_sender) == ["refused", CloseCode.NORMAL]


def test_resume_is_forgotten_when_its_leg_is_lost(bench: Bench) -> None:
    """The client never hears of it, and nobody waits."""
    user = bench.user()
    say(user, RESUME)
    user.lost()
    assert bench.pending == 0
    assert taken(bench.client().frame_sender) == []


def test_resume_is_refused_when_the_server_stops(bench: Bench) -> None:
    """At once: the user's end goes to the next server."""
    user = bench.user()
    say(user, RESUME)
    bench.relay.drain()
    assert [m["code"] for m in taken(user.frame_sender)] == ["server_restart"]
    assert bench.pending == 0


# What a user's end says while its `resume` waits -> what it reads.
EARLY: dict[str, tuple[bytes | dict[str, Any], list[Any]]] = {
    "data": (b"x", ["refused"]),
    "eof": ({"type": "eof", "count": 0}, ["refused"]),
    "a second resume": ({**RESUME, "attempt": 2}, ["refused"]),
    "a bad field": ({"type": "eof", "count": -1}, ["refused"]),
    "a reset": ({"type": "reset", "code": "user_gone", "message": ""}, []),
}


@pytest.mark.parametrize("case", EARLY)
def test_resume_waits_no_more_when_the_user_speaks(bench: Bench, case: str) -> None:
    """Anything before its answer ends it."""
    message, answers = EARLY[case]
    user = bench.user()
    say(user, RESUME)
    user._on_message(message if isinstance(message, bytes) else json.dumps(message))
    assert kinds(user.frame_sender) == answers
    user._on_message(b"and again")
    assert bench.pending == 0
    assert taken(bench.client().frame_sender) == []


def test_replaced_leg_ends_at_once_when_its_resume_waits(bench: Bench) -> None:
    """A newer leg of the tunnel waits in its place."""
    relay = bench.relay
    slot = relay.admit_user(USER, "addr", RESUME["tunnel_id"])
    relay.attach(slot, FakeTransport())  # type: ignore[arg-type]
    assert isinstance(slot.leg, UserLeg)
    say(slot.leg, RESUME)
    new = relay.admit_user(USER, "addr", RESUME["tunnel_id"])
    assert slot.leg._transport.aborted.is_set()  # type: ignore[attr-defined]
    assert bench.pending == 0
    relay.attach(new, FakeTransport())  # type: ignore[arg-type]
    assert isinstance(new.leg, UserLeg)
    say(new.leg, {**RESUME, "attempt": 2})
    assert [m["attempt"] for m in taken(bench.client().frame_sender)] == [2]


def test_pending_resume_is_opened_when_the_client_is_served(bench: Bench) -> None:
    """serve() looks for those who wait before it reads."""
    user = bench.user()
    say(user, RESUME)
    slot = bench.relay.admit_client(Login("client", "gw", digest_of("gw-secret")), INSTANCE, "addr")
    transport = FakeTransport()
    bench.relay.attach(slot, transport)  # type: ignore[arg-type]
    thread = threading.Thread(target=bench.relay.serve, args=(slot, None))
    thread.start()
    bench.relay._sender.start()
    transport.abort()
    thread.join()
    bench.relay._sender.stop()
    bench.relay._sender.join(5)
    assert [m["code"] for m in taken(user.frame_sender)] == ["client_offline"]
    assert user.tunnel is not None
    assert bench.pending == 0


@pytest.mark.parametrize("name", ["_opening", "outbox"])
def test_leg_is_refused_when_it_says_nothing(bench: Bench, name: str) -> None:
    """With a code; the timer waits for no lock, says it once, and late words change nothing."""
    user, client = bench.user(), bench.client()
    begun = time.monotonic()
    first_s = Config().handshake_timeout_s
    assert begun + first_s - 1 < user.tick(begun) < begun + first_s + 1
    now = time.monotonic() + first_s
    with taken_lock(user._opening if name == "_opening" else queue_lock(user.frame_sender)):
        assert now < user.tick(now) < now + 0.1
    user.tick(now + 0.1)
    say(user, {**RESUME, "type": "open"})
    for _ in range(2):
        user.tick(now + 0.2)
    refused, close = taken(user.frame_sender)
    assert (refused["type"], refused["code"], close) == ("refused", "no_open", CloseCode.NORMAL)
    assert f"{first_s:g} s" in refused["message"]
    assert taken(client.frame_sender) == []
    assert user.reason == "no_open"
    user.tick(now + 0.1 + FLUSH_S)
    assert user._transport.aborted.is_set()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_switching")
def test_tunnel_is_opened_or_refused_when_the_open_comes_at_the_last_moment() -> None:
    """Never both, and never neither."""
    for _ in range(ROUNDS):
        bench = Bench()
        user, client = bench.user(), bench.client()
        now = time.monotonic() + Config().handshake_timeout_s
        user._transport.heard_at = now
        together(lambda: say(user, {**RESUME, "type": "open"}), lambda: user.tick(now))  # noqa: B023
        user.tick(now + 0.1)
        seen = kinds(client.frame_sender), kinds(user.frame_sender)
        assert seen in ((["open"], []), ([], ["refused", CloseCode.NORMAL]))


@pytest.mark.usefixtures("_switching")
def test_pending_resume_keeps_its_deadline_when_it_comes_at_the_last_moment() -> None:
    """The timer that looks for the first message must not take the other deadline away."""
    for _ in range(ROUNDS):
        bench = Bench()
        user = bench.user()
        now = time.monotonic() + Config().handshake_timeout_s
        user._transport.heard_at = now
        together(lambda: say(user, RESUME), lambda: user.tick(now))  # noqa: B023
        later = now + PENDING_RESUME_S + 1
        for _ in range(2):
            user.tick(later)
        assert kinds(user.frame_sender) == ["refused", CloseCode.NORMAL]


REVOKED = ("revoked", "the access was revoked")
# Who ends the leg from another thread -> what the user reads.
ENDERS: dict[str, tuple[Callable[[UserLeg], None], list[Any]]] = {
    "revoked": (lambda user: user.revoke(*REVOKED), ["refused"]),
    "replaced": (lambda user: user.replace(), []),
}


@pytest.mark.parametrize("kind", ["open", "resume"])
@pytest.mark.parametrize("case", ENDERS)
def test_nothing_is_opened_when_the_leg_ends_as_its_first_message_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, case: str, kind: str
) -> None:
    """The reader has the message already, and finds out where it would act on it."""
    end, answers = ENDERS[case]
    user, client = bench.user(), bench.client()

    def parse_late(*args: Any, **options: Any) -> Any:
        end(user)
        return parse_control(*args, **options)

    monkeypatch.setattr("server.legs.user_leg.parse_control", parse_late)
    say(user, {**RESUME, "type": kind})
    assert user.tunnel is None
    assert taken(client.frame_sender) == []
    assert kinds(user.frame_sender) == answers
    assert bench.pending == 0
    assert user.reason == case


# Two at once. Whoever comes first, the `resume` is opened once or never.


@pytest.mark.usefixtures("_switching")
def test_resume_is_opened_once_when_the_client_comes_in_that_moment() -> None:
    """No wake-up is lost, and no channel is taken twice."""
    for _ in range(ROUNDS):
        bench = Bench()
        user = bench.user()
        came: list[ClientLeg] = []
        together(lambda: say(user, RESUME), lambda: came.append(bench.client()))  # noqa: B023
        assert kinds(came[0].frame_sender) == ["resume"]
        assert user.tunnel is not None
        assert bench.pending == 0


@pytest.mark.usefixtures("_switching")
def test_resume_is_opened_once_when_the_client_replaces_its_leg_in_that_moment() -> None:
    """On the old leg, whose end refuses it, or on the new one."""
    for _ in range(ROUNDS):
        bench = Bench()
        user, old = bench.user(), bench.client()
        came: list[ClientLeg] = []
        together(lambda: say(user, RESUME), lambda: came.append(bench.client()))  # noqa: B023
        on_new, to_user = kinds(came[0].frame_sender), kinds(user.frame_sender)
        assert (on_new, to_user) in ((["resume"], []), ([], ["refused"]))
        assert not old.channels.tunnels
        assert bench.pending == 0


@pytest.mark.usefixtures("_switching")
def test_nothing_is_left_when_the_user_is_lost_as_the_client_comes() -> None:
    """Its channel is free again, and the client knows, unless it never heard of it."""
    for _ in range(ROUNDS):
        bench = Bench()
        user = bench.user()
        say(user, RESUME)
        came: list[ClientLeg] = []
        together(user.lost, lambda: came.append(bench.client()))  # noqa: B023
        # Where the `resume` was queued it was taken back: nobody wrote.
        assert taken(came[0].frame_sender) == []
        assert not came[0].channels.tunnels
        assert bench.pending == 0


@pytest.mark.usefixtures("_switching")
def test_resume_is_opened_or_refused_when_its_time_is_over_as_the_client_comes() -> None:
    """Never both, and never neither."""
    for _ in range(ROUNDS):
        bench = Bench()
        user = bench.user()
        say(user, RESUME)
        now = time.monotonic() + PENDING_RESUME_S
        came: list[ClientLeg] = []
        together(lambda: user.tick(now), lambda: came.append(bench.client()))  # noqa: B023
        user.tick(now + 0.1)
        seen = kinds(came[0].frame_sender), kinds(user.frame_sender)
        assert seen in ((["resume"], []), ([], ["refused", CloseCode.NORMAL]))


@pytest.mark.usefixtures("_switching")
def test_resume_is_refused_when_it_comes_as_the_server_stops() -> None:
    """None waits behind the drain's back."""
    for _ in range(ROUNDS):
        bench = Bench()
        user = bench.user()
        together(lambda: say(user, RESUME), bench.relay.drain)  # noqa: B023
        assert [m["code"] for m in taken(user.frame_sender)] == ["server_restart"]
        assert bench.pending == 0


@pytest.mark.usefixtures("_switching")
def test_nothing_is_left_when_the_user_is_revoked_as_the_open_comes() -> None:
    """Refused once, and the client dials for nobody."""
    for _ in range(ROUNDS):
        bench = Bench()
        user, client = bench.user(), bench.client()
        together(
            lambda: say(user, {**RESUME, "type": "open"}),  # noqa: B023
            lambda: user.revoke(*REVOKED),  # noqa: B023
        )
        # Where the `open` was queued it was taken back: nobody wrote.
        assert taken(client.frame_sender) == []
        assert not client.channels.tunnels
        assert [m["code"] for m in taken(user.frame_sender)] == ["revoked"]


@pytest.mark.usefixtures("_switching")
def test_tunnels_end_without_a_reset_when_the_server_stops() -> None:
    """`detached` to the user, and to the client nothing but the close: its tunnels live on."""
    for _ in range(ROUNDS // 10):
        bench = Bench()
        user, client = bench.user(), bench.client()
        say(user, RESUME)
        assert kinds(client.frame_sender) == ["resume"]
        counts = {"received": 0, "delivered": 0, "limit": 262_144}
        client._on_message(json.dumps({"type": "resumed", "channel": 1, **counts}))
        assert kinds(user.frame_sender) == ["resumed"]
        bench.relay._legs.add(user)
        bench.relay._legs.add(client)
        bench.relay.drain()
        assert kinds(client.frame_sender) == kinds(user.frame_sender) == ["going_away"]
        client._on_message(b"\0\0\0\1still works")
        user._on_message(b"still works")
        assert taken(client.frame_sender) == [b"still works"]
        assert taken(user.frame_sender) == [b"still works"]
        together(bench.relay.end, user.lost)
        assert [m for m in kinds(client.frame_sender) if m != "detached"] == []
        frame = take(client.frame_sender)
        assert frame is not None
        assert int.from_bytes(frame.payload, "big") == CloseCode.RESTART


def test_drain_waits_for_nobody_when_there_are_no_legs(bench: Bench) -> None:
    """Nor for legs that have left: the time to leave is over with the last one."""
    bench.relay.drain()
    assert bench.relay.join(60)

    bench = Bench()
    user = bench.user()
    bench.relay._legs.add(user)
    bench.relay.drain()
    assert not bench.relay.join(0)
    together(lambda: bench.relay._legs.drop(user), lambda: bench.relay.join(60))
    assert bench.relay.join(0)
