"""The rules of one proxy user in the credentials file. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from http_network_relay.rules.shadowed import find_shadowed
from http_network_relay.rules.target import AccessRule, RuleError
from server.access.client_names import ClientNames
from server.access.json_lines import LineError, Node


def read_rules(about: str, nodes: Sequence[Node], clients: ClientNames) -> tuple[AccessRule, ...]:
    """Return the rules of the user that `about` names; raises LineError.

    A rule without effect is an error: it names no client, or another rule shadows it.
    """
    rules = tuple(_read_rule(about, node, clients) for node in nodes)
    found = find_shadowed(rules)
    if found is not None:
        shadowed, other = found
        raise LineError(
            f"{about}: the rule {rules[shadowed].text} has no effect beside "
            f"{rules[other].text}; remove one of them",
            nodes[shadowed].line,
        )
    return rules


def _read_rule(about: str, node: Node, clients: ClientNames) -> AccessRule:
    try:
        if not isinstance(node.value, str):
            raise RuleError('a rule is a string such as "lab-*:127.0.0.1:22"')
        rule = AccessRule.parse(node.value)
    except RuleError as exc:
        raise LineError(f"{about}: {exc}", node.line) from exc
    # The star alone is no mistyped name, and may stand before the first client does.
    if rule.client != "*" and not clients.has_match(rule):
        raise LineError(
            f"{about}: no client is named {rule.client}, so the rule {rule.text} has no "
            "effect; add the client first, or remove the rule",
            node.line,
        )
    return rule
