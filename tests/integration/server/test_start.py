"""How the server starts, and how it says that it cannot."""

import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.processes import (
    CLIENT_SECRET,
    CREDENTIALS,
    TOKEN,
    Proc,
    Server,
    child_environment,
    command_line,
    start_server,
    write_credentials,
)
from tests.support.raw import (
    CLIENT_PATH,
    USER_PATH,
    RawClient,
    RawUser,
    client_headers,
    handshake_status,
    user_headers,
)
from tests.support.secrecy import secret_of

BAD_CREDENTIALS = {
    "not JSON": "{",
    "empty secret": {"clients": {"a": ""}, "proxy_users": []},
    "secret not ASCII": {"clients": {"a": secret_of("ü")}, "proxy_users": []},
    "equal tokens": {"clients": {}, "proxy_users": [secret_of("pu-same")] * 2},
    "wrong form": ["clients"],
}


def failed_start(tmp_path: Path, **options: object) -> tuple[int, list[str]]:
    """Start, wait for the end; return the status and the lines that are not gunicorn's log."""
    with start_server(tmp_path, wait=False, **options) as server:  # type: ignore[arg-type]
        status = server.wait(10)
        assert "Traceback" not in server.text
        assert "Booting worker" not in server.text
        return status, [line for line in server.lines if not line.startswith("[")]


@pytest.mark.parametrize("case", BAD_CREDENTIALS)
def test_start_fails_with_one_line_when_the_credentials_are_bad(tmp_path: Path, case: str) -> None:
    """Checked in the master: exit 2, the file and the fix, no worker, no secret."""
    status, lines = failed_start(tmp_path, credentials=BAD_CREDENTIALS[case])
    assert status == 2
    assert len(lines) == 1
    assert str(tmp_path / "credentials.json") in lines[0]
    assert "same-token" not in lines[0]


