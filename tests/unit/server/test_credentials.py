"""The credentials file: what is accepted, and the line for what is not."""

import hashlib
import hmac
import json
import logging
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from http_network_relay.rules.target import AccessRule
from http_network_relay.wire.errors import ConfigError
from server.access.credentials import Credentials, Entry, digest_in_file
from server.access.file import load_credentials

GOOD = {"clients": {"gateway": "client-secret", "lab": "other-secret"}, "proxy_users": ["tok", "x"]}


def write(folder: Path, content: object) -> str:
    path = folder / "credentials.json"
    path.touch(mode=0o600)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_load_returns_all_when_the_file_is_good(tmp_path: Path) -> None:
    """Every client and every token of the file is accepted, and nothing else."""
    credentials = load_credentials(write(tmp_path, GOOD))

    assert credentials.check_client("gateway", "client-secret")
    assert credentials.check_client("lab", "other-secret")
    assert not credentials.check_client("gateway", "other-secret")
    assert not credentials.check_client("nobody", "client-secret")
    assert not credentials.check_client("nobody", "")
    assert credentials.has_client("lab")
    assert not credentials.has_client("nobody")


def test_user_name_hides_the_token_when_it_is_right(tmp_path: Path) -> None:
    """A proxy user is named by eight digits of the token's SHA-256 (docs/protocol.md)."""
    credentials = load_credentials(write(tmp_path, GOOD))

    name = credentials.check_user("tok")

    assert name is not None
    assert re.fullmatch(r"token-[0-9a-f]{8}", name)
    assert credentials.check_user("x") not in (None, name)
    assert credentials.check_user("to") is None
    assert credentials.check_user("") is None


def test_repr_has_no_secret_and_no_digest() -> None:
    """What a log line could show of the credentials is their number."""
    assert (
        repr(Credentials.plain({"a": "s3cret"}, ["t0ken"]))
        == "<Credentials clients=1 proxy_users=1>"
    )


