"""Whose address a request comes from, when proxies stand in between. No I/O.

Anybody may write X-Forwarded-For. Only the addresses that trusted peers have added at the end
count: each proxy appends the address of its own peer.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

# A web server on this machine that terminates TLS.
DEFAULT_TRUSTED_PROXIES = "127.0.0.0/8,::1,unix"
# The name of a peer without an address: the peer of a socket file.
UNIX = "unix"
# The smallest part of IPv6 that a provider gives to one customer, who has all its addresses.
_IPV6_PREFIX = 64
# The prefix of mapped IPv4 addresses: ::ffff:0:0/96.
_MAPPED_PREFIX = 96

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Networks(NamedTuple):
    """Peers that are trusted: by network, and by socket file."""

    networks: tuple[Network, ...]
    has_unix: bool

    def has(self, address: Address) -> bool:
        """Whether the address is in one of the networks."""
        return any(
            address.version == network.version and address in network for network in self.networks
        )


def parse_networks(text: str) -> Networks:
    """Read `10.0.0.0/8, ::1, unix`. Raises ValueError with a sentence."""
    networks: list[Network] = []
    has_unix = False
    for word in text.replace(",", " ").split():
        if word == UNIX:
            has_unix = True
            continue
        if "%" in word:
            raise ValueError(
                f"{word!r} has a scope (%), and a peer with one is never trusted; let the proxy "
                "come from another address"
            )
        networks.append(_fold(ipaddress.ip_network(word)))
    return Networks(tuple(networks), has_unix)


def _fold(network: Network) -> Network:
    """Return a network of mapped IPv4 addresses as one of IPv4, as _parse() does addresses."""
    if isinstance(network, ipaddress.IPv6Network):
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= _MAPPED_PREFIX:
            return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED_PREFIX))
    return network


def _parse(text: str) -> Address | None:
    """Return the address, a mapped one as IPv4; None for a text that is none or has a scope."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


def source_address(peer: str | None, forwarded: str, trusted: Networks) -> str:
    """Return the address that a request comes from.

    `peer` is the connection's address, None or empty for a socket file. `forwarded` is
    X-Forwarded-For, all its lines joined by commas. The search goes from the right over trusted
    proxies: the first other address is the source. A text that is no address ends the search.
    """
    address = _parse(peer) if peer else None
    if not peer:
        source, is_trusted = UNIX, trusted.has_unix
    elif address is None:
        source, is_trusted = peer, False
    else:
        source, is_trusted = str(address), trusted.has(address)
    for text in reversed(forwarded.split(",")):
        hop = _parse(text.strip()) if is_trusted else None
        if hop is None:
            break
        source, is_trusted = str(hop), trusted.has(hop)
    return source


def block_of(source: str) -> str:
    """Return the key of a source in counts: the source itself, or the /64 of an IPv6 address."""
    address = _parse(source)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
    return source if address is None else str(address)
