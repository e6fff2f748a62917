"""Finds the rule that has no effect, since another one covers it (docs/access.md, "The file").

No I/O. Nobody means such a rule: either it is left over, or the other one allows too much.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice, product
from typing import Generic, TypeVar

from http_network_relay.rules.target import (
    AccessRule,
    Address,
    Hosts,
    Network,
    Ports,
    covers_hosts,
    covers_names,
    covers_ports,
)

# Of more than so many different patterns, networks or port ranges in one list of rules, the
# widest are compared with the others, and so the work grows with the rules, not their square.
_MOST_WIDE = 64
# Of one rule: as many as no list needs that somebody can read.
_MOST_TRIES = 1000

_T = TypeVar("_T", bound=Hashable)


def find_shadowed(rules: Sequence[AccessRule]) -> tuple[int, int] | None:
    """Return the places of a rule and of one that covers it; None where none was found."""
    places: dict[tuple[str, Hosts, Ports], int] = {}
    for place, rule in enumerate(rules):
        first = places.setdefault((rule.client, rule.target.what, rule.target.ports), place)
        if first != place:
            return place, first
    targets = [rule.target for rule in rules]
    clients = _Part((rule.client for rule in rules if "*" in rule.client), covers_names, len)
    hosts = _Part((each.what for each in targets if _is_wide(each.what)), covers_hosts, _size)
    ranges = (each.ports for each in targets if each.lowest_port < each.highest_port)
    ports = _Part(ranges, covers_ports, lambda each: each[0] - each[1])
    for place, rule in enumerate(rules):
        tries = product(
            clients.covering(rule.client),
            hosts.covering(rule.target.what),
            ports.covering(rule.target.ports),
        )
        for other in map(places.get, islice(tries, _MOST_TRIES)):
            if other is not None and other != place:
                return place, other
    return None


class _Part(Generic[_T]):
    """Clients, hosts or ports of all rules, and which of them cover which."""

    def __init__(
        self, wide: Iterable[_T], covers: Callable[[_T, _T], bool], order: Callable[[_T], int]
    ) -> None:
        # `order` puts the widest first.
        self._wide = sorted(dict.fromkeys(wide), key=order)[:_MOST_WIDE]
        self._covers = covers
        self._known: dict[_T, list[_T]] = {}

    def covering(self, value: _T) -> list[_T]:
        """Return the value itself, and the wide ones that cover it."""
        found = self._known.get(value)
        if found is None:
            wider = [each for each in self._wide if each != value and self._covers(each, value)]
            found = self._known[value] = [value, *wider]
        return found


def _is_wide(what: Hosts) -> bool:
    return not isinstance(what, Address) and (not isinstance(what, str) or "*" in what)


def _size(what: Hosts) -> int:
    """The less, the wider among hosts of one kind; `*` before all."""
    if isinstance(what, Network):
        return what.prefixlen
    return len(what) if isinstance(what, str) else -1
