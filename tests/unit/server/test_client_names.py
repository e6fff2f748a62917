"""Rules and the clients that they name: the same answers as name by name, and sooner."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from http_network_relay.rules.target import AccessRule
from server.access.client_names import ClientNames
from server.access.form import parse_credentials

NAME = st.text("ab~!", min_size=1, max_size=4)
PATTERN = st.text("ab~!*", min_size=1, max_size=5).filter(lambda text: "**" not in text)


@settings(deadline=None)
@given(st.sets(NAME | PATTERN, max_size=6), st.lists(PATTERN, min_size=1, max_size=4))
@example({"a"}, ["a*a"])
@example({"ab~", "ab"}, ["ab~*", "*b", "a*~"])
def test_match_is_found_when_one_of_the_names_has_it(names: set[str], patterns: list[str]) -> None:
    """Whatever was asked before; a star that stands in a name is a character there."""
    clients = ClientNames(names)
    for pattern in [*patterns, *patterns]:
        rule = AccessRule.parse(f"{pattern}:*:*")
        expected = pattern in names or any(map(rule.matches_client, names))
        assert clients.has_match(rule) is expected


@pytest.mark.parametrize("pattern", ["c-*999", "*-1999", "c-1999*", "c*1999", "*-19*99*", "own"])
def test_few_names_are_compared_when_a_file_is_large(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """2,000 clients, and as many users with one pattern, or each with their own."""
    compared = 0
    matches_client = AccessRule.matches_client

    def counting(rule: AccessRule, name: str) -> bool:
        nonlocal compared
        compared += 1
        return matches_client(rule, name)

    monkeypatch.setattr(AccessRule, "matches_client", counting)
    rules = [f"c*-{n}:lan:22" if pattern == "own" else f"{pattern}:lan:22" for n in range(2000)]
    content = {
        "clients": {f"c-{n}": f"c{n}" for n in range(2000)},
        "proxy_users": {
            f"u-{n}": {"secrets": [f"t{n}"], "allow": [rule]} for n, rule in enumerate(rules)
        },
    }
    parse_credentials("credentials.json", json.dumps(content).encode())
    assert compared <= 20_000