BAD = {
    "not JSON": ("{", "not JSON"),
    "not an object": ([], "exactly"),
    "key missing": ({"clients": {}}, "exactly"),
    "key unknown": ({"clients": {}, "proxy_users": [], "users": []}, "exactly"),
    "clients a list": ({"clients": [], "proxy_users": []}, '"clients"'),
    "users a string": ({"clients": {}, "proxy_users": "hush"}, '"proxy_users"'),
    "secret empty": ({"clients": {"gw": ""}, "proxy_users": []}, "client gw"),
    "secret a number": ({"clients": {"gw": 5}, "proxy_users": []}, "this client is not a string"),
    "secret with a space": ({"clients": {"gw": "hush hush"}, "proxy_users": []}, "client gw"),
    "secret not ASCII": ({"clients": {"gw": "hüsh"}, "proxy_users": []}, "client gw"),
    "secret with a newline": ({"clients": {"gw": "hush\n"}, "proxy_users": []}, "client gw"),
    "secret too long": ({"clients": {"gw": "h" * 4097}, "proxy_users": []}, "client gw"),
    "token empty": ({"clients": {}, "proxy_users": ["good", ""]}, "number 2"),
    "token null": ({"clients": {}, "proxy_users": [None]}, "number 1"),
    "tokens equal": (
        {"clients": {}, "proxy_users": ["hush", "b", "hush"]},
        "number 1 and proxy user token number 3",
    ),
    "name with a colon": ({"clients": {"a:b": "hush"}, "proxy_users": []}, "name of this client"),
    "name empty": ({"clients": {"": "hush"}, "proxy_users": []}, "name of this client"),
    "name twice": (
        '{"clients": {"gw": "hush", "gw": "hush"}, "proxy_users": []}',
        "line 1: a name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_load_names_file_and_mend_when_the_file_is_bad(tmp_path: Path, case: str) -> None:
    """The error is one line with the file and the place, and never a secret."""
    content, place = BAD[case]
    path = write(tmp_path, content)

    with pytest.raises(ConfigError) as caught:
        load_credentials(path)

    message = str(caught.value)
    assert message.startswith(path)
    assert place in message
    assert "hush" not in message
    assert "\n" not in message


def test_load_names_file_and_setting_when_it_is_missing(tmp_path: Path) -> None:
    """Whoever has no file yet reads what to write into it, and how to name another one."""
    path = str(tmp_path / "none.json")

    with pytest.raises(ConfigError, match="no such file") as caught:
        load_credentials(path)

    assert path in str(caught.value)
    assert "HTTP_NETWORK_RELAY_CREDENTIALS_FILE" in str(caught.value)


def test_load_names_the_reason_when_the_file_is_a_folder(tmp_path: Path) -> None:
    """What the system says about an unreadable file is passed on."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_credentials(str(tmp_path))


def test_load_warns_when_clients_share_a_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sharing is allowed, but said, with the names and without the secret."""
    path = write(tmp_path, {"clients": {"a": "hush", "b": "hush", "c": "z"}, "proxy_users": []})

    with caplog.at_level(logging.WARNING):
        load_credentials(path)

    assert [r.getMessage() for r in caplog.records] == [
        f"clients share a secret file={path} clients=a,b"
    ]


def test_load_warns_when_others_may_read_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A credentials file of mode 0644 is a warning, one of 0600 is none."""
    path = Path(write(tmp_path, GOOD))

    with caplog.at_level(logging.WARNING):
        load_credentials(str(path))
        assert not caplog.records
        path.chmod(0o644)
        load_credentials(str(path))

    assert "readable by others" in caplog.text


# Logins.

TODAY = date(2026, 11, 22)


def hashed(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


def entry(name: str, *secrets: str, **rest: Any) -> Entry:
    return Entry(name, tuple(map(digest_in_file, secrets)), **rest)


def make(*users: Entry, clients: tuple[Entry, ...] = (), today: date = TODAY) -> Credentials:
    return Credentials(clients, users, lambda: today)


def test_login_names_the_secret_by_its_hash_only() -> None:
    """The id is what `credentials revoke` takes, and all that a log may show."""
    login = make(entry("ops", "t1", hashed("t2"))).login_user("t2")

    assert login is not None
    assert (login.kind, login.name) == ("user", "ops")
    assert login.secret_id == hashed("t2")[7:15]
    assert hashed("t2")[15:] not in repr(login)
    assert str(login.digest) not in repr(login)


def test_hash_is_never_a_password() -> None:
    """Who reads the file knows no secret of it, even of somebody who chose a hash as one."""
    leaked = hashed("secret")
    credentials = make(entry("ops", leaked), clients=(entry("gw", leaked),))

    assert credentials.check_user("secret") == "ops"
    assert credentials.check_user(leaked) is None
    assert credentials.check_user(leaked[7:]) is None
    assert not credentials.check_client("gw", leaked)
    # The digest of the text "sha256:...", as if the file were wrong.
    twice = Entry("ops", (hashlib.sha256(leaked.encode()).digest(),))
    assert make(twice).check_user(leaked) is None


@pytest.mark.parametrize("secret", ["", " ", "a b", "a\n", "\udcff", "ä", "x" * 5000])
def test_what_is_no_secret_is_refused_even_where_its_hash_stands_in_the_file(secret: str) -> None:
    """The hash of nothing would let everybody in."""
    digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
    both = Entry("a", (digest,))
    assert make(both).login_user(secret) is None
    assert make(clients=(both,)).login_client("a", secret) is None


def test_comparisons_are_as_many_when_the_name_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time tells neither whether a name exists, nor how many secrets it has."""
    compared: list[int] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared[-1] += 1
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    clients = (entry("a", "1", "2", "3"), entry("b", "4"))
    credentials = make(entry("u", "5", "6"), entry("v", "7"), clients=clients)
    for name, secret in (("a", "1"), ("a", "3"), ("a", "no"), ("b", "4"), ("b", "1"), ("no", "1")):
        compared.append(0)
        credentials.login_client(name, secret)
    assert compared == [3] * 6
    for token in ("5", "6", "7", "no", hashed("5")):
        compared.append(0)
        credentials.login_user(token)
    assert compared[6:] == [3] * 5


def test_expired_login_is_refused_and_only_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Valid to the end of the day (UTC); then as a wrong secret, with a line for the operator."""
    both = entry("a", "hush", expires=TODAY)
    last_day = make(both, clients=(both,))
    assert last_day.check_user("hush") == "a"
    assert last_day.check_client("a", "hush")
    assert last_day.may_open("a", "c", "lan", 22) == "*"
    logins = [last_day.login_user("hush"), last_day.login_client("a", "hush")]
    assert all(login is not None and last_day.is_valid(login) for login in logins)

    with caplog.at_level(logging.WARNING):
        over = make(both, clients=(both,), today=date(2026, 11, 23))
        assert over.check_user("wrong") is None
        assert not caplog.records
        assert over.check_user("hush") is None
        assert not over.check_client("a", "hush")
    assert [record.getMessage().split(" fix")[0] for record in caplog.records] == [
        f"login refused reason=expired {kind}=a secret={hashed('hush')[7:15]} expired=2026-11-22"
        for kind in ("user", "client")
    ]
    assert not any(login is None or over.is_valid(login) for login in logins)
    assert over.may_open("a", "c", "lan", 22) is None


def test_login_stays_valid_until_its_secret_is_gone() -> None:
    """Rotation keeps it; revocation of the secret or of the name ends it."""
    login = make(entry("ops", "old")).login_user("old")
    assert login is not None

    assert make(entry("ops", "old", "new")).is_valid(login)
    assert make(entry("ops", hashed("old"))).is_valid(login)
    assert not make(entry("ops", "new")).is_valid(login)
    assert not make(entry("other", "old")).is_valid(login)
    assert not make().is_valid(login)
    assert not make(clients=(entry("ops", "old"),)).is_valid(login)


def test_login_of_the_short_form_stays_valid_in_the_new_form() -> None:
    """A token that got a name in the file, the one that logs had, is the same login."""
    login = Credentials.plain({}, ["tok"]).login_user("tok")
    assert login is not None
    rules = (AccessRule.parse("*:*:*"),)
    assert make(entry(login.name, "tok", allow=rules)).is_valid(login)


def test_user_of_the_short_form_may_open_everything_that_is_a_target() -> None:
    """No rule limits it, but what only looks like an address is refused everywhere."""
    credentials = Credentials.plain({"gw": "c"}, ["tok"])
    name = credentials.check_user("tok")
    assert name is not None

    assert credentials.may_open(name, "gw", "db.lan", 5432) == "*"
    assert credentials.may_open(name, "gw", "::1", 22) == "*"
    for host in ("127.1", "0x7f000001", "2130706433", "1.2.3.4.", "a b", ""):
        assert credentials.may_open(name, "gw", host, 22) is None, host


def test_first_rule_that_matches_is_named_as_it_is_written() -> None:
    """The text for the audit log."""
    texts = ("gw:[::ffff:10.0.0.1]:22", "*:10.0.0.0/8:*")
    rules = tuple(map(AccessRule.parse, texts))
    credentials = make(entry("ops", "t", allow=rules))

    assert credentials.may_open("ops", "gw", "10.0.0.1", 22) == texts[0]
    assert credentials.may_open("ops", "lab", "10.0.0.1", 22) == texts[1]
    assert credentials.may_open("ops", "lab", "11.0.0.1", 22) is None


def test_tokens_of_one_id_are_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight digits may collide; then both tokens are in force."""
    monkeypatch.setattr("server.access.credentials.id_of", lambda _digest: "00000000")
    credentials = Credentials.plain({}, ["a", "b"])
    assert credentials.check_user("a") == credentials.check_user("b") == "token-00000000"
