"""Targets, and the rules that allow targets (docs/access.md). No I/O.

The server judges the host as the user asked for it, the client also the address to dial.
Rules only allow: a target that no rule matches is denied. In doubt, a rule does not match.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Union

from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import matches

Address = Union[IPv4Address, IPv6Address]
Network = Union[IPv4Network, IPv6Network]
# For isinstance(), which takes no Union on Python 3.9.
ADDRESSES = (IPv4Address, IPv6Address)
NETWORKS = (IPv4Network, IPv6Network)
# The hosts of a rule, see TargetRule, and its ports, both ends included.
Hosts = Union[Address, Network, str, None]
Ports = tuple[int, int]
# A canonical host: an address, or a name in lower case without a dot at its end.
Host = Union[Address, str]

_MAX_NAME_CHARS = 253  # RFC 1035, 2.3.4, without the root's dot and length
_MAX_LABEL_CHARS = 63
_ADDRESS_CHARS = r"[0-9A-Fa-f:.]{1,64}"
# No RFC allows the underscore in host names, and many LANs have it.
_LABEL = r"(?!-)[a-z0-9_-]+(?<!-)"
_LABEL_PATTERN = r"(?!-)[a-z0-9_*-]+(?<!-)"
# inet_aton() takes `127.1`, `0x7f000001`, `2130706433` and `0177.1` for addresses, and
# getaddrinfo() asks it. All its forms end in a number, and no name in the DNS does.
_NUMBER = r"[0-9]+|0x[0-9a-f]*"
_NUMBERS_WITH_STARS = r"[0-9*]+|0x[0-9a-f*]*"
_PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")
_HIGHEST_PORT = 65535
_TARGET_FORM = "HOST:PORT, NETWORK/BITS:PORT or [IPV6]:PORT"


class RuleError(ValueError):
    """A malformed host or rule; the message gives the right form."""


def canonical_host(text: str) -> Host:
    """Return the address or the name of `text`. Raises RuleError.

    Addresses are strict literals. A mapped one (`::ffff:10.0.0.1`) becomes the IPv4 address,
    since the system dials that. Other IPv6 addresses that hold an IPv4 address (NAT64, 6to4)
    stay IPv6: a gateway elsewhere decides where they lead.
    """
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in inner:
        return _fold(_ipv6(inner))
    if inner != text:
        raise RuleError(f"{_quote(text)}: only an IPv6 address stands in brackets")
    if matches(_ADDRESS_CHARS, text):
        try:
            return IPv4Address(text)
        except ValueError:
            pass  # A name, or a text that only looks like an address.
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if not text.isascii() or not all(matches(_LABEL, label) for label in labels):
        raise RuleError(
            f"{_quote(text)} is neither an address nor a host name; a name has letters, "
            "digits, hyphens and dots (write others in their xn-- form)"
        )
    if len(name) > _MAX_NAME_CHARS or any(len(label) > _MAX_LABEL_CHARS for label in labels):
        raise RuleError(f"{_quote(text)} is too long for a host name")
    if matches(_NUMBER, labels[-1]):
        raise RuleError(
            f"{_quote(text)} could be taken for an address; write all four numbers, decimal "
            "and without leading zeros, such as 127.0.0.1"
        )
    return name


def _ipv6(text: str) -> IPv6Address:
    if "%" in text:
        raise RuleError(f"{_quote(text)}: an address with a scope (%) is not taken; leave it out")
    try:
        if matches(_ADDRESS_CHARS, text):
            return IPv6Address(text)
    except ValueError:
        pass
    raise RuleError(f"{_quote(text)} is not an IPv6 address; write it as in 2001:db8::1")


def _fold(address: Address) -> Address:
    """Return the address to dial: a mapped one as IPv4, any other without its scope."""
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def _quote(text: str) -> str:
    """Return a text of a peer or a file for a message: short, on one line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def is_glob_match(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern` with any characters, or none, for each `*`. No backtracking."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    last = rest.pop()
    if not text.startswith(first) or len(text) < len(first) + len(last):
        return False
    if not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in rest:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


@dataclass(frozen=True)
class TargetRule:
    """Hosts of one kind, and ports. Rules with equal hosts and ports are equal.

    `what` tells the kind. An address or a network matches addresses, a str matches names
    label by label, None (`*`) matches any host.
    """

    what: Hosts
    lowest_port: int
    highest_port: int
    text: str = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> TargetRule:
        """Read `HOST:PORT`. Raises RuleError."""
        host, colon, ports = text.rpartition(":")
        if not colon or not host or ports.endswith("]"):
            raise RuleError(
                f"{_quote(text)} has no port; write {_TARGET_FORM}, "
                "where PORT is 22, 8000-8010 or * for all"
            )
        return cls(_parse_what(host), *_parse_ports(ports), text)

    @property
    def is_name(self) -> bool:
        """Whether the rule matches names, and so trusts the resolver of the names."""
        return isinstance(self.what, str)

    @property
    def is_everything(self) -> bool:
        """Whether the rule matches every target."""
        return self.what is None and self.ports == (1, _HIGHEST_PORT)

    @property
    def ports(self) -> Ports:
        """The lowest and the highest port."""
        return self.lowest_port, self.highest_port

    def matches(self, host: Host, port: int) -> bool:
        """Whether the rule allows the target as the user asked for it: the server's check."""
        host = _canonical_or_empty(host)
        if isinstance(host, str):
            return self.allows_asked(host, port)
        return self.allows_address(host, port)

    def allows_asked(self, host: Host, port: int) -> bool:
        """Whether the rule allows the host by its name, whatever address the name has.

        The client's first check, before the name lookup.
        """
        host = _canonical_or_empty(host)
        if host == "" or not self.lowest_port <= port <= self.highest_port:
            return False
        if isinstance(self.what, str) and isinstance(host, str):
            labels, patterns = host.split("."), self.what.split(".")
            # A star stays within its label: `*.lan` is not `a.b.lan`.
            return len(labels) == len(patterns) and all(map(is_glob_match, patterns, labels))
        return self.what is None

    def allows_address(self, address: Address | str, port: int) -> bool:
        """Whether the rule allows an address: the client's second check, before a dial.

        `address` may be a text from getaddrinfo(); no other text than a strict literal matches.
        """
        if isinstance(address, str):
            found = _canonical_or_empty(address.partition("%")[0])
            if isinstance(found, str):
                return False
            address = found
        address = _fold(address)
        if not self.lowest_port <= port <= self.highest_port:
            return False
        if isinstance(self.what, NETWORKS):
            return address in self.what
        return self.what is None or self.what == address


def _canonical_or_empty(host: Host) -> Host:
    """Return the canonical host; "", which no rule matches, for a text that is no host."""
    if not isinstance(host, str):
        return _fold(host)
    try:
        return canonical_host(host)
    except RuleError:
        return ""


def _parse_ports(text: str) -> Ports:
    if text == "*":
        return 1, _HIGHEST_PORT
    found = _PORTS.fullmatch(text)
    low = int(found[1]) if found else 0
    high = int(found[2] or low) if found else 0
    if not 1 <= low <= high <= _HIGHEST_PORT:
        raise RuleError(
            f"the port {_quote(text)} is none; write a number from 1 to {_HIGHEST_PORT}, "
            "a range such as 8000-8010, or * for all"
        )
    return low, high


def _parse_what(text: str) -> Hosts:
    if text == "*":
        return None
    if "/" in text:
        return _parse_network(text)
    if text.startswith("["):
        if not text.endswith("]"):
            raise RuleError(f"{_quote(text)} has no closing bracket")
        return _fold(_ipv6(text[1:-1]))
    if ":" in text:
        raise RuleError(f"{_quote(text)}: write an IPv6 address in brackets, such as [2001:db8::1]")
    if "*" in text:
        return _parse_pattern(text)
    host = canonical_host(text)
    if isinstance(host, str) and host != text:
        raise RuleError(f"{_quote(text)} can never match; write {_quote(host)}")
    return host


def _parse_network(text: str) -> Network | Address:
    is_bracketed = text.startswith("[") and text.endswith("]")
    inner = text[1:-1] if is_bracketed else text
    base, _, bits = inner.partition("/")
    is_ipv6 = ":" in base
    if is_ipv6 != is_bracketed:
        inner = inner.translate(str.maketrans("", "", "[]"))
        form = f"[{inner}]" if is_ipv6 else inner
        raise RuleError(f"the network {_quote(text)} is not well written; write {_quote(form)}")
    width = 128 if is_ipv6 else 32
    if not matches(r"0|[1-9][0-9]{0,2}", bits) or int(bits) > width:
        raise RuleError(f"the network {_quote(text)} needs /0 to /{width} after its address")
    try:
        address = IPv6Address(base) if is_ipv6 and "%" not in base else IPv4Address(base)
    except ValueError:
        raise RuleError(
            f"the network {_quote(text)} has no address before its /; write 10.0.0.0/8 or "
            "[fd00::/8]"
        ) from None
    return _strict_network(text, address, int(bits))


def _strict_network(text: str, address: Address, bits: int) -> Network | Address:
    whole: Network
    if isinstance(address, IPv4Address):
        whole = IPv4Network((address, bits), strict=False)
    else:
        whole = IPv6Network((address, bits), strict=False)
    if whole.network_address != address:
        form = f"[{whole}]" if whole.version == 6 else str(whole)
        raise RuleError(f"the network {_quote(text)} has bits set after its /; write {form}")
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    if mapped is not None and bits >= 96:
        # Mapped addresses are compared as IPv4.
        whole = IPv4Network((mapped, bits - 96))
    return whole if whole.num_addresses > 1 else whole.network_address


def _parse_pattern(text: str) -> str:
    if text != text.lower() or text.endswith("."):
        form = text.lower().rstrip(".")
        raise RuleError(f"the pattern {_quote(text)} can never match; write {_quote(form)}")
    if "**" in text:
        raise RuleError(f"the pattern {_quote(text)}: ** says no more than *; write one")
    labels = text.split(".")
    for label in labels:
        if not matches(_LABEL_PATTERN, label) or len(label.replace("*", "")) > _MAX_LABEL_CHARS:
            raise RuleError(
                f"the pattern {_quote(text)} can match no host name; a name has letters, "
                "digits, hyphens and dots"
            )
    is_numeric = all(matches(_NUMBERS_WITH_STARS, label) for label in labels)
    looks_like_address = is_numeric and re.search("[0-9]", text) and re.search(r"^[0-9]|\.", text)
    if looks_like_address or matches(_NUMBER, labels[-1]):
        raise RuleError(
            f"the pattern {_quote(text)} looks like an address, and patterns match names only; "
            "write a network such as 127.0.0.0/8"
        )
    if len(text.replace("*", "")) > _MAX_NAME_CHARS:
        raise RuleError(f"the pattern {_quote(text)} is too long for a host name")
    return text


@dataclass(frozen=True)
class AccessRule:
    """Clients by a name pattern, and targets to reach through them."""

    client: str
    target: TargetRule
    text: str = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> AccessRule:
        """Read `CLIENT:HOST:PORT`. Raises RuleError."""
        client, colon, target = text.partition(":")
        if not colon or ":" not in target:
            # The message omits the text, which may be a secret in the wrong place.
            raise RuleError(f"a rule is CLIENT:TARGET, where TARGET is {_TARGET_FORM}")
        if not matches(NAME_PATTERN, client):
            raise RuleError(
                f"{_quote(client)} is no client's name; write 1 to 128 printable ASCII "
                "characters without spaces, with * for any"
            )
        if "**" in client:
            raise RuleError(f"the client {_quote(client)}: ** says no more than *; write one")
        return cls(client, TargetRule.parse(target), text)

    @property
    def is_everything(self) -> bool:
        """Whether the rule matches every target of every client."""
        return self.client == "*" and self.target.is_everything

    def matches_client(self, name: str) -> bool:
        """Whether the rule concerns this client; `*` is any characters."""
        return is_glob_match(self.client, name)

    def matches(self, client: str, host: Host, port: int) -> bool:
        """Whether the rule allows this target of this client, as the user asked for it."""
        return self.matches_client(client) and self.target.matches(host, port)
