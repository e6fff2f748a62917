"""What is in force: the order of the answers, and what a change of the file or the day does."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import server.access.access
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.message_reader import ABNORMAL_CLOSURE
from http_network_relay.wire.constants import OP_CLOSE, OP_TEXT
from http_network_relay.wire.errors import ConfigError, Refused
from server.access.access import Access
from server.access.credentials import Credentials, Login, digest_of
from server.access.file_watch import FileWatch
from server.access.form import parse_credentials
from server.config import Config
from server.legs.client_leg import ClientLeg
from server.legs.leg import Leg
from server.legs.user_leg import UserLeg
from server.registry import Slot
from server.relay import Relay
from tests.support.controls import from_dict
from tests.support.taking import FrameTaker
from tests.support.waiting import eventually

DAY = date(2026, 6, 1)
NEXT_DAY = date(2026, 6, 2)
USERS: dict[str, Any] = {
    "ops": {"secrets": ["pu-ops"], "allow": ["lab-*:127.0.0.1:22", "*:db.lan:5432"]},
    "all": {"secrets": ["pu-all"], "allow": ["*:*:*"]},
    "late": {"secrets": ["pu-late"], "allow": ["*:*:*"], "expires": "2020-01-01"},
}


def credentials(
    users: Any = USERS, clients: tuple[str, ...] = ("lab-1", "gw"), *, prefix: str = "cs-"
) -> Credentials:
    data = {"clients": {name: prefix + name for name in clients}, "proxy_users": users}
    return parse_credentials("credentials.json", json.dumps(data).encode(), warn=False)


def other_credentials() -> Credentials:
    """Without `lab-1`, and without the rule for it."""
    ops = {**USERS["ops"], "allow": ["*:db.lan:5432"]}
    return credentials({**USERS, "ops": ops}, ("gw",))


def asked(client: str, host: str, port: int) -> dict[str, Any]:
    rest = {"protocol": "tcp", "tunnel_id": "", "resume_token": "", "limit": 0, "grace_s": 0}
    return {"type": "open", "client": client, "host": host, "port": port, **rest}


def refusal(access: Access, user: str, *target: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        access.check_open(user, from_dict(asked(*target)))
    return caught.value


@pytest.fixture
def access() -> Access:
    """The users above, and no file to follow."""
    return Access(credentials(), None, lambda: None)


# Answers.


ALLOWED = {
    # user, client, host, port -> the rule
    ("ops", "lab-1", "127.0.0.1", 22): "lab-*:127.0.0.1:22",
    ("ops", "lab-1", "::ffff:127.0.0.1", 22): "lab-*:127.0.0.1:22",
    ("ops", "lab-1", "[::ffff:7f00:1]", 22): "lab-*:127.0.0.1:22",
    ("ops", "gw", "DB.lan.", 5432): "*:db.lan:5432",
    ("all", "gw", "10.1.2.3", 1): "*:*:*",
}


@pytest.mark.parametrize("target", ALLOWED, ids=str)
def test_rule_is_returned_when_it_allows(access: Access, target: tuple[Any, ...]) -> None:
    """Its text, for the log."""
    assert access.check_open(target[0], from_dict(asked(*target[1:]))) == ALLOWED[target]


REFUSED = {
    # user, client, host, port -> the code: the first that applies, from the top
    ("ops", "nobody", "127.1", 99): "target_invalid",
    ("ops", "lab-1", "127.1", 22): "target_invalid",
    ("all", "lab-1", "0x7f000001", 22): "target_invalid",
    ("all", "lab-1", "a b", 22): "target_invalid",
    ("gone", "lab-1", "127.1", 22): "target_invalid",
    ("ops", "nobody", "127.0.0.1", 22): "denied",
    ("ops", "gw", "127.0.0.1", 22): "denied",
    ("ops", "lab-1", "localhost", 22): "denied",
    ("ops", "lab-1", "127.0.0.1", 23): "denied",
    ("ops", "lab-1", "127.0.0.2", 22): "denied",
    ("gone", "lab-1", "127.0.0.1", 22): "denied",
    ("gone", "nobody", "127.0.0.1", 22): "denied",
    ("", "lab-1", "127.0.0.1", 22): "denied",
    ("late", "lab-1", "127.0.0.1", 22): "denied",
    ("ops", "lab-9", "127.0.0.1", 22): "client_unknown",
    ("ops", "nobody", "db.lan", 5432): "client_unknown",
    ("all", "LAB-1", "127.0.0.1", 22): "client_unknown",
}


@pytest.mark.parametrize("target", REFUSED, ids=str)
def test_first_reason_counts_when_refused(access: Access, target: tuple[Any, ...]) -> None:
    """An address that is none, then no rule, and only then no client."""
    assert refusal(access, target[0], *target[1:]).code == REFUSED[target]


def test_denied_tells_nothing_of_clients_when_no_rule_matches(access: Access) -> None:
    """The same words whether the client exists or not."""
    there = refusal(access, "ops", "gw", "10.0.0.1", 22).message
    not_there = refusal(access, "ops", "no", "10.0.0.1", 22).message
    assert there.replace(" gw", " no") == not_there


def test_everything_is_allowed_when_the_user_is_of_the_short_form() -> None:
    """No rule limits a token of the list; what is no address stays refused."""
    access = Access(credentials(["pu-short"]), None, lambda: None)
    login = access.credentials.login_user("pu-short")
    assert login is not None
    assert access.check_open(login.name, from_dict(asked("gw", "10.1.2.3", 1)))
    assert refusal(access, login.name, "gw", "127.1", 1).code == "target_invalid"
    assert refusal(access, login.name, "no", "10.1.2.3", 1).code == "client_unknown"


def test_one_state_is_asked_when_it_changes_meanwhile() -> None:
    """A change between the two questions does not mix the answers of two files."""
    access = Access(credentials(), None, lambda: None)

    class Turning(Credentials):
        def may_open(self, *_: Any) -> str | None:
            access.credentials = other_credentials()
            return "rule"

        def has_client(self, name: str) -> bool:
            return name == "lab-1"

    access.credentials = Turning([], [])
    assert access.check_open("ops", from_dict(asked("lab-1", "127.0.0.1", 22))) == "rule"
    assert refusal(access, "ops", "lab-1", "127.0.0.1", 22).code == "denied"


# Changes.


class Polls:
    """A watch whose polls a test answers: with credentials, None, an error, or a call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: list[Any] = []
        self.count = 0

    def poll(self) -> Credentials | None:
        with self._changed:
            self.count += 1
            answer = self._next.pop(0) if self._next else None
        if isinstance(answer, Exception):
            raise answer
        found: Credentials | None = answer() if callable(answer) else answer
        return found

    def answer(self, *answers: Any) -> None:
        """Wait until these were given, and the look after them has begun."""
        with self._changed:
            self._next += answers
            until = self.count + len(answers)
        eventually(lambda: self.count > until)


