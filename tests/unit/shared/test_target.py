"""Targets and rules: what is an address, and that each kind of rule matches its own kind."""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from http_network_relay.rules.target import AccessRule, RuleError, TargetRule, canonical_host

HOSTS = {
    "127.0.0.1": IPv4Address("127.0.0.1"),
    "0.0.0.0": IPv4Address("0.0.0.0"),
    "::1": IPv6Address("::1"),
    "[::1]": IPv6Address("::1"),
    "2001:DB8:0::5": IPv6Address("2001:db8::5"),
    "::ffff:10.0.0.1": IPv4Address("10.0.0.1"),
    "::FFFF:a00:1": IPv4Address("10.0.0.1"),
    "64:ff9b::10.0.0.1": IPv6Address("64:ff9b::a00:1"),  # NAT64: leads where a gateway says.
    "2002:a00:1::": IPv6Address("2002:a00:1::"),
    "::10.0.0.1": IPv6Address("::a00:1"),
    "localhost": "localhost",
    "DB.Lan.": "db.lan",
    "a_b.lan": "a_b.lan",
    "xn--mller-kva.example": "xn--mller-kva.example",
    "10.0.0.1.nip.io": "10.0.0.1.nip.io",
    "1.2.3.4a": "1.2.3.4a",
    "0xlab": "0xlab",
}


@pytest.mark.parametrize(("text", "host"), HOSTS.items(), ids=HOSTS)
def test_host_is_canonical(text: str, host: object) -> None:
    """One address or name has one form."""
    assert canonical_host(text) == host


LOOKALIKES = ["127.1", "127.0.1", "0x7f000001", "2130706433", "0177.0.0.1", "1.2.3.4.", "0x7f.1"]
LOOKALIKES += ["127.0.0.01", "0X7F.0.0.1", "0", "00", "0x", "1.2.3.0x4", "256.256.256.256"]
LOOKALIKES += ["1.2.3", "1.2.3.4.5", "999", "lab.1", "lab.0x1f", "010.0.0.1", "0x7f000001."]
NO_HOSTS = ["", ".", "..", "a..b", ".lan", "lan..", "-a", "a-", "a b", "a\n", "a/b", "a:b", "ä.lan"]
NO_HOSTS += [
    "*",
    "*.lan",
    "a@b",
    "fe80::1%eth0",
    "[fe80::1%1]",
    "[10.0.0.1]",
    "[lan]",
    "[]",
    "[::1",
]
NO_HOSTS += [":", "::1::", "1::2::3", "12345::", "::ffff:127.1", "::ffff:0177.0.0.1", "a" * 64]
NO_HOSTS += [".".join(["a" * 60] * 5), "\u0661.2.3.4", "\u212a.lan", "a\0b"]


@pytest.mark.parametrize("text", LOOKALIKES + NO_HOSTS)
def test_host_is_refused_when_it_is_none_or_only_looks_like_an_address(text: str) -> None:
    """What a resolver could read in another way than we do is no host, and says so in a line."""
    with pytest.raises(RuleError) as caught:
        canonical_host(text)

    assert "\n" not in str(caught.value)


NUMBER = st.one_of(
    st.integers(0, 2**33).map(str),
    st.integers(0, 300).map(str),
    st.integers(0, 2**33).map(hex),
    st.integers(0, 2**33).map(lambda n: f"0{n:o}"),
    st.integers(0, 300).map(lambda n: f"{n:04d}"),
)
ADDRESS_LIKE = st.one_of(
    st.builds(
        lambda parts, end, upper: (
            (".".join(parts) + end).upper() if upper else ".".join(parts) + end
        ),
        st.lists(NUMBER, min_size=1, max_size=5),
        st.sampled_from(["", "", "."]),
        st.booleans(),
    ),
    st.text("0123456789abcdefxX.:-", max_size=20),
    st.ip_addresses().map(str),
)


