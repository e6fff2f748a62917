"""--allow: of all that a name stands for, only what a rule allows is dialled."""

from __future__ import annotations

import errno
import json
import socket
import threading
from typing import Any

import pytest

import http_network_relay.dial.connect
from client.config import read_config
from client.forwarder import Forwarder
from http_network_relay.end.channel import Channel
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.rules.target import TargetRule
from http_network_relay.wire.errors import RelayError
from tests.support.controls import from_dict
from tests.support.taking import take
from tests.support.targets import EchoTarget
from tests.support.waiting import eventually

WINDOW = 262_144
# What the resolver says of every name.
MAPPED = "::ffff:10.0.0.3"
ANSWERS = ["10.0.0.1", "10.0.0.2", "127.0.0.1", "fd00::1", "fe80::1%2", MAPPED]
ALL = set(ANSWERS)


class Machine:
    """A resolver with those answers, and a network in which every address refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lookups: list[str] = []
        self.dialled: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)
        monkeypatch.setattr(http_network_relay.dial.connect, "_begin", self._begin)

    def _look_up(self, name: bytes, port: int, **_: Any) -> list[Any]:
        host = name.decode()
        self.lookups.append(host)
        is_address = ":" in host or host.replace(".", "").isdigit()
        return [info(address, port) for address in ([host] if is_address else ANSWERS)]

    def _begin(self, found: Any, _: Any) -> OSError:
        self.dialled.append(found[4][0])
        return OSError(errno.ECONNREFUSED, "refused")


def info(address: str, port: int) -> tuple[Any, ...]:
    """One of getaddrinfo's answers."""
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


def make_tunnel(frame_sender: FrameSender, host: str, port: int, *allow: str) -> Forwarder:
    opening = {
        "type": "open",
        "client": "gw",
        "user": "ops",
        "tunnel_id": "a" * 32,
        "resume_token": "b" * 64,
        "host": host,
        "port": port,
        "protocol": "tcp",
        "limit": WINDOW,
        "grace_s": 0,
    }
    rules = tuple(TargetRule.parse(text) for text in allow)
    return Forwarder(from_dict(opening), Channel(frame_sender, 1), WINDOW, 0, rules, lambda _: None)


def first_control(frame_sender: FrameSender) -> dict[str, Any]:
    """What goes to the server before all else."""
    eventually(lambda: frame_sender.has_frames)
    frame = take(frame_sender)
    assert frame is not None
    control: dict[str, Any] = json.loads(bytes(frame.payload))
    return control


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """No real name and no real address in these tests."""
    return Machine(monkeypatch)


DIALS: dict[str, tuple[list[str], str, set[str]]] = {
    # what is tested -> the rules, the host that is asked for with port 22, what is dialled
    "no rules": ([], "db.lan", ALL),
    "one address of many": (["10.0.0.2:22"], "db.lan", {"10.0.0.2"}),
    "two rules": (["10.0.0.2:22", "[fd00::1]:22"], "db.lan", {"10.0.0.2", "fd00::1"}),
    "network": (["10.0.0.0/8:22"], "db.lan", {"10.0.0.1", "10.0.0.2", MAPPED}),
    "IPv6 network": (["[fd00::/8]:22"], "db.lan", {"fd00::1"}),
    "all IPv6, without mapped IPv4": (["[::/0]:22"], "db.lan", {"fd00::1", "fe80::1%2"}),
    "mapped answer": (["10.0.0.3:22"], "db.lan", {MAPPED}),
    "mapped rule": (["[::ffff:10.0.0.3]:22"], "db.lan", {MAPPED}),
    "answer with a scope": (["[fe80::/10]:22"], "db.lan", {"fe80::1%2"}),
    "everything": (["*:22"], "db.lan", ALL),
    "name": (["db.lan:22"], "db.lan", ALL),
    "name in capitals with a dot": (["db.lan:22"], "DB.Lan.", ALL),
    "pattern": (["*.lan:20-30"], "db.lan", ALL),
    "another name": (["nas.lan:22"], "db.lan", set()),
    "a name below": (["*.lan:22"], "a.db.lan", set()),
    "another name, and an address": (["nas.lan:22", "10.0.0.1:22"], "db.lan", {"10.0.0.1"}),
    "another address": (["10.0.0.9:22"], "db.lan", set()),
    "another port": (["db.lan:23", "10.0.0.0/8:23", "*:1-21"], "db.lan", set()),
    "address": (["10.0.0.2:22"], "10.0.0.2", {"10.0.0.2"}),
    "address, mapped": (["10.0.0.2:22"], "::ffff:10.0.0.2", {"::ffff:10.0.0.2"}),
    "address, mapped, in a network": (["10.0.0.0/8:22"], "::ffff:a00:2", {"::ffff:a00:2"}),
    "address, mapped, and IPv6 allowed": (["[::/0]:22"], "::ffff:10.0.0.2", set()),
    "address in brackets": (["[fd00::/8]:22"], "[fd00::1]", {"fd00::1"}),
    "address with a NAT64 prefix": (["10.0.0.0/8:22"], "64:ff9b::10.0.0.2", set()),
    "address, and names allowed": (["db.lan:22", "*.*:22"], "10.0.0.2", set()),
}