class Following:
    """An Access that looks all the time, and counts its calls of on_change."""

    def __init__(self, watch: Any) -> None:
        self.changes = 0
        self.seen: list[Credentials] = []
        self.problem: Exception | None = None
        self.access = Access(credentials(), watch, self._on_change)

    def _on_change(self) -> None:
        self.changes += 1
        self.seen.append(self.access.credentials)
        if self.problem is not None:
            raise self.problem


@contextmanager
def following(watch: Any) -> Iterator[Following]:
    found = Following(watch)
    found.access.start()
    try:
        yield found
    finally:
        found.access.stop()
        found.access.join(5)
    assert "credentials" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[date], None]:
    """Set the date; looks follow each other closely."""
    dates = [DAY]
    monkeypatch.setattr(server.access.access, "utc_today", lambda: dates[0])
    monkeypatch.setattr(server.access.access, "_LOOK_S", 0.002)
    return lambda day: dates.__setitem__(0, day)


def test_change_is_in_force_when_it_is_told() -> None:
    """The new state first, then the call: whoever is asked again, is asked by it."""
    polls = Polls()
    with following(polls) as found:
        polls.answer(None, None)
        assert found.changes == 0
        new = other_credentials()
        polls.answer(new)
        assert found.access.credentials is new
        assert found.seen == [new]
        assert refusal(found.access, "ops", "lab-1", "127.0.0.1", 22).code == "denied"
        assert refusal(found.access, "all", "lab-1", "127.0.0.1", 22).code == "client_unknown"
        polls.answer(None, None)
        assert found.changes == 1


