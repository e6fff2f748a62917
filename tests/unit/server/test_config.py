"""The server's settings."""

from pathlib import Path

import pytest

from http_network_relay.wire.errors import ConfigError
from server.config import LIMITS, Config, Limit


def test_defaults_hold_when_the_environment_is_empty() -> None:
    """Nothing needs to be set; an empty variable counts as not set."""
    empty = {"HTTP_NETWORK_RELAY_PING_INTERVAL": "", "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": ""}

    for environ in ({}, empty):
        config = Config.from_env(environ)
        config.validate()
        assert config == Config("credentials.json", 20.0, 4 * 1024 * 1024)
        assert config == Config(**{limit.field: limit.default for limit in LIMITS})  # type: ignore[arg-type]


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


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.field)
def test_limit_is_read_and_checked(limit: Limit) -> None:
    """Its variable sets its field; its ends are legal, what is beyond them is not."""
    for number in (limit.lowest, limit.highest):
        config = Config.from_env({limit.variable: f"{number:.15g}"})
        config.validate()
        assert getattr(config, limit.field) == number
    bad = ["x", "-1", "nan", f"{limit.highest * 2:.15g}"] + (["1.5"] if limit.is_whole else [])
    for text in bad if limit.can_be_off else [*bad, "0"]:
        with pytest.raises(ConfigError, match=f"{limit.variable} .{limit.flag}. must be"):
            Config.from_env({limit.variable: text}).validate()
    if limit.can_be_off:
        Config.from_env({limit.variable: "0"}).validate()


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
