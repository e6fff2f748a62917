"""Finds a rule that has no effect beside a wider one (docs/access.md, "The file"). No I/O.

Such a rule is a mistake: either the rule is left over, or the wider one allows too much.
A rule includes another one if its clients, hosts and ports each include the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice, product
from typing import Generic, TypeVar

from http_network_relay.rules.target import (
    ADDRESSES,
    NETWORKS,
    AccessRule,
    Hosts,
    Ports,
    is_glob_match,
)

# Only so many of the widest patterns, networks or port ranges of a list are compared with the
# other rules. So the work grows with the number of rules, not with its square.
_MOST_WIDE = 64
# Combinations that are tried for one rule: more than a list has that a person can read.
_MOST_TRIES = 1000

_T = TypeVar("_T", bound=Hashable)


def find_shadowed(rules: Sequence[AccessRule]) -> tuple[int, int] | None:
    """Return the index of a shadowed rule and that of the wider one; None if none was found."""
    places: dict[tuple[str, Hosts, Ports], int] = {}
    for place, rule in enumerate(rules):
        first = places.setdefault((rule.client, rule.target.what, rule.target.ports), place)
        if first != place:
            return place, first
    targets = [rule.target for rule in rules]
    clients = _Part((rule.client for rule in rules if "*" in rule.client), includes_name, len)
    hosts = _Part((each.what for each in targets if _is_wide(each.what)), includes_hosts, _size)
    ranges = (each.ports for each in targets if each.lowest_port < each.highest_port)
    ports = _Part(ranges, includes_ports, lambda each: each[0] - each[1])
    for place, rule in enumerate(rules):
        tries = product(
            clients.that_include(rule.client),
            hosts.that_include(rule.target.what),
            ports.that_include(rule.target.ports),
        )
        for other in map(places.get, islice(tries, _MOST_TRIES)):
            if other is not None and other != place:
                return place, other
    return None


class _Part(Generic[_T]):
    """The clients, the hosts or the ports of all rules."""

    def __init__(
        self, wide: Iterable[_T], includes: Callable[[_T, _T], bool], order: Callable[[_T], int]
    ) -> None:
        # `order` puts the widest first.
        self._wide = sorted(dict.fromkeys(wide), key=order)[:_MOST_WIDE]
        self._includes = includes
        self._known: dict[_T, list[_T]] = {}

    def that_include(self, value: _T) -> list[_T]:
        """Return the value itself, and the wider ones that include it."""
        found = self._known.get(value)
        if found is None:
            wider = [each for each in self._wide if each != value and self._includes(each, value)]
            found = self._known[value] = [value, *wider]
        return found


def includes_name(pattern: str, other: str) -> bool:
    """Whether `pattern` matches every name that the name or pattern `other` matches.

    Only a star of `pattern` can match a star of `other`, and then matches all that it may be.
    """
    return is_glob_match(pattern, other)


def includes_ports(ports: Ports, other: Ports) -> bool:
    return ports[0] <= other[0] and other[1] <= ports[1]


def includes_hosts(what: Hosts, other: Hosts) -> bool:
    """Whether `what` surely matches all hosts that `other` matches; names and addresses differ."""
    if what is None or what == other:
        return True
    if isinstance(what, str) and isinstance(other, str):
        patterns, others = what.split("."), other.split(".")
        return len(patterns) == len(others) and all(map(includes_name, patterns, others))
    if not isinstance(what, NETWORKS):
        return False
    if isinstance(other, NETWORKS):
        # As subnet_of() says, in a third of its time.
        return what.prefixlen <= other.prefixlen and other.network_address in what
    return isinstance(other, ADDRESSES) and other in what


def _is_wide(what: Hosts) -> bool:
    return not isinstance(what, ADDRESSES) and (not isinstance(what, str) or "*" in what)


def _size(what: Hosts) -> int:
    """Return less for wider hosts of one kind, and the least for `*`."""
    if isinstance(what, NETWORKS):
        return what.prefixlen
    return len(what) if isinstance(what, str) else -1