def test_start_fails_with_one_line_when_there_is_no_file(tmp_path: Path) -> None:
    """The line shows what to write."""
    env = {"HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(tmp_path / "none.json")}
    status, lines = failed_start(tmp_path, env=env)
    assert status == 2
    assert len(lines) == 1
    assert "none.json: no such file" in lines[0]


@pytest.mark.parametrize(
    ("args", "env", "word"),
    [
        (["--workers", "2"], {}, "--workers is 2"),
        (["--threads", "1"], {}, "--threads is 1"),
        (["-k", "sync", "--threads", "1"], {}, "--worker-class"),
        (["--max-requests", "10"], {}, "--max-requests"),
        ([], {"HTTP_NETWORK_RELAY_PING_INTERVAL": "x"}, "HTTP_NETWORK_RELAY_PING_INTERVAL"),
        ([], {"HTTP_NETWORK_RELAY_MAX_WINDOW": "1"}, "HTTP_NETWORK_RELAY_MAX_WINDOW"),
        ([], {"GUNICORN_CMD_ARGS": "--workers 3"}, "--workers is 3"),
    ],
)
def test_start_fails_with_one_line_when_a_setting_is_bad(
    tmp_path: Path, args: list[str], env: dict[str, str], word: str
) -> None:
    """Wherever it comes from: exit 2 and the setting's name."""
    status, lines = failed_start(tmp_path, args=args, env=env)
    assert status == 2
    assert len(lines) == 1
    assert word in lines[0]


def test_start_line_says_how_many_legs_there_is_room_for(tmp_path: Path) -> None:
    """Beside it stand the warnings of a file that others may read, with shared secrets."""
    shared = {"clients": {name: secret_of("cs-same") for name in ("a", "b")}, "proxy_users": []}
    path = write_credentials(tmp_path, shared)
    path.chmod(0o644)
    with start_server(tmp_path, threads=64, credentials=shared) as server:
        assert "INFO relay ready legs=64 clients_at_most=48 " in server.text
        assert server.text.count("WARNING clients share a secret") == 1
        assert server.text.count("WARNING credentials file is readable by others") == 1


def test_websockets_are_refused_when_another_worker_class_is_in_force(tmp_path: Path) -> None:
    """With -k gthread everything else works, and one ERROR line says what to do."""
    with start_server(tmp_path, args=["-k", "gthread"]) as server:
        for path, headers in ((CLIENT_PATH, client_headers()), (USER_PATH, user_headers())):
            answer = handshake_status(server.url + path, headers)
            assert (answer.status, answer.json["code"]) == (500, "wrong_worker")
        server.wait_for_line("ERROR websockets are refused code=wrong_worker fix=")
        assert server.text.count(" ERROR ") == 1
        assert server.health() == 200


def foreign(tmp_path: Path, *args: str, credentials: object = CREDENTIALS) -> Server:
    """Start gunicorn with another conf file than ours."""
    port = free_port()
    file = write_credentials(tmp_path, credentials)
    env = child_environment({"HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(file)})
    conf_file = tmp_path / "empty.py"
    conf_file.touch()
    argv = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *args]
    argv += ["-c", str(conf_file), "--no-control-socket", "wsgi:app"]
    return Server(argv, env=env, port=port, has_tls=False, credentials_file=file)


@pytest.mark.parametrize("args", [(), ("--threads", "8"), ("--workers", "2")])
def test_websockets_are_refused_when_our_settings_are_not_in_force(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    """Another conf file or folder drops our worker class silently; the relay says so."""
    with foreign(tmp_path, *args) as server:
        server.wait_healthy()
        answer = handshake_status(server.url + CLIENT_PATH, client_headers())
        assert (answer.status, answer.json["code"]) == (500, "wrong_worker")
        server.wait_for_line("ERROR websockets are refused code=wrong_worker fix=")


def test_start_ends_without_a_loop_when_our_settings_are_not_in_force(tmp_path: Path) -> None:
    """Then only the worker can check the file: one line from it, and the master ends too."""
    with foreign(tmp_path, credentials="{") as server:
        assert server.wait(10) == 3
        assert server.text.count("error: ") == 1
        assert "not JSON" in server.text
        assert "Traceback" not in server.text


def test_command_serves_when_it_is_run_as_a_module(tmp_path: Path) -> None:
    """`python -m server` needs no conf file in its folder, and shows no secret in `ps`."""
    port = free_port()
    file = write_credentials(tmp_path)
    argv = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--threads", "5", "--credentials-file", str(file), "--ping-interval", "7"]
    argv += ["--max-window", "300000"]
    env = child_environment()
    with Server(argv, env=env, port=port, has_tls=False, credentials_file=file) as server:
        server.wait_healthy()
        server.wait_for_line(
            "relay ready legs=5 clients_at_most=3 ping_interval_s=7 max_window_bytes=300000"
        )
        with RawClient(server.url) as client, RawUser(server.url) as user:
            user.send_open(limit=2**40)
            assert client.recv_control("open")["limit"] == 300000
        for pid in (server.pid, server.worker_pid):
            assert TOKEN not in command_line(pid)
            assert CLIENT_SECRET not in command_line(pid)
        server.terminate()
        assert server.wait(2) == 0


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--credentials-file", "/none.json"], "/none.json: no such file"),
        (["--threads", "1"], "--threads is 1"),
        (["--ping-interval", "x"], "--ping-interval"),
        (["--port", "70000"], "--port"),
        (
            ["--audit-log", "/proc/audit.jsonl"],
            "(--audit-log): /proc/audit.jsonl cannot be written",
        ),
    ],
)
def test_command_ends_with_exit_2_when_a_flag_is_wrong(
    tmp_path: Path, args: list[str], word: str
) -> None:
    """As gunicorn's own start: one line and no traceback."""
    file = write_credentials(tmp_path)
    env = child_environment({"HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(file)})
    with Proc([sys.executable, "-m", "server", *args], env=env) as process:
        assert process.wait(10) == 2
        assert word in process.lines[-1]
        assert "Traceback" not in process.text
