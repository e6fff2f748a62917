"""Whose address counts behind proxies."""

import pytest

from server.addresses import (
    DEFAULT_TRUSTED_PROXIES,
    Networks,
    block_of,
    parse_networks,
    source_address,
)

DEFAULT = parse_networks(DEFAULT_TRUSTED_PROXIES)
NOBODY = Networks((), False)


def inside(text: str) -> Networks:
    return parse_networks(text)


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "source"),
    [
        # Nothing to read.
        ("203.0.113.7", "", DEFAULT, "203.0.113.7"),
        ("127.0.0.1", "", DEFAULT, "127.0.0.1"),
        ("", "", DEFAULT, "unix"),
        (None, "", DEFAULT, "unix"),
        # A stranger may write what they like.
        ("203.0.113.7", "198.51.100.1", DEFAULT, "203.0.113.7"),
        ("127.0.0.1", "198.51.100.1", NOBODY, "127.0.0.1"),
        ("", "198.51.100.1", NOBODY, "unix"),
        # What the trusted proxy has added stands last; what stood there before may be forged.
        ("127.0.0.1", "198.51.100.1", DEFAULT, "198.51.100.1"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.7", DEFAULT, "203.0.113.7"),
        ("127.0.0.1", "127.0.0.1, 203.0.113.7", DEFAULT, "203.0.113.7"),
        ("127.9.9.9", "203.0.113.7", DEFAULT, "203.0.113.7"),
        ("::1", "2001:db8::1", DEFAULT, "2001:db8::1"),
        ("", "203.0.113.7", DEFAULT, "203.0.113.7"),
        # Over several proxies.
        ("127.0.0.1", "203.0.113.7, 10.0.0.9", inside("127.0.0.1,10.0.0.0/8"), "203.0.113.7"),
        ("127.0.0.1", "6.6.6.6,203.0.113.7,10.0.0.9", inside("127.0.0.1 10.0.0.9"), "203.0.113.7"),
        ("127.0.0.1", "203.0.113.7, 10.0.0.9", DEFAULT, "10.0.0.9"),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", inside("10.0.0.0/8"), "10.0.0.2"),
        # Garbage ends the walk where it stands.
        ("127.0.0.1", "203.0.113.7, unknown", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "unknown, 203.0.113.7", DEFAULT, "203.0.113.7"),
        ("127.0.0.1", "203.0.113.7:4711", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "[2001:db8::1]", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "fe80::1%eth0", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7\n", DEFAULT, "203.0.113.7"),
        ("127.0.0.1", "203.0.113.007", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7,", DEFAULT, "127.0.0.1"),
        ("127.0.0.1", "10.0.0.9, x, 10.0.0.8", inside("127.0.0.1,10.0.0.0/8"), "10.0.0.8"),
        # One address in two forms is one address.
        ("::ffff:127.0.0.1", "::ffff:203.0.113.7", DEFAULT, "203.0.113.7"),
        ("::ffff:203.0.113.7", "198.51.100.1", DEFAULT, "203.0.113.7"),
        ("10.1.2.3", "203.0.113.7", inside("::ffff:10.0.0.0/104"), "203.0.113.7"),
        ("::ffff:10.1.2.3", "203.0.113.7", inside("::ffff:10.1.2.3"), "203.0.113.7"),
        ("11.1.2.3", "203.0.113.7", inside("::ffff:10.0.0.0/104"), "11.1.2.3"),
        ("2001:db8::1", "203.0.113.7", inside("::ffff:0:0/96"), "2001:db8::1"),
        ("10.1.2.3", "203.0.113.7", inside("::/0"), "10.1.2.3"),
    ],
)
def test_source_is_the_first_address_from_the_right_that_is_no_trusted_proxy(
    peer: str | None, forwarded: str, trusted: Networks, source: str
) -> None:
    """Nobody chooses the address that they are counted under."""
    assert source_address(peer, forwarded, trusted) == source


@pytest.mark.parametrize("text", ["10.0.0.1/8", "localhost", "10.0.0.0/33", "*", "1.2.3"])
def test_networks_are_refused_when_one_is_none(text: str) -> None:
    """A typo must not open the door, nor be silently without effect."""
    with pytest.raises(ValueError, match=r"\w"):
        parse_networks(f"127.0.0.1, {text}")


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::%1/64"])
def test_networks_are_refused_when_one_has_a_scope(text: str) -> None:
    """It would never match: a peer's address with a scope is not taken for one."""
    with pytest.raises(ValueError, match=f"'{text}' has a scope.*another address"):
        parse_networks(f"127.0.0.1, {text}")


def test_block_is_the_address_or_the_64_bits_of_a_customer() -> None:
    """Who has one IPv6 address has 2^64 of them."""
    assert block_of("203.0.113.7") == "203.0.113.7"
    assert block_of("2001:db8:1:2::5") == block_of("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert block_of("2001:db8:1:3::5") != block_of("2001:db8:1:2::5")
    assert block_of("::ffff:203.0.113.7") == "203.0.113.7"
    assert block_of("unix") == "unix"