def test_everybody_is_asked_again_when_a_day_begins(today: Callable[[date], None]) -> None:
    """Without a change of the file, once for each day."""
    polls = Polls()
    with following(polls) as found:
        polls.answer(None)
        assert found.changes == 0
        today(NEXT_DAY)
        eventually(lambda: found.changes == 1)
        polls.answer(None, None, None)
        assert found.changes == 1


def test_day_begins_when_no_file_is_followed(today: Callable[[date], None]) -> None:
    """An expiry needs no file."""
    with following(None) as found:
        today(NEXT_DAY)
        eventually(lambda: found.changes == 1)


def test_change_and_new_day_are_one_when_they_come_together(
    today: Callable[[date], None],
) -> None:
    """Nobody is asked twice for one look."""
    polls = Polls()

    def change() -> Credentials:
        today(NEXT_DAY)
        return credentials()

    with following(polls) as found:
        polls.answer(change)
        polls.answer(None, None, None)
        assert found.changes == 1


def test_old_state_stays_when_the_new_one_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """One ERROR line, nobody is asked again, and a good file later is taken."""
    caplog.set_level(logging.INFO)
    polls = Polls()
    with following(polls) as found:
        old = found.access.credentials
        polls.answer(ConfigError("line 3: not so"), None, None)
        assert found.access.credentials is old
        assert found.changes == 0
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.exc_info for record in errors] == [None]
        assert "credentials not reloaded" in errors[0].getMessage()
        assert "line 3: not so" in errors[0].getMessage()
        new = other_credentials()
        polls.answer(new)
        assert found.access.credentials is new
        assert found.changes == 1