@pytest.mark.parametrize("name", DIALS)
def test_only_allowed_addresses_are_dialled_when_rules_are_given(
    machine: Machine, name: str
) -> None:
    """One lookup, whose answers are judged; what is not allowed sees no packet."""
    rules, host, dialled = DIALS[name]
    frame_sender = FrameSender()
    tunnel = make_tunnel(frame_sender, host, 22, *rules)
    tunnel.thread.start()
    tunnel.thread.join(5)
    answer = first_control(frame_sender)
    code = "target_refused" if dialled else "denied_by_client"
    assert (answer["type"], answer["code"]) == ("refused", code)
    assert set(machine.dialled) == dialled
    assert len(machine.dialled) == len(dialled)
    assert machine.lookups == [host.strip("[]")]


@pytest.mark.parametrize("rules", [[], ["*:*"], ["127.0.0.1:22"]], ids=str)
@pytest.mark.parametrize(
    "host", ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "127.0.0.1.", "fe80::1%2", "ä.lan"]
)
def test_lookalike_is_refused_when_it_comes_to_the_client(
    machine: Machine, host: str, rules: list[str]
) -> None:
    """Whatever the server let pass: not even looked up, with rules or without."""
    frame_sender = FrameSender()
    tunnel = make_tunnel(frame_sender, host, 22, *rules)
    tunnel.thread.start()
    tunnel.thread.join(5)
    answer = first_control(frame_sender)
    assert (answer["type"], answer["code"]) == ("refused", "target_invalid")
    assert (machine.lookups, machine.dialled) == ([], [])


@pytest.mark.parametrize("kind", ["address", "name"])
def test_tunnel_opens_when_one_of_the_addresses_is_allowed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With real sockets: the answers that are not allowed do not even slow it down."""
    with EchoTarget() as target:
        addresses = ["192.0.2.1", "192.0.2.2", "127.0.0.1"] if kind == "address" else ["127.0.0.1"]
        lookups = []

        def look_up(name: bytes, port: int, **_: Any) -> list[Any]:
            lookups.append(name.decode())
            return [info(address, port) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        rule = f"127.0.0.1:{target.port}" if kind == "address" else f"db.lan:{target.port}"
        frame_sender = FrameSender()
        tunnel = make_tunnel(frame_sender, "db.lan", target.port, rule)
        tunnel.thread.start()
        assert first_control(frame_sender)["type"] == "opened"
        assert lookups == ["db.lan"]
        target.conversation()
        tunnel.end.on_end(RelayError("user_gone", "gone"))
        tunnel.thread.join(5)
        assert not tunnel.thread.is_alive()


def test_answer_is_judged_once_when_the_resolver_changes_its_mind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DNS rebinding: the address that was judged is the one that is dialled."""
    turns = iter([["10.0.0.2"], ["127.0.0.1"]])
    machine = Machine(monkeypatch)

    def look_up(name: bytes, port: int, **_: Any) -> list[Any]:
        return [info(address, port) for address in next(turns)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    frame_sender = FrameSender()
    tunnel = make_tunnel(frame_sender, "db.lan", 22, "10.0.0.2:22")
    tunnel.thread.start()
    tunnel.thread.join(5)
    assert first_control(frame_sender)["code"] == "target_refused"
    assert machine.dialled == ["10.0.0.2"]
    assert next(turns) == ["127.0.0.1"]


def test_dial_takes_no_lookup_slot_when_a_name_is_denied(machine: Machine) -> None:
    """Denied names give back what they took: more of them than there are slots."""
    for _ in range(40):
        frame_sender = FrameSender()
        tunnel = make_tunnel(frame_sender, "db.lan", 22, "10.0.0.9:22")
        tunnel.thread.start()
        tunnel.thread.join(5)
        assert first_control(frame_sender)["code"] == "denied_by_client"
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "lookup:db.lan"])