def numeric_addresses(text: str) -> list[str]:
    """What getaddrinfo() takes the text for without asking anybody."""
    try:
        infos = socket.getaddrinfo(text, 1, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []
    return [str(info[4][0]) for info in infos]


@settings(deadline=None)
@given(ADDRESS_LIKE)
@example("127.1")
@example("0x7f.1")
@example("1.2.3.4.")
def test_what_the_system_takes_for_an_address_is_that_address_or_refused(text: str) -> None:
    """inet_aton() and getaddrinfo() never see an address where we see a name or another one."""
    try:
        found = canonical_host(text)
    except RuleError:
        return

    try:
        packed = socket.inet_aton(text)
    except OSError:
        pass
    else:
        assert isinstance(found, IPv4Address)
        assert found.packed == packed
        assert str(found) == text
    taken_for = numeric_addresses(text)
    assert bool(taken_for) == (not isinstance(found, str))
    for address in taken_for:
        assert canonical_host(address) == found


@settings(deadline=None)
@given(ADDRESS_LIKE | st.sampled_from([*HOSTS, *NO_HOSTS]) | st.text(max_size=12))
def test_canonical_host_is_its_own_canonical_form(text: str) -> None:
    """Asking twice changes nothing, so it does not matter who asks first."""
    try:
        found = canonical_host(text)
    except RuleError:
        return
    assert canonical_host(str(found)) == found


GOOD_RULES = {
    # rule -> what it allows, what it does not
    "127.0.0.1:22": (
        ["127.0.0.1:22", "::ffff:127.0.0.1:22"],
        ["127.0.0.1:23", "127.0.0.2:22", "localhost:22", "127.1:22", "::1:22"],
    ),
    "[::ffff:10.0.0.1]:22": (["10.0.0.1:22", "::ffff:a00:1:22"], ["64:ff9b::a00:1:22"]),
    "[2001:DB8::1]:*": (["2001:db8::1:1", "2001:db8:0::1:65535"], ["2001:db8::2:1"]),
    "10.0.0.0/8:5432": (
        ["10.0.0.0:5432", "10.255.255.255:5432", "::ffff:10.1.2.3:5432"],
        ["11.0.0.0:5432", "db.lan:5432", "10.1:5432", "10.0.0.1.:5432"],
    ),
    "0.0.0.0/0:22": (["1.2.3.4:22", "127.0.0.1:22"], ["::1:22", "lan:22"]),
    "[::/0]:22": (["::1:22"], ["1.2.3.4:22", "::ffff:1.2.3.4:22", "lan:22"]),
    "[::ffff:10.0.0.0/104]:22": (["10.9.9.9:22"], ["11.0.0.0:22", "::a00:1:22"]),
    "db.lan:5432": (["db.lan:5432", "DB.LAN.:5432"], ["db.lan.evil:5432", "xdb.lan:5432"]),
    "*.lan:443": (["a.lan:443", "A.lan:443"], ["lan:443", "a.b.lan:443", "10.0.0.1:443"]),
    "db-*.*.lan:443": (["db-1.x.lan:443", "db-x.y.lan:443"], ["db-1.lan:443", "db-1.a.b.lan:443"]),
    "*a*b*:1": (["ab:1", "xaxbx:1", "aab:1"], ["ba:1", "a.b:1"]),
    "*.*:1": (["a.b:1"], ["1.2:1", "a:1"]),
    "lab:8000-8010": (["lab:8000", "lab:8010"], ["lab:7999", "lab:8011"]),
    "*:22": (["a.b.c:22", "10.0.0.1:22", "::1:22"], ["a:23", "127.1:22", "a b:22"]),
    "*:*": (["a:1", "10.0.0.1:65535"], ["a:0", "a:65536", "0x7f000001:1"]),
}


@pytest.mark.parametrize("text", GOOD_RULES)
def test_rule_matches_what_it_says_and_nothing_else(text: str) -> None:
    """Each rule with targets inside and outside."""
    rule = TargetRule.parse(text)
    allowed, denied = GOOD_RULES[text]

    for targets, expected in ((allowed, True), (denied, False)):
        for target in targets:
            host, _, port = target.rpartition(":")
            assert rule.matches(host, int(port)) is expected, target


BAD_RULES = {
    # rule -> a piece of the fix
    "": "no port",
    "lan": "no port",
    ":22": "no port",
    "[::1]": "no port",
    "10.0.0.0/8": "no port",
    "lan:": "1 to 65535",
    "lan:0": "1 to 65535",
    "lan:022": "1 to 65535",
    "lan:65536": "1 to 65535",
    "lan:5-4": "8000-8010",
    "lan:1-65536": "8000-8010",
    "lan:0-5": "8000-8010",
    "lan:-5": "8000-8010",
    "lan:22,23": "8000-8010",
    "lan:ssh": "1 to 65535",
    "lan:\u0662\u0662": "1 to 65535",
    "::1:22": "in brackets",
    "fd00::*:22": "in brackets",
    "[::1:22": "no closing bracket",
    "[fe80::1%eth0]:22": "scope",
    "[10.0.0.1]:22": "not an IPv6 address",
    "[fd00::*]:22": "not an IPv6 address",
    "10.0.0.1/8:22": "write 10.0.0.0/8",
    "[fd00::1/8]:22": "write [fd00::/8]",
    "fd00::/8:22": "write '[fd00::/8]'",
    "[fd00::]/8:22": "write '[fd00::/8]'",
    "[10.0.0.0/8]:22": "write '10.0.0.0/8'",
    "10.0.0.0/33:22": "/0 to /32",
    "10.0.0.0/:22": "/0 to /32",
    "10.0.0.0/08:22": "/0 to /32",
    "10.0.0.0/255.0.0.0:22": "/0 to /32",
    "[fd00::/129]:22": "/0 to /128",
    "10/8:22": "10.0.0.0/8",
    "10.*/8:22": "10.0.0.0/8",
    "lan/8:22": "10.0.0.0/8",
    "[fe80::%eth0/64]:22": "no address",
    "DB.lan:22": "write 'db.lan'",
    "db.lan.:22": "write 'db.lan'",
    "*.LAN:22": "write '*.lan'",
    "*.lan.:22": "write '*.lan'",
    "127.1:22": "four numbers",
    "0x7f000001:22": "four numbers",
    "1.2.3.4.:22": "four numbers",
    "127.*:22": "127.0.0.0/8",
    "10.0.*.*:22": "127.0.0.0/8",
    "*.0.0.1:22": "127.0.0.0/8",
    "192*:22": "127.0.0.0/8",
    "0x*:22": "127.0.0.0/8",
    "*.1:22": "127.0.0.0/8",
    "**.lan:22": "no more than *",
    "*..lan:22": "no host name",
    "-*:22": "no host name",
    "*-:22": "no host name",
    "* .lan:22": "no host name",
    "*@lan:22": "no host name",
    f"{'a' * 64}*:22": "no host name",
    f"{'.'.join(['a' * 60] * 5)}.*:22": "too long",
    "a b:22": "neither an address nor a host name",
}


@pytest.mark.parametrize("text", BAD_RULES)
def test_rule_is_an_error_when_it_cannot_match_what_it_seems_to(text: str) -> None:
    """The error is one line with the fix; the same after a client's name."""
    with pytest.raises(RuleError) as caught:
        TargetRule.parse(text)
    assert BAD_RULES[text] in str(caught.value)
    assert "\n" not in str(caught.value)

    with pytest.raises(RuleError):
        AccessRule.parse(f"lab:{text}")


LABEL = st.from_regex(r"[a-z]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
ADDRESSES = st.ip_addresses()
PATTERNS = st.lists(
    st.from_regex(r"[a-z]([a-z0-9-]{0,4}[a-z0-9])?\*?|\*", fullmatch=True), min_size=1, max_size=4
).map(".".join)


def written(address: object) -> str:
    return f"[{address}]" if ":" in str(address) else str(address)


@st.composite
def networks(draw: st.DrawFn) -> str:
    address = draw(ADDRESSES)
    bits = draw(st.integers(0, address.max_prefixlen))
    return written(ipaddress.ip_network((address, bits), strict=False))


@settings(deadline=None)
@given(ADDRESSES.map(written) | networks(), NAMES, st.integers(1, 65535))
def test_rule_of_addresses_never_matches_a_name(host: str, name: str, port: int) -> None:
    """Whatever a name resolves to at the server, nobody asks there."""
    rule = TargetRule.parse(f"{host}:*")
    assert not rule.matches(name, port)
    assert not rule.allows_asked(name, port)
    assert not rule.allows_address(name, port)
    assert not rule.is_name


@settings(deadline=None)
@given(PATTERNS.filter(lambda text: text != "*"), ADDRESSES, st.integers(1, 65535))
def test_rule_of_names_never_matches_an_address(
    pattern: str, address: IPv4Address | IPv6Address, port: int
) -> None:
    """Neither one that is asked for nor one that is dialled."""
    rule = TargetRule.parse(f"{pattern}:*")
    assert rule.is_name
    for form in (address, str(address), written(address)):
        assert not rule.matches(form, port)
        assert not rule.allows_asked(form, port)
        assert not rule.allows_address(form, port)


@settings(deadline=None)
@given(ADDRESSES, ADDRESSES)
def test_rule_of_one_address_matches_no_other(
    one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address
) -> None:
    """Only its own, in whatever form."""
    rule = TargetRule.parse(f"{written(one)}:22")
    assert rule.matches(one, 22)
    assert rule.matches(str(one), 22)
    assert rule.allows_address(one, 22)
    assert rule.matches(other, 22) == (canonical_host(str(one)) == canonical_host(str(other)))


@settings(deadline=None)
@given(networks(), ADDRESSES)
def test_rule_of_a_network_matches_its_addresses_only(
    network: str, address: IPv4Address | IPv6Address
) -> None:
    """As the standard library's networks do, IPv4 out of its mapped form."""
    rule = TargetRule.parse(f"{network}:22")
    folded = canonical_host(str(address))
    assert rule.allows_address(str(address), 22) == rule.matches(address, 22)
    whole = ipaddress.ip_network(network.strip("[]"))
    if not isinstance(whole.network_address, IPv6Address) or not whole.network_address.ipv4_mapped:
        assert rule.matches(address, 22) == (folded in whole)


@settings(deadline=None)
@given(NAMES, PATTERNS)
def test_star_stays_within_its_label(name: str, pattern: str) -> None:
    """A match has the same number of labels, each beginning as its pattern does."""
    if pattern != "*" and TargetRule.parse(f"{pattern}:22").matches(name, 22):
        labels, patterns = name.split("."), pattern.split(".")
        assert len(labels) == len(patterns)
        for label, part in zip(labels, patterns, strict=True):
            assert label.startswith(part.rstrip("*"))


def test_client_asks_the_name_then_the_address() -> None:
    """A name rule allows by what was asked, an address rule by what is dialled."""
    by_name, by_network = TargetRule.parse("*.lan:22"), TargetRule.parse("10.0.0.0/8:22")

    assert by_name.allows_asked("db.lan", 22)
    assert not by_name.allows_address("10.0.0.1", 22)
    assert not by_network.allows_asked("10.0.0.1", 22)
    assert by_network.allows_address("10.0.0.1", 22)
    assert by_network.allows_address("::ffff:10.0.0.1", 22)
    assert not by_network.allows_address("10.0.0.1", 23)
    assert not by_network.allows_address("10.1", 22)
    assert not by_network.allows_address("db.lan", 22)
    # getaddrinfo() gives the scope of a link-local address with it.
    assert TargetRule.parse("[fe80::/10]:22").allows_address("fe80::1%eth0", 22)
    assert TargetRule.parse("[fe80::1]:22").allows_address(IPv6Address("fe80::1%2"), 22)
    everything = TargetRule.parse("*:*")
    assert everything.allows_asked("db.lan", 1)
    assert everything.allows_address("10.0.0.1", 1)
    assert everything.is_everything
    assert not TargetRule.parse("*:22").is_everything


def test_access_rule_names_clients_by_a_pattern() -> None:
    """The star of a client's name stands for anything, case counts."""
    rule = AccessRule.parse("lab-*:10.0.0.0/8:5432")

    assert rule.text == "lab-*:10.0.0.0/8:5432"
    assert rule.matches("lab-1", "10.1.2.3", 5432)
    assert rule.matches("lab-", "10.1.2.3", 5432)
    assert rule.matches("lab-a.b", "10.1.2.3", 5432)
    assert not rule.matches("lab", "10.1.2.3", 5432)
    assert not rule.matches("Lab-1", "10.1.2.3", 5432)
    assert not rule.matches("xlab-1", "10.1.2.3", 5432)
    assert not rule.matches("lab-1", "11.1.2.3", 5432)
    assert AccessRule.parse("gw:[::1]:22").matches("gw", "::1", 22)
    assert AccessRule.parse("*:*:*").is_everything
    assert not AccessRule.parse("g*:*:*").is_everything
    assert AccessRule.parse("a*b*c:*:*").matches_client("axxbxxc")
    assert not AccessRule.parse("ab*bc:*:*").matches_client("abc")


@pytest.mark.parametrize("text", ["", "lab", "lab:22", ":lan:22", "a b:lan:22", "lab-**:lan:22"])
def test_access_rule_is_an_error_when_its_client_is_none(text: str) -> None:
    """A forgotten part, or a name that no client can have."""
    with pytest.raises(RuleError):
        AccessRule.parse(text)


def test_rules_are_equal_when_they_say_the_same() -> None:
    """Other spellings of one rule are found out."""
    assert AccessRule.parse("a:10.0.0.1:22") == AccessRule.parse("a:[::ffff:10.0.0.1]:22-22")
    assert TargetRule.parse("*:*") == TargetRule.parse("*:1-65535")
    assert AccessRule.parse("a:10.0.0.1:22") != AccessRule.parse("b:10.0.0.1:22")
    assert TargetRule.parse("10.0.0.1:22") == TargetRule.parse("10.0.0.1/32:22")
    assert TargetRule.parse("[::ffff:a00:1/128]:22") == TargetRule.parse("10.0.0.1:22")
    assert TargetRule.parse("[fd00::1/128]:22") == TargetRule.parse("[fd00::1]:22")
    assert TargetRule.parse("10.0.0.0:22") != TargetRule.parse("10.0.0.0/31:22")
