"""The server's settings."""

import pytest

from server.config import Config
from server.errors import ConfigError


def test_defaults_hold_when_the_environment_is_empty() -> None:
    """Nothing needs to be set; an empty variable counts as not set."""
    empty = {"HTTP_NETWORK_RELAY_PING_INTERVAL": "", "HTTP_NETWORK_RELAY_CREDENTIALS_FILE": ""}

    for environ in ({}, empty):
        config = Config.from_env(environ)
        config.validate()
        assert config == Config("credentials.json", 20.0, 4 * 1024 * 1024)


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
    ],
)
def test_validate_names_variable_and_flag_when_a_value_is_bad(variable: str, value: str) -> None:
    """Reading never raises, so that the start can say it in one line."""
    config = Config.from_env({variable: value})

    with pytest.raises(ConfigError, match=variable) as caught:
        config.validate()

    assert "--" in str(caught.value)
