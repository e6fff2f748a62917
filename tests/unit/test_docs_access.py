"""docs/access.md: its files load, its rules match what it says, its commands are known."""

import json
import re

import pytest

from http_network_relay.rules.target import AccessRule
from server.access.command.main import make_parser
from server.access.form import parse_credentials
from tests.support.pages import rows, section
from tests.support.processes import ROOT

TEXT = (ROOT / "docs" / "access.md").read_text("utf-8")
FILES = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
RULES = {row[0].strip("`"): row[1:] for row in rows(section(TEXT, "## Rules"))}
CODE = re.compile(r"`([^`]+)`")


@pytest.mark.parametrize("text", FILES)
def test_file_of_the_page_loads(text: str) -> None:
    """What a reader copies works."""
    assert len(FILES) == 2
    parse_credentials("credentials.json", text.encode())
    assert set(json.loads(text)) == {"clients", "proxy_users"}


@pytest.mark.parametrize("text", RULES)
def test_rule_of_the_page_matches_what_it_says(text: str) -> None:
    """Each cell of the two columns, and the kind."""
    kind, matched, unmatched = RULES[text]
    rule = AccessRule.parse(text)
    client = rule.client.replace("*", "1")
    for cell, expected in ((matched, True), (unmatched, False)):
        assert CODE.findall(cell)
        for host in CODE.findall(cell):
            assert rule.matches(client, host, rule.target.lowest_port) is expected, host
    kinds = {"address": "Address", "network": "Network", "name": "str", "all": "None"}
    assert kinds[kind] in type(rule.target.what).__name__


def test_commands_of_the_page_are_those_of_the_program() -> None:
    """Every line that begins with `server credentials` can be typed."""
    parser = make_parser()
    lines = re.findall(r"server credentials ([a-z][^`\n]*)", TEXT.replace("\\\n", ""))
    assert len(lines) >= 7
    for line in lines:
        words = line.replace("'", "").replace("NAME...", "NAME").split()
        words = [{"ID": "0" * 8, "DATE": "2099-01-31"}.get(word, word) for word in words]
        parser.parse_args([word.replace("2027-", "2099-") for word in words])


def test_page_names_every_command() -> None:
    """And no other one."""
    usage = re.search(r"COMMAND`, with (.*?)\. ", TEXT, re.DOTALL)
    assert usage is not None
    for name in CODE.findall(usage[1]):
        with pytest.raises(SystemExit) as caught:
            make_parser().parse_args([name, "--help"])
        assert caught.value.code == 0