# The settings.

GOOD = ["--client-name", "lab-1", "--client-secret", "s3cret"]
VARIABLE = "HTTP_NETWORK_RELAY_ALLOW"


@pytest.mark.parametrize(
    ("flags", "value", "expected"),
    [
        ([], None, []),
        (["127.0.0.1:22"], None, ["127.0.0.1:22"]),
        (["127.0.0.1:22", "db.lan:*"], None, ["127.0.0.1:22", "db.lan:*"]),
        ([], "127.0.0.1:22", ["127.0.0.1:22"]),
        ([], " 127.0.0.1:22  [fd00::/8]:1-9 ", ["127.0.0.1:22", "[fd00::/8]:1-9"]),
        # The flag replaces the variable, as everywhere: it adds nothing to it.
        (["127.0.0.1:22"], "*:*", ["127.0.0.1:22"]),
        (["127.0.0.1:22"], "", ["127.0.0.1:22"]),
    ],
)
def test_rules_are_read_when_flag_or_variable_gives_them(
    flags: list[str], value: str | None, expected: list[str]
) -> None:
    """In their order; none at all means that whatever is asked is dialled."""
    argv = [*GOOD, *(word for text in flags for word in ("--allow", text))]
    config = read_config(argv, {} if value is None else {VARIABLE: value})
    assert [rule.text for rule in config.allow] == expected


@pytest.mark.parametrize("way", ["flag", "variable"])
@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.1:22", "127.*:22", ":22", "db.lan:0", "10.0.0.1/8:22", "fd00::1:22", "DB:1"],
)
def test_rule_is_a_usage_error_when_it_is_bad(text: str, way: str) -> None:
    """One sentence that names flag, variable and the rule; a good one beside it is no help."""
    words = ["127.0.0.1:22", text]
    argv = [*GOOD, "--allow", words[0], "--allow", words[1]] if way == "flag" else GOOD
    environ = {VARIABLE: " ".join(words)} if way == "variable" else {}
    with pytest.raises(RelayError) as caught:
        read_config(argv, environ)
    assert (caught.value.code, caught.value.exit_code) == ("usage", 2)
    sentence = str(caught.value)
    assert "--allow" in sentence
    assert VARIABLE in sentence
    assert "\n" not in sentence


def test_empty_flag_is_a_usage_error_when_it_is_given() -> None:
    """An unset shell variable must not mean that everything may be dialled."""
    with pytest.raises(RelayError) as caught:
        read_config([*GOOD, "--allow", ""], {VARIABLE: "127.0.0.1:22"})
    assert caught.value.code == "usage"


@pytest.mark.parametrize("value", ["", "  ", "\t\n"])
def test_empty_variable_is_a_usage_error_when_it_is_set(value: str) -> None:
    """As an empty flag is; the variable has to be unset to dial anything."""
    with pytest.raises(RelayError, match=r"HTTP_NETWORK_RELAY_ALLOW .*unset") as caught:
        read_config(GOOD, {VARIABLE: value})
    assert (caught.value.code, caught.value.exit_code) == ("usage", 2)
