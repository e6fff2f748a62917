"""Finds a shadowed rule: another rule allows all that it allows (docs/access.md, "The file").

No I/O. Nobody means such a rule: either it is left over, or the other rule allows too much.
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

# Patterns, networks or port ranges of one list of rules that are compared with all others: the
# widest ones. So the work grows with the number of rules, and not with its square.
_MOST_WIDE = 64
# Combinations that are tried for one rule. A list that a person can read needs fewer.
_MOST_TRIES = 1000

_T = TypeVar("_T", bound=Hashable)


def find_shadowed(rules: Sequence[AccessRule]) -> tuple[int, int] | None:
    """Return the indexes of a shadowed rule and of a rule that shadows it; None if none is."""
    indexes: dict[tuple[str, Hosts, Ports], int] = {}
    for index, rule in enumerate(rules):
        first = indexes.setdefault((rule.client, rule.target.what, rule.target.ports), index)
        if first != index:
            return index, first
    targets = [rule.target for rule in rules]
    clients = _Part((rule.client for rule in rules if "*" in rule.client), covers_names, len)
    hosts = _Part((each.what for each in targets if _is_wide(each.what)), covers_hosts, _size)
    ranges = (each.ports for each in targets if each.lowest_port < each.highest_port)
    ports = _Part(ranges, covers_ports, lambda each: each[0] - each[1])
    for index, rule in enumerate(rules):
        tries = product(
            clients.shadowing(rule.client),
            hosts.shadowing(rule.target.what),
            ports.shadowing(rule.target.ports),
        )
        for other in map(indexes.get, islice(tries, _MOST_TRIES)):
            if other is not None and other != index:
                return index, other
    return None


class _Part(Generic[_T]):
    """The clients, hosts or ports of all rules, and which value covers which."""

    def __init__(
        self, wide: Iterable[_T], covers: Callable[[_T, _T], bool], order: Callable[[_T], int]
    ) -> None:
        # `order` puts the widest first.
        self._wide = sorted(dict.fromkeys(wide), key=order)[:_MOST_WIDE]
        self._covers = covers
        self._known: dict[_T, list[_T]] = {}

    def shadowing(self, value: _T) -> list[_T]:
        """Return the value itself, and the wide values that cover it."""
        found = self._known.get(value)
        if found is None:
            wider = [each for each in self._wide if each != value and self._covers(each, value)]
            found = self._known[value] = [value, *wider]
        return found


def _is_wide(what: Hosts) -> bool:
    return not isinstance(what, Address) and (not isinstance(what, str) or "*" in what)


def _size(what: Hosts) -> int:
    """Return a number that is smaller for a wider host of the same kind; smallest for `*`."""
    if isinstance(what, Network):
        return what.prefixlen
    return len(what) if isinstance(what, str) else -1
