"""docs/limits.md says what the code does: settings, the filter, the audit lines."""

import json
import logging
import re
from typing import Any

import pytest

from http_network_relay.wire.codes import Code
from server.audit import AuditLog
from server.config import SETTINGS, Config
from server.limits.policy import Policy, PolicyObserver
from server.tunnels.tunnel import Tunnel
from tests.support.controls import from_dict
from tests.support.pages import rows, section
from tests.support.processes import ROOT
from tests.support.server.fake_legs import CAP, OPEN, RESUME, FakeClientLeg, FakeUserLeg

PAGE = (ROOT / "docs" / "limits.md").read_text("utf-8")


def test_page_lists_every_setting_with_its_default() -> None:
    """As config.py has it."""
    listed = {}
    for flag, variable, _unit, default, _code in rows(section(PAGE, "## Settings")):
        listed[flag.strip("`"), variable.strip("`")] = default.strip("`").split(";")[0]
    elsewhere = {"credentials_file", "ping_interval_s", "max_window_bytes"}
    known = {
        (row.flag, row.variable): row.default or "off"
        for field, row in SETTINGS.items()
        if field not in elsewhere
    }
    assert listed == known


def test_statuses_of_the_page_are_those_of_the_server() -> None:
    """429, 408, 431."""
    told = re.findall(r"`(\w+)` \(HTTP (\d+)\)", PAGE)
    assert {code: int(status) for code, status in told} == {
        code: Code(code).http_status for code in ("too_many", "head_timeout", "head_too_large")
    }


@pytest.mark.parametrize(
    ("address", "name"), [("203.0.113.7", "lab-1"), ("2001:db8::1", "a b"), ("unix", "")]
)
def test_filter_of_the_page_finds_a_failed_login(
    caplog: pytest.LogCaptureFixture, address: str, name: str
) -> None:
    """fail2ban takes the time out of a line, puts its own expression for <ADDR>, and searches."""
    pattern = re.search(r"^failregex = (.*)$", PAGE, re.MULTILINE)
    assert pattern is not None
    found = re.compile(pattern[1].replace("<ADDR>", r"(?P<addr>[0-9a-f.:]+)"))
    with caplog.at_level(logging.WARNING):
        Policy(Config()).failed_login("client", name, address, "no")
    (record,) = caplog.records
    formatted = logging.Formatter("%(asctime)s %(levelname)s %(message)s").format(record)
    line = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "", formatted)
    match = found.search(line)
    assert (match["addr"] if match else "unix") == address
    example = re.search(r"^ {4}\S+ \S+( WARNING login failed .*)$", PAGE, re.MULTILINE)
    assert example is not None
    assert found.search(example[1])


class Noting(AuditLog):
    """Keeps the events instead of writing them."""

    def __init__(self) -> None:
        super().__init__("")
        self.events: list[dict[str, Any]] = []

    def put(self, event: str, **fields: Any) -> None:
        self.events.append({"time": "", "event": event, **fields})


def test_audit_lines_of_the_page_have_the_fields_of_the_code() -> None:
    """Each event once, its fields in that order."""
    block = section(PAGE, "## Audit log").split("```json\n")[1].split("```")[0]
    shown = [json.loads(line) for line in block.splitlines()]
    assert [event["event"] for event in shown[-1:]] == ["lost"]  # The writer's own.

    policy = Policy(Config())
    policy.audit = Noting()
    policy.leg_up("client", "gw", "a")
    policy.leg_down("client", "gw", "a", "lost", 1.0)
    policy.failed_login("client", "gw", "a", "")
    policy.refused(from_dict(OPEN), "u", "a", "client_offline")
    for first, answer in (
        (OPEN, {"type": "opened", "limit": 300_000, "grace_s": 0}),
        (RESUME, {"type": "resumed", "received": 0, "delivered": 0, "limit": 300_000}),
    ):
        leg = FakeClientLeg()
        record = PolicyObserver(policy, from_dict(first), "u", "a")
        tunnel = Tunnel(leg, FakeUserLeg(), from_dict(first), "u", "*", observer=record)
        with leg.channels.lock:
            tunnel.assign_locked(CAP)
        tunnel.on_client_control(from_dict(answer))
        tunnel.user_lost()
    written = {event["event"]: list(event) for event in policy.audit.events}
    assert {event["event"]: list(event) for event in shown[:-1]} == written
