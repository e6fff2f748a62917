"""The credentials file with names, rules and dates; and its schema, which agrees."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from http_network_relay.wire.errors import ConfigError
from server.access.credentials import Credentials
from server.access.file import load_credentials
from server.access.form import CredentialsError, parse_credentials
from tests.support.processes import ROOT

TODAY = date(2026, 11, 22)
PATH = "/etc/relay/credentials.json"
SCHEMA = json.loads((ROOT / "server" / "access" / "credentials.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def hashed(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


def parse(content: Any, **options: Any) -> Credentials:
    text = content if isinstance(content, str) else json.dumps(content)
    return parse_credentials(PATH, text.encode(), today=TODAY, **options)


def with_user(**changes: Any) -> dict[str, Any]:
    """A file with one client and one user; a change to None takes a key out."""
    user = {"secrets": ["t"], "allow": ["lab-*:127.0.0.1:22"], **changes}
    user = {key: value for key, value in user.items() if value is not None}
    return {"clients": {"lab-1": "c"}, "proxy_users": {"ops": user}}


def with_client(client: Any) -> dict[str, Any]:
    return {"clients": {"lab-1": client}, "proxy_users": []}


ISSUE = {
    "clients": {"lab-1": {"secrets": [hashed("c1"), "c2"]}, "gw": "plain"},
    "proxy_users": {
        "ops-laptop": {
            "secrets": [hashed("t1")],
            "allow": ["lab-*:127.0.0.1:22", "lab-1:10.0.0.0/8:5432", "gw:*.lan:443"],
            "expires": "2027-01-31",
        }
    },
}
GOOD: dict[str, Any] = {
    "all": ISSUE,
    "empty": {"clients": {}, "proxy_users": []},
    "empty by name": {"clients": {}, "proxy_users": {}},
    "short": {"clients": {"a": "x", "b": "x"}, "proxy_users": ["y", "z"]},
    "short, hashed": {"clients": {"a": hashed("x")}, "proxy_users": [hashed("y")]},
    "short, client and token equal": {"clients": {"a": "x"}, "proxy_users": ["x"]},
    "expired client": with_client({"secrets": ["x"], "expires": "2020-01-01"}),
    "everything before the first client": {
        "clients": {},
        "proxy_users": {"ops": {"secrets": ["t"], "allow": ["*:*:*"]}},
    },
    "all kinds of rules": with_user(
        allow=[
            "lab-1:[::1]:22",
            "lab-1:[fd00::/8]:1-5",
            "*:*:80",
            "*:db-*.lan:*",
            "lab-*:10.1.2.3:22",
        ]
    ),
    "name with a star": {
        "clients": {"a*": "x"},
        "proxy_users": {"o": {"secrets": ["t"], "allow": ["a*:*:*"]}},
    },
}
# What is wrong -> the file, a piece of the fix, and whether a schema can tell.
BAD: dict[str, tuple[Any, str, bool]] = {
    "key unknown": (with_user(alow=["*:*:*"]), 'it may have "secrets", "allow", "expires"', True),
    "key is a secret": (with_user(**{"hush-hush-hush-hush": 1}), "has an unknown key", True),
    "client with rules": (
        with_client({"secrets": ["x"], "allow": ["*:*:*"]}),
        'may have "secrets", "expires"',
        True,
    ),
    "secrets missing": (with_user(secrets=None), 'no list "secrets"', True),
    "secrets empty": (with_user(secrets=[]), 'no list "secrets"', True),
    "secrets a string": (with_user(secrets="hush"), 'no list "secrets"', True),
    "client null": (with_client(None), "not a string", True),
    "client a list": (with_client(["hush"]), "not a string", True),
    "client an empty object": (with_client({}), 'no list "secrets"', True),
    "user a string": (
        {"clients": {}, "proxy_users": {"ops": "hush"}},
        "must be an object behind a name",
        True,
    ),
    "user name bad": ({"clients": {}, "proxy_users": {"a b": {}}}, "rename it", True),
    "token as a user's name": (
        {"clients": {}, "proxy_users": {"hush": ["*:*:*"]}},
        "must be an object behind a name",
        True,
    ),
    "token as the name of an empty user": (
        {"clients": {}, "proxy_users": {"hush": {}}},
        'no list "secrets"',
        True,
    ),
    "token as the name of rules": (
        {"clients": {}, "proxy_users": {"hush": {"allow": ["*:*:*"]}}},
        'no list "secrets"',
        True,
    ),
    "token as the name of an unknown key": (
        {"clients": {}, "proxy_users": {"hush": {"name": "ops", "allow": ["*:*:*"]}}},
        "unknown key",
        True,
    ),
    "token with a colon as a user's name": (
        {"clients": {}, "proxy_users": {"hush:hush": {"secrets": ["t"], "allow": ["*:*:*"]}}},
        "rename it",
        True,
    ),
    "secret as a client's name": (
        {"clients": {"hush": ["lab-1"]}, "proxy_users": []},
        "the secret of this client is not a string",
        True,
    ),
    "token list with an object": (
        {"clients": {}, "proxy_users": [{"secrets": ["hush"]}]},
        "number 1",
        True,
    ),
    "hash short": (with_client("sha256:hush"), "64 hex digits", True),
    "hash upper": (with_client(hashed("x").upper().replace("SHA", "sha")), "64 hex digits", True),
    "hash long": (with_user(secrets=[hashed("x") + "0"]), "64 hex digits", True),
    "secret empty": (with_user(secrets=["t", ""]), "secret number 2 of proxy user ops", True),
    "allow missing": (with_user(allow=None), 'no list "allow"', True),
    "allow empty": (with_user(allow=[]), 'no list "allow"', True),
    "allow a string": (with_user(allow="*:*:*"), 'no list "allow"', True),
    "rule a number": (with_user(allow=[22]), "a rule is a string", True),
    "rule without a client": (with_user(allow=["127.0.0.1:22"]), "CLIENT:TARGET", True),
    "rule a secret": (with_user(allow=["hush"]), "CLIENT:TARGET", True),
    "rule with port 0": (with_user(allow=["lab-1:lan:0"]), "1 to 65535", True),
    "rule with host bits": (with_user(allow=["lab-1:10.0.0.1/8:22"]), "write 10.0.0.0/8", False),
    "rule like an address": (with_user(allow=["lab-1:127.*:22"]), "127.0.0.0/8", False),
    "rule in capitals": (with_user(allow=["lab-1:*.LAN:22"]), "write '*.lan'", True),
    "rule of no client": (with_user(allow=["lba-*:*:22"]), "no client is named lba-*", False),
    "rules equal": (with_user(allow=["lab-1:lan:22", "lab-1:lan:22"]), "remove one", True),
    "rules the same": (with_user(allow=["lab-1:lan:22", "lab-1:lan:22-22"]), "remove one", False),
    "rule beside its network": (
        with_user(allow=["lab-1:10.0.0.1:22", "lab-*:10.0.0.0/8:22"]),
        "the rule lab-1:10.0.0.1:22 has no effect beside lab-*:10.0.0.0/8:22; remove one",
        False,
    ),
    "rule beside its network of one": (
        with_user(allow=["lab-1:127.0.0.1:22", "lab-1:127.0.0.1/32:22"]),
        "the rule lab-1:127.0.0.1/32:22 has no effect beside lab-1:127.0.0.1:22; remove one",
        False,
    ),
    "rule beside all of a client": (
        with_user(allow=["lab-1:*:*", "lab-1:10.0.0.1:22"]),
        "the rule lab-1:10.0.0.1:22 has no effect beside lab-1:*:*; remove one",
        False,
    ),
    "rules beside everything": (with_user(allow=["lab-1:lan:22", "*:*:*"]), "no effect", False),
    "date null": (with_client({"secrets": ["x"], "expires": [None]}), "no date", True),
    "date with a time": (with_user(expires="2027-01-31T00:00"), "no date", True),
    "date of no day": (with_user(expires="2027-02-30"), "no date", False),
    "date of a week": (with_user(expires="2027-W01-1"), "no date", True),
    "date a number": (with_user(expires=20270131), "no date", True),
    "secrets of one equal": (with_user(secrets=["hush", "hush"]), "are equal", True),
    "secret and its hash": (with_user(secrets=["hush", hashed("hush")]), "are equal", False),
    "secrets of two equal": (
        {"clients": {"a": "hush", "b": {"secrets": ["hush"]}}, "proxy_users": []},
        "the secret of client a and secret number 1 of client b are equal",
        False,
    ),
    "client's and user's secret equal": (
        {
            "clients": {"a": "hush"},
            "proxy_users": {"o": {"secrets": ["hush"], "allow": ["*:*:*"]}},
        },
        "are equal",
        False,
    ),
    "tokens equal by hash": (
        {"clients": {}, "proxy_users": ["hush", hashed("hush")]},
        "are equal",
        False,
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_file_loads_and_fits_the_schema(case: str) -> None:
    """The loader and the schema take it."""
    parse(GOOD[case])
    VALIDATOR.validate(GOOD[case])


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_with_line_and_mend_and_by_the_schema(case: str) -> None:
    """One line without a secret; the schema agrees as far as a schema can tell."""
    content, fix, schema_can_tell = BAD[case]

    with pytest.raises(CredentialsError) as caught:
        parse(json.dumps(content, indent=1))

    message = str(caught.value)
    assert re.match(rf"{PATH}: line \d+: ", message)
    assert fix in message
    assert "hush" not in message
    assert "\n" not in message
    assert VALIDATOR.is_valid(content) is not schema_can_tell


def test_name_that_stands_twice_is_told_by_its_line_alone() -> None:
    """It may be a token, too."""
    with pytest.raises(CredentialsError, match=r"line 2: .*second time") as caught:
        parse('{"clients": {}, "proxy_users": {"hush": ["*:*:*"],\n"hush": ["*:*:*"]}}')
    assert "hush" not in str(caught.value)


def test_schema_is_one() -> None:
    """It is valid by its own standard."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


