"""Rules that have no effect beside others: all are found, and none that has one."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import http_network_relay.rules.shadowed
from client.config import read_config
from http_network_relay.rules.shadowed import (
    find_shadowed,
    includes_hosts,
    includes_name,
    includes_ports,
)
from http_network_relay.rules.target import AccessRule
from http_network_relay.wire.errors import RelayError

# Few and small parts, so that rules and targets often meet.
LABEL = st.text("ab*", min_size=1, max_size=3).filter(lambda text: "**" not in text)
PATTERNS = st.lists(LABEL, min_size=1, max_size=2).map(".".join)
ADDRESSES = st.sampled_from(["10.0.0.0", "10.0.0.1", "10.0.0.2", "::", "::1", "::ffff:a00:1"])
IPV4 = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.0/32"]
IPV6 = ["[::/0]", "[::/64]", "[::/127]", "[::/128]", "[::fffe:0:0/95]"]
MAPPED = ["[::ffff:a00:0/104]", "[::ffff:a00:0/127]", "[::ffff:a00:0/128]"]
NETWORKS = st.sampled_from(IPV4 + IPV6 + MAPPED)
HOSTS = PATTERNS | NETWORKS | ADDRESSES.map(lambda text: f"[{text}]" if ":" in text else text)
PORTS = st.sampled_from(["1", "2", "3", "1-2", "2-3", "1-3", "*"])
CLIENTS = st.text("ab*", min_size=1, max_size=3).filter(lambda text: "**" not in text)
RULES = st.builds(lambda *parts: AccessRule.parse(":".join(parts)), CLIENTS, HOSTS, PORTS)
# What a star may stand for, in a rule or in what is asked.
NAMES = st.text("abc", min_size=1, max_size=4)
ASKED = st.lists(NAMES, min_size=1, max_size=2).map(".".join) | ADDRESSES


def includes(wide: AccessRule, narrow: AccessRule) -> bool:
    """Whether each part of the wide rule includes that of the narrow one."""
    one, other = wide.target, narrow.target
    is_included = includes_hosts(one.what, other.what) and includes_ports(one.ports, other.ports)
    return includes_name(wide.client, narrow.client) and is_included


@settings(deadline=None, max_examples=300)
@given(RULES, RULES, st.lists(st.tuples(NAMES, ASKED, st.integers(1, 4)), max_size=30))
@example(AccessRule.parse("*:*:*"), AccessRule.parse("a:10.0.0.1:1"), [("a", "10.0.0.1", 1)])
def test_rule_allows_all_that_a_rule_it_includes_allows(
    wide: AccessRule, narrow: AccessRule, targets: list[tuple[str, str, int]]
) -> None:
    """By the server's question and by both of the client's."""
    if not includes(wide, narrow):
        return
    for client_name, host, port in targets:
        if narrow.matches(client_name, host, port):
            assert wide.matches(client_name, host, port)
        if narrow.target.allows_asked(host, port):
            assert wide.target.allows_asked(host, port)
        if narrow.target.allows_address(host, port):
            assert wide.target.allows_address(host, port)


@settings(deadline=None)
@given(st.lists(RULES, max_size=6))
def test_shadowed_rule_is_found_when_there_is_one(rules: list[AccessRule]) -> None:
    """The same answer as that of comparing each with each."""
    pairs = [
        (place, other)
        for place, narrow in enumerate(rules)
        for other, wide in enumerate(rules)
        if place != other and includes(wide, narrow)
    ]
    found = find_shadowed(rules)
    assert found in pairs if pairs else found is None


WIDER = {
    # the narrower one -> the wider one
    "127.0.0.1/32:22": "127.0.0.1:22",
    "127.0.0.1:22": "127.0.0.0/8:22",
    "10.1.0.0/16:22": "10.0.0.0/8:20-30",
    "[fd00::1]:22": "[fd00::/8]:*",
    "[::ffff:10.0.0.1]:22": "10.0.0.0/8:22",
    "db.lan:22": "*.lan:22",
    "db-*.lan:22": "d*.lan:22",
    "nas.lan:80": "*:80",
    "*:80": "*:*",
    "lab:8000-8005": "lab:8000-8010",
}
APART = [
    ("127.0.0.1:22", "127.0.0.0/8:23"),
    ("db.lan:22", "0.0.0.0/0:22"),
    ("10.0.0.1:22", "[::/0]:22"),
    ("a.b.lan:22", "*.lan:22"),
    ("a*.lan:22", "*b.lan:22"),
    ("lab:8000-8010", "lab:8005-8015"),
]


@pytest.mark.parametrize("narrow", WIDER)
def test_rule_is_shadowed_when_the_other_one_surely_allows_as_much(narrow: str) -> None:
    """Each kind, for one client and for patterns of clients."""
    assert includes(AccessRule.parse(f"lab:{WIDER[narrow]}"), AccessRule.parse(f"lab:{narrow}"))
    rules = [AccessRule.parse(f"lab-1:{narrow}"), AccessRule.parse(f"lab-*:{WIDER[narrow]}")]
    assert find_shadowed(rules) == (0, 1)
    assert find_shadowed(rules[::-1]) == (1, 0)
    assert find_shadowed([AccessRule.parse(f"lab-1*:{narrow}"), rules[1]]) == (0, 1)
    other_client = AccessRule.parse(f"gw-*:{WIDER[narrow]}")
    assert find_shadowed([rules[0], other_client]) is None


@pytest.mark.parametrize("pair", APART, ids=str)
def test_rules_stand_together_when_each_allows_something_of_its_own(pair: tuple[str, str]) -> None:
    """Kinds, labels, and ports that only overlap."""
    rules = [AccessRule.parse(f"lab:{text}") for text in pair]
    assert find_shadowed(rules) is None
    assert find_shadowed(rules[::-1]) is None


@pytest.mark.parametrize(
    "form",
    [
        "lab-{0}:127.0.0.1:22",
        "lab-{0}*:127.0.0.1:22",
        "lab:10.{1}.{2}.1:22",
        "lab:10.{1}.{2}.0/24:22",
        "lab:a{0}*.lan:22",
        "lab:127.0.0.1:{0}",
        "lab:127.0.0.1:{0}-{3}",
        "a{0}*:10.{1}.{2}.0/24:{0}-{3}",
    ],
)
def test_work_grows_with_the_rules_when_there_are_many(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Thousands of whatever kind hold up no reload; a star among them is found."""
    asked = 0

    def counting(name: str) -> None:
        real = getattr(http_network_relay.rules.shadowed, name)

        def ask(one: object, other: object) -> bool:
            nonlocal asked
            asked += 1
            return bool(real(one, other))

        monkeypatch.setattr(http_network_relay.rules.shadowed, name, ask)

    for name in ("includes_name", "includes_hosts", "includes_ports"):
        counting(name)
    count = 1000
    texts = [form.format(n, n // 256, n % 256, n + count) for n in range(1, count + 1)]
    rules = [AccessRule.parse(text) for text in texts]
    # Prefixes of numbers include each other: `lab-1*` and `lab-10*`.
    found = find_shadowed(rules)
    assert (found is None) is not re.search(r"\{0\}\*", form)
    assert find_shadowed([*rules, AccessRule.parse("*:*:*")]) is not None
    assert asked <= 2 * 3 * 64 * (count + 1)


@pytest.mark.parametrize("way", ["flag", "variable"])
@pytest.mark.parametrize("narrow", [*WIDER, "10.0.0.1:22"])
def test_client_refuses_a_shadowed_rule(narrow: str, way: str) -> None:
    """As the server does; so is one that stands twice."""
    wide = WIDER.get(narrow, narrow)
    argv = ["--client-name", "lab-1", "--client-secret", "s3cret"]
    environ = {}
    if way == "flag":
        argv += ["--allow", wide, "--allow", narrow]
    else:
        environ = {"HTTP_NETWORK_RELAY_ALLOW": f"{wide} {narrow}"}
    with pytest.raises(RelayError) as caught:
        read_config(argv, environ)
    assert caught.value.exit_code == 2
    assert f"{narrow} has no effect beside {wide}; remove one" in str(caught.value)
