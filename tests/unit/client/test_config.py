"""The client's settings: flag > environment > default; errors name flag and variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.config import ClientConfig, read_config
from http_network_relay.wire.errors import RelayError

SECRET = "s3cret-with:colon"
GOOD = ["--client-name", "lab-1", "--client-secret", SECRET]
ENV = {
    "HTTP_NETWORK_RELAY_SERVER_URL": "https://env.example",
    "HTTP_NETWORK_RELAY_CLIENT_NAME": "env-name",
    "HTTP_NETWORK_RELAY_CLIENT_SECRET": "env-secret",
    "HTTP_NETWORK_RELAY_PING_INTERVAL": "7.5",
    "HTTP_NETWORK_RELAY_MAX_WINDOW": "300000",
    "HTTP_NETWORK_RELAY_RESUME_TIMEOUT": "60",
}


def error_of(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(RelayError) as caught:
        read_config(argv, environ or {})
    assert caught.value.code == "usage"
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_defaults_are_the_documented_ones() -> None:
    """With nothing but a name and a secret."""
    config = read_config(GOOD, {})
    assert config.endpoint.url == "ws://127.0.0.1:8000/ws_for_clients"
    assert (config.name, config.secret) == ("lab-1", SECRET)
    assert (config.ping_interval_s, config.max_window_bytes) == (20.0, 4 * 1024 * 1024)
    assert (config.grace_s, config.context, config.is_verbose) == (120, None, False)


def test_environment_goes_before_the_defaults() -> None:
    """Every variable."""
    config = read_config([], ENV)
    assert config.endpoint.url == "wss://env.example:443/ws_for_clients"
    assert (config.name, config.secret) == ("env-name", "env-secret")
    assert (config.ping_interval_s, config.max_window_bytes) == (7.5, 300_000)
    assert config.grace_s == 60
    assert config.context is not None


def test_flags_go_before_the_environment() -> None:
    """Every flag."""
    argv = [*GOOD, "--server-url", "ws://flag.example:1/p", "--ping-interval", "5"]
    config = read_config(
        [*argv, "--max-window", "1000000", "--verbose", "--resume-timeout", "0"], ENV
    )
    assert config.endpoint.url == "ws://flag.example:1/p"
    assert (config.name, config.secret) == ("lab-1", SECRET)
    assert (config.ping_interval_s, config.max_window_bytes) == (5.0, 1_000_000)
    assert config.grace_s == 0
    assert config.is_verbose


@pytest.mark.parametrize("flag", ["--server_url", "--server-url"])
def test_server_url_has_two_spellings(flag: str) -> None:
    """The exact one of the interface, and the usual one."""
    assert read_config([*GOOD, flag, "ws://x:1"], {}).endpoint.host == "x"


def test_empty_variable_counts_as_none() -> None:
    """`VAR= command` is how a shell user takes one away."""
    config = read_config(GOOD, dict.fromkeys(ENV, ""))
    assert config.endpoint.host == "127.0.0.1"
    assert (config.ping_interval_s, config.grace_s) == (20.0, 120)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_secret_comes_from_a_file(tmp_path: Path, end: str) -> None:
    """Without its line end; the file goes before the environment."""
    path = tmp_path / "secret"
    path.write_bytes(b"file-secret" + end.encode())
    argv = ["--client-name", "lab-1", "--client-secret-file", str(path)]
    assert read_config(argv, ENV).secret == "file-secret"


@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"two\nlines\n", b" spaced ", b"\xff\xfe", b"a b"]
)
def test_secret_file_that_holds_no_secret_is_a_usage_error(
    tmp_path: Path, content: bytes | None
) -> None:
    """Missing, empty, or something else in it; what it holds is not repeated."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    sentence = error_of(["--client-name", "lab-1", "--client-secret-file", str(path)])
    assert "--client-secret-file" in sentence
    assert "two" not in sentence


