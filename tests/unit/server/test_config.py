"""The server's settings."""

from pathlib import Path

import pytest

from http_network_relay.settings import Setting
from http_network_relay.wire.errors import ConfigError
from server.config import SETTINGS, Config


def test_defaults_hold_when_the_environment_is_empty() -> None:
    """Nothing needs to be set; an empty variable counts as not set."""
    empty = {"HTTP_NETWORK_RELAY_PING_INTERVAL": "", "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": ""}

    for environ in ({}, empty):
        config = Config.from_env(environ)
        config.validate()
        assert config == Config("credentials.json", 20.0, 4 * 1024 * 1024)
        assert config == Config()
    for field, row in SETTINGS.items():
        assert str(getattr(Config(), field)).removesuffix(".0") == row.default


def test_environment_wins_over_defaults() -> None:
    """Each variable sets its field."""
    config = Config.from_env(
        {
            "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": "/etc/relay.json",
            "HTTP_NETWORK_RELAY_PING_INTERVAL": "0.5",
            "HTTP_NETWORK_RELAY_MAX_WINDOW": "262144",
        }
    )
    config.validate()
    assert config == Config("/etc/relay.json", 0.5, 262144)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_NETWORK_RELAY_PING_INTERVAL", "often"),
        ("HTTP_NETWORK_RELAY_PING_INTERVAL", "0"),
        ("HTTP_NETWORK_RELAY_PING_INTERVAL", "-1"),
        ("HTTP_NETWORK_RELAY_PING_INTERVAL", "nan"),
        ("HTTP_NETWORK_RELAY_PING_INTERVAL", "inf"),
        ("HTTP_NETWORK_RELAY_MAX_WINDOW", "4M"),
        ("HTTP_NETWORK_RELAY_MAX_WINDOW", "262143"),
        ("HTTP_NETWORK_RELAY_MAX_WINDOW", "67108865"),
        ("HTTP_NETWORK_RELAY_TRUSTED_PROXIES", "localhost"),
        ("HTTP_NETWORK_RELAY_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("HTTP_NETWORK_RELAY_AUDIT_LOG", "/"),
        ("HTTP_NETWORK_RELAY_AUDIT_LOG", "/no-such-folder/audit.jsonl"),
        ("HTTP_NETWORK_RELAY_AUDIT_LOG", "/proc/audit.jsonl"),
        ("HTTP_NETWORK_RELAY_HANDSHAKE_TIMEOUT", "0"),
        ("HTTP_NETWORK_RELAY_BYTES_PER_SECOND", "16383"),
        ("HTTP_NETWORK_RELAY_TUNNELS_PER_USER", "2.5"),
    ],
)
def test_validate_names_variable_and_flag_when_a_value_is_bad(variable: str, value: str) -> None:
    """Reading never raises, so that the start can say it in one line."""
    config = Config.from_env({variable: value})

    with pytest.raises(ConfigError, match=variable) as caught:
        config.validate()

    assert "--" in str(caught.value)


NUMBERS = {field: row for field, row in SETTINGS.items() if row.highest}


@pytest.mark.parametrize(("field", "row"), NUMBERS.items(), ids=NUMBERS)
def test_limit_is_read_and_checked(field: str, row: Setting) -> None:
    """Its variable sets its field; its ends are legal, what is beyond them is not."""
    for number in (row.lowest, row.highest):
        config = Config.from_env({row.variable: f"{number:.15g}"})
        config.validate()
        assert getattr(config, field) == number
    bad = ["x", "-1", "nan", f"{row.highest * 2:.15g}"] + (["1.5"] if row.is_whole else [])
    for text in bad if row.zero else [*bad, "0"]:
        with pytest.raises(ConfigError, match=rf"{row.flag} \({row.variable}\) must be"):
            Config.from_env({row.variable: text}).validate()
    if row.zero:
        Config.from_env({row.variable: "0"}).validate()
        assert row.lowest > 0.01
        with pytest.raises(ConfigError):
            Config.from_env({row.variable: "0.01"}).validate()


def test_settings_stay_as_they_are_when_another_one_is_wrong() -> None:
    """A wrong number changes no other field."""
    wrong = {row.variable: "x" for row in NUMBERS.values()}
    config = Config.from_env({**wrong, "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": "/etc/relay.json"})
    assert config.credentials_file == "/etc/relay.json"
    with pytest.raises(ConfigError, match="--ping-interval"):
        config.validate()


def test_other_settings_of_the_guard_are_read(tmp_path: Path) -> None:
    """Text, as it stands."""
    config = Config.from_env(
        {
            "HTTP_NETWORK_RELAY_TRUSTED_PROXIES": "10.0.0.0/8, unix",
            "HTTP_NETWORK_RELAY_AUDIT_LOG": str(tmp_path / "audit.jsonl"),
        }
    )
    config.validate()
    assert config.trusted_proxies == "10.0.0.0/8, unix"
    assert config.audit_log == str(tmp_path / "audit.jsonl")
    Config(audit_log="-").validate()