JUNK = st.recursive(
    st.sampled_from(
        ["t", "*:*:*", "lab-1:lan:22", "2027-01-31", "x y", hashed("x"), None, 1, True]
    ),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["clients", "proxy_users", "secrets", "allow", "expires", "lab-1"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(JUNK | st.fixed_dictionaries({"clients": JUNK, "proxy_users": JUNK}))
def test_what_the_loader_takes_fits_the_schema(content: Any) -> None:
    """Whatever stands in the file: an error, or a file that the schema takes too."""
    try:
        parse(content)
    except ConfigError:
        return
    VALIDATOR.validate(content)


LINES = {
    '{"clients": {},\n"proxy_users": [],\n"users": []}': 3,
    '{"clients":\n[], "proxy_users": []}': 2,
    '{"clients": {},\n "proxy_users":\n {"o": {"secrets": ["t"],\n "allow": ["*:*"]}}}': 4,
    '{"clients": {},\n "proxy_users":\n {"o": {"secrets": ["t"], "x": 1,\n "allow": ["*:*"]}}}': 3,
    '{"clients": {"a": {"secrets": [\n"x",\n"x"\n]}}, "proxy_users": []}': 3,
    '{"clients": {"a": {"secrets": ["x"],\n\n"expires": "soon"}}, "proxy_users": []}': 3,
    '{"clients": {"a": "x"},\n "proxy_users": ["x",\n"y",\n"y"]}': 4,
    '{"clients": {}, "proxy_users": {"o": {"secrets": ["t"], "allow": [\n"*:a:1",\n"*:*:1"]}}}': 2,
    '{"clients": {"a": "x",\n"a": "y"}, "proxy_users": []}': 2,
    '{"clients": {"a": "x",\n"b" "y"}, "proxy_users": []}': 2,
}


@pytest.mark.parametrize("text", LINES)
def test_error_names_the_line(text: str) -> None:
    """The line of the value, or of the key where the key is wrong."""
    with pytest.raises(CredentialsError, match=rf": line {LINES[text]}: "):
        parse(text)


def test_file_of_the_issue_lets_in_and_limits() -> None:
    """Several secrets, plain and hashed; rules by client and target."""
    credentials = parse(ISSUE)

    assert credentials.check_client("lab-1", "c1")
    assert credentials.check_client("lab-1", "c2")
    assert credentials.check_client("gw", "plain")
    assert not credentials.check_client("gw", "c1")
    assert credentials.check_user("t1") == "ops-laptop"
    opens = credentials.may_open
    assert opens("ops-laptop", "lab-7", "127.0.0.1", 22) == "lab-*:127.0.0.1:22"
    assert opens("ops-laptop", "lab-1", "10.1.2.3", 5432) == "lab-1:10.0.0.0/8:5432"
    assert opens("ops-laptop", "gw", "NAS.lan.", 443) == "gw:*.lan:443"
    assert opens("ops-laptop", "gw", "127.0.0.1", 22) is None
    assert opens("ops-laptop", "lab-2", "10.1.2.3", 5432) is None
    assert opens("nobody", "gw", "nas.lan", 443) is None


def test_loader_says_what_may_not_be_meant(caplog: pytest.LogCaptureFixture) -> None:
    """What is over, what is shared, and whom rules by name trust; nothing twice."""
    content = with_user(allow=["lab-1:*.lan:22", "lab-1:db:1"], expires="2026-11-21")
    content["clients"] = {"lab-1": "hush", "b": "hush"}

    with caplog.at_level(logging.INFO):
        parse(content, warn=False)
        assert not caplog.records
        parse(content, warn=True)

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"proxy user ops is expired and refused file={PATH} expires=2026-11-21"),
        ("WARNING", f"clients share a secret file={PATH} clients=lab-1,b"),
        (
            "INFO",
            f"rules by name trust the clients' resolvers file={PATH} rules=2 first=lab-1:*.lan:22",
        ),
    ]


def test_last_day_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A date holds to its end."""
    with caplog.at_level(logging.WARNING):
        parse(with_user(expires="2026-11-22"), warn=True)
    assert not caplog.records


def test_load_refuses_what_is_no_file_of_ours(tmp_path: Path) -> None:
    """A FIFO would block, an endless file would fill the memory."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_credentials(str(tmp_path / "fifo"))
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(16 * 1024 * 1024 + 1)
    with pytest.raises(ConfigError, match="longer than"):
        load_credentials(str(big))