@pytest.mark.parametrize("secret", ["", "a b", "ä", "a\tb", "a\n", "x" * 4097])
def test_secret_that_no_header_can_carry_is_a_usage_error(secret: str) -> None:
    """Named by flag and variable, not by its value."""
    sentence = error_of(["--client-name", "lab-1"], {"HTTP_NETWORK_RELAY_CLIENT_SECRET": secret})
    assert "--client-secret" in sentence
    assert "HTTP_NETWORK_RELAY_CLIENT_SECRET" in sentence
    assert not secret or secret not in sentence


@pytest.mark.parametrize("name", ["", "a:b", "a b", "ä", "n" * 129, "a\n"])
def test_name_that_cannot_be_one_is_a_usage_error(name: str) -> None:
    """A colon would end the name in HTTP Basic."""
    sentence = error_of(["--client-name", name, "--client-secret", SECRET])
    assert "--client-name (HTTP_NETWORK_RELAY_CLIENT_NAME)" in sentence


@pytest.mark.parametrize("value", ["", "0", "0.04", "3601", "x", "nan", "inf", "-1", "1e9"])
def test_ping_interval_out_of_range_is_a_usage_error(value: str) -> None:
    """0.05 to 3600 seconds."""
    if value:
        sentence = error_of([*GOOD, "--ping-interval", value])
        assert "--ping-interval (HTTP_NETWORK_RELAY_PING_INTERVAL)" in sentence


@pytest.mark.parametrize(
    "value", ["0", "262143", "1073741825", "-1", "1.5", "1e6", "x", "²", "9" * 5000]
)
def test_window_out_of_range_is_a_usage_error(value: str) -> None:
    """256 KiB to 1 GiB, a whole number."""
    sentence = error_of([*GOOD, f"--max-window={value}"])
    assert "--max-window (HTTP_NETWORK_RELAY_MAX_WINDOW)" in sentence


@pytest.mark.parametrize(("value", "seconds"), [("0", 0), ("1", 1), ("86400", 86_400), ("007", 7)])
def test_resume_timeout_is_a_whole_number_of_seconds_up_to_a_day(value: str, seconds: int) -> None:
    """0: a tunnel is not kept."""
    assert read_config([*GOOD, "--resume-timeout", value], ENV).grace_s == seconds
    assert read_config(GOOD, {"HTTP_NETWORK_RELAY_RESUME_TIMEOUT": value}).grace_s == seconds


@pytest.mark.parametrize("value", ["86401", "-1", "1.5", "1e2", "x", "²", " 5", "5\n", "9" * 5000])
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_resume_timeout_out_of_range_is_a_usage_error(value: str, by: str) -> None:
    """0 to 86400, a whole number."""
    argv = [*GOOD, f"--resume-timeout={value}"] if by == "flag" else GOOD
    sentence = error_of(argv, {"HTTP_NETWORK_RELAY_RESUME_TIMEOUT": value})
    assert "--resume-timeout (HTTP_NETWORK_RELAY_RESUME_TIMEOUT)" in sentence
    assert "86400" in sentence


@pytest.mark.parametrize(
    "argv", [["--nonsense"], ["argument"], ["--client-name"], ["--ping-interval"]]
)
def test_wrong_command_line_is_one_sentence(argv: list[str]) -> None:
    """argparse would write its usage over several lines."""
    assert error_of([*GOOD, *argv]).endswith("--help lists all arguments")


def test_wrong_server_url_and_ca_file_are_usage_errors(tmp_path: Path) -> None:
    """Each names its flag."""
    assert "--server-url" in error_of([*GOOD, "--server-url", "ftp://x"])
    missing = str(tmp_path / "none")
    argv = [*GOOD, "--server-url", "https://x", "--ca-file", missing]
    assert f"--ca-file {missing}" in error_of(argv)


def test_secret_stands_in_no_repr() -> None:
    """Nor in what an error shows of the settings."""
    config = read_config(GOOD, {})
    assert SECRET not in repr(config)
    assert SECRET not in str(config)
    assert "lab-1" in repr(config)


def test_settings_cannot_be_changed() -> None:
    """One frozen object."""
    config: Any = read_config(GOOD, {})
    with pytest.raises(AttributeError):
        config.secret = "other"
    assert isinstance(config, ClientConfig)
