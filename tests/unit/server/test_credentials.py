"""The credentials file: what is accepted, and the line for what is not."""

import json
import logging
import re
from pathlib import Path

import pytest

from server.credentials import Credentials, load_credentials
from server.errors import ConfigError

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
    assert repr(Credentials({"a": "s3cret"}, ["t0ken"])) == "<Credentials clients=1 proxy_users=1>"


BAD = {
    "not JSON": ("{", "not JSON"),
    "not an object": ([], "exactly"),
    "key missing": ({"clients": {}}, "exactly"),
    "key unknown": ({"clients": {}, "proxy_users": [], "users": []}, "exactly"),
    "clients a list": ({"clients": [], "proxy_users": []}, '"clients"'),
    "users an object": ({"clients": {}, "proxy_users": {}}, '"proxy_users"'),
    "secret empty": ({"clients": {"gw": ""}, "proxy_users": []}, "client gw"),
    "secret a number": ({"clients": {"gw": 5}, "proxy_users": []}, "client gw"),
    "secret with a space": ({"clients": {"gw": "hush hush"}, "proxy_users": []}, "client gw"),
    "secret not ASCII": ({"clients": {"gw": "hüsh"}, "proxy_users": []}, "client gw"),
    "secret with a newline": ({"clients": {"gw": "hush\n"}, "proxy_users": []}, "client gw"),
    "secret too long": ({"clients": {"gw": "h" * 4097}, "proxy_users": []}, "client gw"),
    "token empty": ({"clients": {}, "proxy_users": ["good", ""]}, "number 2"),
    "token null": ({"clients": {}, "proxy_users": [None]}, "number 1"),
    "tokens equal": ({"clients": {}, "proxy_users": ["hush", "b", "hush"]}, "number 1 and 3"),
    "name with a colon": ({"clients": {"a:b": "hush"}, "proxy_users": []}, "'a:b'"),
    "name empty": ({"clients": {"": "hush"}, "proxy_users": []}, "client name ''"),
    "name twice": ('{"clients": {"gw": "hush", "gw": "hush"}, "proxy_users": []}', "'gw'"),
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
