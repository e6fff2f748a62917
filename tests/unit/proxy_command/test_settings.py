"""The proxy command's settings, and what a user reads when they are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from http_network_relay.proxy_command.main import main
from http_network_relay.proxy_command.messages import complain, warn
from http_network_relay.proxy_command.settings import Settings, read_settings
from http_network_relay.wire.codes import Code
from http_network_relay.wire.errors import RelayError
from tests.support.processes import ROOT, child_environment

TOKEN = "pu-a-token-that-is-looked-for"
TARGET = ["lab-1", "127.0.0.1", "22"]
GOOD = [*TARGET, "tcp", "--secret-key", TOKEN]
NAMES = ("SERVER_URL", "SECRET_KEY", "PING_INTERVAL", "MAX_WINDOW", "RESUME_TIMEOUT")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"HTTP_NETWORK_RELAY_{name}", raising=False)


def read(argv: list[str], **environ: str) -> Settings:
    full = {f"HTTP_NETWORK_RELAY_{name}": value for name, value in environ.items()}
    return read_settings(argv, full)


def test_defaults_are_the_documented_ones() -> None:
    """Protocol tcp when left out; the server on this machine."""
    for argv in (GOOD, [*TARGET, "--secret-key", TOKEN]):
        settings = read(argv)
        assert settings.endpoint.url == "ws://127.0.0.1:8000/ws_for_ssh_proxy_command"
        assert (settings.client, settings.host, settings.port) == ("lab-1", "127.0.0.1", 22)
        assert (settings.token, settings.context) == (TOKEN, None)
        assert (settings.ping_interval_s, settings.max_window_bytes) == (20.0, 4 * 1024 * 1024)
        assert settings.grace_s == 120


def test_environment_goes_before_defaults_and_flags_before_both(tmp_path: Path) -> None:
    """One URL serves both programs; a file goes before the environment's token."""
    environ = {"SERVER_URL": "https://env.example", "SECRET_KEY": "env-token"}
    environ |= {"PING_INTERVAL": "5", "MAX_WINDOW": "300000", "RESUME_TIMEOUT": "60"}
    settings = read(TARGET, **environ)
    assert settings.endpoint.url == "wss://env.example:443/ws_for_ssh_proxy_command"
    assert (settings.token, settings.ping_interval_s) == ("env-token", 5.0)
    assert (settings.max_window_bytes, settings.grace_s) == (300_000, 60)
    path = tmp_path / "token"
    path.write_text("file-token\n")
    assert read([*TARGET, "--secret-key-file", str(path)], **environ).token == "file-token"
    flags = ["--server_url", "ws://flag:1", "--ping-interval", "6", "--max-window", "400000"]
    flags += ["--resume-timeout", "0"]
    settings = read([*GOOD, *flags], **environ)
    assert (settings.endpoint.host, settings.token) == ("flag", TOKEN)
    assert (settings.ping_interval_s, settings.max_window_bytes) == (6.0, 400_000)
    assert settings.grace_s == 0


def test_target_may_be_a_name_or_an_address_in_brackets() -> None:
    """The client looks it up."""
    for host in ("db.internal", "::1", "[::1]"):
        assert read(["lab-1", host, "22", "--secret-key", TOKEN]).host == host


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "target_host_identifier"),
    "no port": (["lab-1", "127.0.0.1"], "target_port"),
    "too many": ([*GOOD, "more"], "more"),
    "unknown flag": ([*GOOD, "--colour"], "--colour"),
    "flag without value": ([*TARGET, "--server-url"], "--server-url"),
    "port 0": (["lab-1", "h", "0", "--secret-key", TOKEN], "target_port"),
    "port too large": (["lab-1", "h", "65536", "--secret-key", TOKEN], "target_port"),
    "port of digits": (["lab-1", "h", "9" * 5000, "--secret-key", TOKEN], "target_port"),
    "port of another script": (["lab-1", "h", "²", "--secret-key", TOKEN], "target_port"),
    "port with a newline": (["lab-1", "h", "22\n", "--secret-key", TOKEN], "target_port"),
    "udp": ([*TARGET, "udp", "--secret-key", TOKEN], "udp is not supported yet"),
    "other protocol": ([*TARGET, "sctp", "--secret-key", TOKEN], "protocol must be tcp"),
    "client with colon": (["a:b", "h", "22", "--secret-key", TOKEN], "target_host_identifier"),
    "empty client": (["", "h", "22", "--secret-key", TOKEN], "target_host_identifier"),
    "empty host": (["lab-1", "", "22", "--secret-key", TOKEN], "target_ip"),
    "host with space": (["lab-1", "a b", "22", "--secret-key", TOKEN], "target_ip"),
    "no token": (TARGET, "HTTP_NETWORK_RELAY_SECRET_KEY"),
    "token with space": ([*TARGET, "--secret-key", "a b"], "--secret-key"),
    "no such file": ([*TARGET, "--secret-key-file", "/none/such"], "--secret-key-file /none/such"),
    "a folder": ([*TARGET, "--secret-key-file", "/"], "--secret-key-file /"),
    "url": ([*GOOD, "--server-url", "ftp://x"], "--server-url"),
    "url with password": ([*GOOD, "--server-url", "https://u:hunter2@x"], "--server-url"),
    "ca file": ([*GOOD, "--server-url", "https://x", "--ca-file", "/none"], "--ca-file /none"),
    "interval": ([*GOOD, "--ping-interval", "0"], "HTTP_NETWORK_RELAY_PING_INTERVAL"),
    "resume timeout": ([*GOOD, "--resume-timeout", "86401"], "HTTP_NETWORK_RELAY_RESUME_TIMEOUT"),
    "resume in days": ([*GOOD, "--resume-timeout", "1d"], "--resume-timeout"),
    "window": ([*GOOD, "--max-window", "1"], "HTTP_NETWORK_RELAY_MAX_WINDOW"),
}


@pytest.mark.parametrize("name", WRONG)
def test_usage_error_is_one_line_and_exit_2(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What is wrong, by its name; nothing on stdout, no secret, no usage over many lines."""
    argv, named = WRONG[name]
    assert main(argv) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert captured.err.startswith("ssh_proxy_command.py: ")
    assert named in captured.err
    assert TOKEN not in captured.err
    assert "hunter2" not in captured.err


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """--help is no error."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for code in ("0 clean", "1 ", "2 usage", "3 ", "4 ", "5 ", "6 ", "128+n"):
        assert code in text


@pytest.mark.parametrize("code", sorted(Code))
def test_complaint_is_one_line_with_something_to_try(
    code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every code: its exit code, its sentence, and a hint where there is one."""
    error = RelayError(code, "what failed")
    assert complain(error) == error.exit_code
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "what failed" in line
    assert Code(code).hint in line


def test_process_ends_with_one_line_and_exit_2() -> None:
    """The real file, executed."""
    command = [sys.executable, str(ROOT / "ssh_proxy_command.py"), "lab-1", "h", "x"]
    result = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_script_is_executable_and_says_what_it_needs() -> None:
    """chmod +x, a first line for env, and inline metadata (PEP 723)."""
    path = ROOT / "ssh_proxy_command.py"
    assert os.access(path, os.X_OK)
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env python3"
    begin = lines.index("# /// script")
    end = lines.index("# ///", begin)
    assert lines[begin + 1 : end] == [
        '# requires-python = ">=3.9"',
        '# dependencies = ["websocket-client>=1.2.3"]',
    ]


def test_line_for_nobody_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """stderr may be closed."""

    def write(*_: object) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "write", write)
    warn("x")