@pytest.mark.parametrize("where", ["poll", "on_change"])
def test_thread_goes_on_when_something_unforeseen_is_raised(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next change is taken: who is revoked must not stay in."""
    polls = Polls()
    with following(polls) as found:
        if where == "poll":
            polls.answer(ValueError("unforeseen"))
        else:
            found.problem = ValueError("unforeseen")
            polls.answer(credentials(clients=("lab-1",)))
            found.problem = None
        assert "credentials were not looked at" in caplog.text
        new = other_credentials()
        polls.answer(new)
        assert found.seen[-1] is new


def test_everybody_is_asked_until_it_works_when_on_change_fails() -> None:
    """A failure in the middle must not leave somebody in whose access was taken away."""
    polls = Polls()
    with following(polls) as found:
        found.problem = ValueError("unforeseen")
        polls.answer(credentials(clients=("lab-1",)))
        assert found.changes >= 1
        found.problem = None
        done = found.changes
        eventually(lambda: found.changes > done, 1.0)


def test_stop_is_quick_when_the_next_look_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends does not wait for a look."""
    monkeypatch.setattr(server.access.access, "_LOOK_S", 3600.0)
    with following(Polls()):
        pass


def test_join_returns_when_it_was_never_started() -> None:
    """A relay that did not start is stopped like others."""
    access = Access(credentials(), None, lambda: None)
    access.stop()
    access.join(5)


def test_file_is_followed_when_it_changes(tmp_path: Path) -> None:
    """With a real watch: a login is valid, not after its secret has gone, and again with it."""
    path = tmp_path / "credentials.json"
    path.touch(mode=0o600)
    old = json.dumps({"clients": {"gw": "cs-gw"}, "proxy_users": USERS})
    without_ops = {name: user for name, user in USERS.items() if name != "ops"}
    new = json.dumps({"clients": {"gw": "cs-gw"}, "proxy_users": without_ops})
    # Two rules are for clients of other names, which this file does not have.
    old = old.replace("lab-*", "gw")
    path.write_text(old)
    watch = FileWatch(str(path))
    state = watch.load(warn=False)
    login = state.login_user("pu-ops")
    assert login is not None
    assert login.digest == digest_of("pu-ops")
    with following(watch) as found:
        for text, is_valid in ((new, False), (old, True)):
            path.write_text(text)
            eventually(partial(is_now, found, login, is_valid))


def is_now(found: Following, login: Login, is_valid: bool) -> bool:
    return found.access.credentials.is_valid(login) == is_valid


# A leg that was let in by credentials that are not in force any more when it is served.


class Wire:
    """A WebSocket without a network: it keeps what is written, and is lost after a close."""

    def __init__(self) -> None:
        self.heard_at = float("inf")
        self.written: list[Any] = []
        self._is_over = threading.Event()

    def receive(self) -> tuple[int, int]:
        self._is_over.wait(5)
        return OP_CLOSE, ABNORMAL_CLOSURE

    def start(self, _websocket: object, frame_sender: FrameSender) -> None:
        frame_sender.start(FrameTaker(self._write))  # type: ignore[arg-type]

    def _write(self, frame: Any) -> None:
        payload = bytes(frame.payload)
        if frame.opcode == OP_TEXT:
            self.written.append(json.loads(payload))
        elif frame.opcode == OP_CLOSE:
            self.written.append(int.from_bytes(payload[:2], "big"))
            self._is_over.set()

    def discard_input(self) -> None:
        pass

    def abort(self) -> None:
        self._is_over.set()

    stop = abort


OPS = Login("user", "ops", digest_of("pu-ops"))
GW = Login("client", "gw", digest_of("cs-gw"))
LATER: dict[str, Callable[[], Credentials]] = {
    "user revoked": lambda: credentials({"all": USERS["all"]}),
    "secret rotated away": lambda: credentials(
        {**USERS, "ops": {**USERS["ops"], "secrets": ["pu-new"]}}
    ),
    "user expired": lambda: credentials(
        {**USERS, "ops": {**USERS["ops"], "expires": "2020-01-01"}}
    ),
}


@pytest.fixture
def relay() -> Iterator[Relay]:
    """One that runs no threads but the sender."""
    found = Relay(Config(ping_interval_s=20.0), credentials())
    found._registry.set_capacity(16)
    found._sender.start()
    yield found
    found._sender.stop()
    found._sender.join(5)


def attached(relay: Relay, slot: Slot[Leg]) -> Wire:
    wire = Wire()
    relay.attach(slot, wire)  # type: ignore[arg-type]
    return wire


@pytest.mark.parametrize("name", LATER)
def test_user_leg_is_refused_when_it_was_let_in_by_old_credentials(relay: Relay, name: str) -> None:
    """Nobody was there to be told when they changed: serve() asks for itself."""
    slot = relay.admit_user(OPS, "addr", "a" * 32)
    wire = attached(relay, slot)
    relay._access.credentials = LATER[name]()
    relay.serve(slot, None)
    refused, close = wire.written
    assert (refused["type"], refused["code"], close) == ("refused", "revoked", 1000)
    assert isinstance(slot.leg, UserLeg)
    assert slot.leg.tunnel is None


def test_client_leg_is_closed_when_it_was_let_in_by_old_credentials(relay: Relay) -> None:
    """It gets no tunnel: a `resume` that waits for this client waits on for the right one."""
    user = relay.admit_user(Login("user", "all", digest_of("pu-all")), "addr", "b" * 32)
    attached(relay, user)
    assert isinstance(user.leg, UserLeg)
    resume = {"tunnel_id": "b" * 32, "resume_token": "c" * 64, "grace_s": 60, "attempt": 1}
    counts = {"received": 0, "delivered": 0, "limit": 262_144, "protocol": "tcp"}
    target = asked("gw", "127.0.0.1", 22)
    user.leg._on_message(json.dumps({**target, "type": "resume", **resume, **counts}))
    slot = relay.admit_client(GW, "d" * 32, "addr")
    wire = attached(relay, slot)
    relay._access.credentials = credentials(prefix="new-")
    relay.serve(slot, None)
    assert isinstance(slot.leg, ClientLeg)
    assert wire.written == [1008]
    assert user.leg.tunnel is None
    assert not user.leg.frame_sender.has_frames
    assert len(relay._pending) == 1
