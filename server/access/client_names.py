"""Which rules name a client that exists. No I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from http_network_relay.rules.target import AccessRule

# Sorts behind every character of a name.
_LAST = "\x7f"


class ClientNames:
    """The clients of one credentials file. Each pattern is searched for once.

    Thousands of users may have rules with the same few patterns. A pattern finds its clients by
    its beginning or its end, so that a large file does not delay a reload.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._forwards = sorted(self._names)
        self._backwards = sorted(name[::-1] for name in self._names)
        self._is_named: dict[str, bool] = {}

    def has_match(self, rule: AccessRule) -> bool:
        """Whether the rule matches one of the clients."""
        if rule.client in self._names:
            return True
        found = self._is_named.get(rule.client)
        if found is None:
            found = any(map(rule.matches_client, self._candidates(rule.client)))
            self._is_named[rule.client] = found
        return found

    def _candidates(self, pattern: str) -> Sequence[str]:
        """Return all names that begin, or all that end, as the pattern does."""
        first, star, last = pattern.partition("*")
        if not star:
            return ()
        last = last.rpartition("*")[2]
        begin = _beginning_with(first, self._forwards)
        end = _beginning_with(last[::-1], self._backwards)
        return begin if len(begin) <= len(end) else [name[::-1] for name in end]


def _beginning_with(start: str, ordered: Sequence[str]) -> Sequence[str]:
    return ordered[bisect_left(ordered, start) : bisect_left(ordered, start + _LAST)]
