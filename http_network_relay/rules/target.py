"""What a target is, and which targets a rule allows (docs/access.md).

Knows no socket, clock, thread or log. The server judges the host as it was asked for,
the client also the address that it dials. A rule only ever allows: what no rule
matches is denied, so every doubt here ends in "does not match".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import matches

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
# What a rule says of hosts, see TargetRule; and of ports, both ends included.
Hosts = Address | Network | str | None
Ports = tuple[int, int]
# A canonical host: an address, or a name in lower case without a dot at its end.
Host = Address | str

_MAX_NAME_CHARS = 253  # RFC 1035, 2.3.4, without the root's dot and length
_MAX_LABEL_CHARS = 63
_ADDRESS_CHARS = r"[0-9A-Fa-f:.]{1,64}"
# The underscore is in no RFC's host name and in many a LAN's.
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
    """A host or a rule that cannot be meant; the message says how to write it."""


def canonical_host(text: str) -> Host:
    """Return the address or the name that `text` stands for. Raises RuleError.

    An address is a strict literal; one that maps IPv4 (`::ffff:10.0.0.1`) is that IPv4
    address, since the system dials just that. Other IPv6 addresses that carry an IPv4 one
    (NAT64, 6to4) stay what they are: a gateway elsewhere decides where they lead.
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
            pass  # A name, or what only looks like an address.
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
    """Return what is dialled: IPv4 out of its mapped form; no scope, which names no host."""
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def _quote(text: str) -> str:
    """Return a peer's or a file's text for a message: short, on one line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _is_glob_match(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern` with something or nothing for each `*`; no backtracking."""
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
    """Hosts of one kind, and ports. Two rules that allow the same in the same way are equal.

    `what` tells the kind: an address or a network match addresses only, a str matches
    names only, label by label, and None matches all three (`*`).
    """

    what: Hosts
    lowest_port: int
    highest_port: int
    text: str = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> TargetRule:
        """Read `HOST:PORT`; raises RuleError that says how to write it."""
        host, colon, ports = text.rpartition(":")
        if not colon or not host or ports.endswith("]"):
            raise RuleError(
                f"{_quote(text)} has no port; write {_TARGET_FORM}, "
                "where PORT is 22, 8000-8010 or * for all"
            )
        return cls(_parse_what(host), *_parse_ports(ports), text)

    @property
    def is_name(self) -> bool:
        """Whether it matches names, and so trusts the resolver that answers for them."""
        return isinstance(self.what, str)

    @property
    def is_everything(self) -> bool:
        """Whether it matches every target."""
        return self.what is None and self.ports == (1, _HIGHEST_PORT)

    @property
    def ports(self) -> Ports:
        """The lowest and the highest port."""
        return self.lowest_port, self.highest_port

    def covers(self, other: TargetRule) -> bool:
        """Whether it surely allows all that `other` does, asked or dialled."""
        return covers_hosts(self.what, other.what) and covers_ports(self.ports, other.ports)

    def matches(self, host: Host, port: int) -> bool:
        """Whether it allows the target as it was asked for: the server's question."""
        host = _canonical_or_empty(host)
        if isinstance(host, str):
            return self.allows_asked(host, port)
        return self.allows_address(host, port)

    def allows_asked(self, host: Host, port: int) -> bool:
        """Whether it allows the asked text by its name, whatever address that name has.

        The client's first question, before it looks the name up.
        """
        host = _canonical_or_empty(host)
        if host == "" or not self.lowest_port <= port <= self.highest_port:
            return False
        if isinstance(self.what, str) and isinstance(host, str):
            labels, patterns = host.split("."), self.what.split(".")
            # A star stays within its label: `*.lan` is not `a.b.lan`.
            return len(labels) == len(patterns) and all(map(_is_glob_match, patterns, labels))
        return self.what is None

    def allows_address(self, address: Address | str, port: int) -> bool:
        """Whether it allows this address: the client's second question, of what it dials.

        Takes what getaddrinfo() gives; a text that is no strict literal is not allowed.
        """
        if isinstance(address, str):
            found = _canonical_or_empty(address.partition("%")[0])
            if isinstance(found, str):
                return False
            address = found
        address = _fold(address)
        if not self.lowest_port <= port <= self.highest_port:
            return False
        if isinstance(self.what, (IPv4Network, IPv6Network)):
            return address in self.what
        return self.what is None or self.what == address


# Does one rule cover another one, so that this has no effect beside it? It does where all
# three parts do. A doubt ends in "no".


def covers_names(pattern: str, other: str) -> bool:
    """Whether `pattern` matches all that the name or pattern `other` does.

    A star of `other` can fall to a star of `pattern` alone, which then takes whatever the former
    stands for.
    """
    return _is_glob_match(pattern, other)


def covers_ports(ports: Ports, other: Ports) -> bool:
    """Whether all of the other ports are among them."""
    return ports[0] <= other[0] and other[1] <= ports[1]


def covers_hosts(what: Hosts, other: Hosts) -> bool:
    """Whether it matches all that `other` does. A name covers no address, nor the other way."""
    if what is None or what == other:
        return True
    if isinstance(what, str) and isinstance(other, str):
        patterns, others = what.split("."), other.split(".")
        return len(patterns) == len(others) and all(map(covers_names, patterns, others))
    if not isinstance(what, Network):
        return False
    if isinstance(other, Network):
        # As subnet_of() says, in a third of its time.
        return what.prefixlen <= other.prefixlen and other.network_address in what
    return isinstance(other, Address) and other in what


def _canonical_or_empty(host: Host) -> Host:
    """Return the canonical host; "" for what is none, which no rule matches."""
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
        # Addresses of this kind are folded before they are compared.
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
    """Clients by a name pattern, and what may be reached through them."""

    client: str
    target: TargetRule
    text: str = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> AccessRule:
        """Read `CLIENT:HOST:PORT`; raises RuleError that says how to write it."""
        client, colon, target = text.partition(":")
        if not colon or ":" not in target:
            # Not quoted: it may be anything, a secret in the wrong place included.
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
        """Whether it matches every target of every client."""
        return self.client == "*" and self.target.is_everything

    def covers(self, other: AccessRule) -> bool:
        """Whether it surely allows all that `other` does."""
        return covers_names(self.client, other.client) and self.target.covers(other.target)

    def matches_client(self, name: str) -> bool:
        """Whether it says anything about this client; a star stands for any characters."""
        return _is_glob_match(self.client, name)

    def matches(self, client: str, host: Host, port: int) -> bool:
        """Whether it allows this target, as it was asked for, of this client."""
        return self.matches_client(client) and self.target.matches(host, port)
