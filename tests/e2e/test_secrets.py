"""No secret in any log, message or command line; and the demo, which makes its own."""

import base64
import json
import re
import shlex
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import debian
from tests.support.flows import run
from tests.support.ports import free_port
from tests.support.processes import (
    CLIENT_NAME,
    CLIENT_SECRET,
    ROOT,
    TOKEN,
    Pipes,
    Proc,
    child_environment,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import connect as connect_raw
from tests.support.raw import handshake_status
from tests.support.targets import EchoTarget, ResetTarget

WRONG_SECRET = "cs-wrong-4hXq0ZkV3yB9uXn5rLmD2fGs8"
WRONG_TOKEN = "pu-wrong-7bN0zYt6sHk9dCg3fJlUiAoQe4"
PROXY_PASSWORD = "pw-R1xWm7bN0zYt6sHk9"
# The demo's second and Ctrl-C's.
STOP_S = 10.0


def forms(secret: str) -> list[str]:
    """A secret as it is, and as HTTP Basic sends it in pairs."""
    pairs = [f"{name}:{secret}" for name in (CLIENT_NAME, "me", "nobody")]
    return [secret, *(base64.b64encode(pair.encode()).decode().rstrip("=") for pair in pairs)]


def check_no_secret(text: str, *secrets: str) -> None:
    """None of the secrets in any form, and nothing as long as a resume token."""
    found = [form[:6] + "..." for secret in secrets for form in forms(secret) if form in text]
    assert not found, f"{found} in:\n{text}"
    assert not re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", text), "a resume token?"


def command_lines() -> str:
    """What `ps` shows of every process on this machine."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # It has ended.
            continue
    return "\n".join(lines)


def test_no_secret_is_shown_when_all_talk_most(tmp_path: Path) -> None:
    """Right and wrong secrets, good and bad ends, every log at its most talkative."""
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    args = ["--log-level", "debug", "--access-logfile", "-"]
    secrets = (CLIENT_SECRET, TOKEN, WRONG_SECRET, WRONG_TOKEN, PROXY_PASSWORD)
    with ExitStack() as stack:
        enter = stack.enter_context
        server = enter(start_server(tmp_path, args=args))
        client = enter(start_client(server.url, args=["--verbose"]))
        wrong = enter(start_client(server.url, secret=WRONG_SECRET, args=["--verbose"], wait=False))
        echo, reset = enter(EchoTarget()), enter(ResetTarget(1))
        dead = f"http://me:{PROXY_PASSWORD}@127.0.0.1:{free_port()}"
        by_file = ["--secret-key-file", str(token_file)]
        ways: list[tuple[int, int, dict[str, Any]]] = [
            (echo.port, 0, {}),
            (echo.port, 0, {"token": None, "args": by_file}),
            (echo.port, 3, {"token": WRONG_TOKEN}),
            (echo.port, 2, {"token": f"{TOKEN} "}),
            (echo.port, 4, {"name": "nobody"}),
            (free_port(), 5, {}),
            (reset.port, 1, {}),
            (echo.port, 6, {"env": {"http_proxy": dead}}),
        ]
        proxies = []
        for port, status, options in ways:
            proxy = enter(start_proxy(server.url, port=port, **options))
            assert proxy.finish(b"x").status == status, proxy.text
            proxies.append(proxy)
        # Peers that put a secret where it does not belong, or break HTTP around it.
        for header in (TOKEN, f"Basic {TOKEN}", f"Bearer {CLIENT_SECRET}", f"Bearer {TOKEN}x"):
            url = f"{server.url}/ws_for_ssh_proxy_command"
            assert handshake_status(url, {"Authorization": header}).status == 401
        handshake_status(f"{server.url}/ws_for_clients?secret={CLIENT_SECRET}")
        with connect_raw(server.url) as sock:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{TOKEN} : {TOKEN}\r\n\r\n".encode())
            sock.recv(4096)
        wrong.wait_for_line("ERROR .*refused")
        # A user's line that is idle, to be seen in `ps` with all the others.
        brief = [*by_file, "--resume-timeout", "1"]
        idle = enter(start_proxy(server.url, port=echo.port, token=None, args=brief))
        idle.send(b"x")
        assert idle.receive_exactly(1) == b"x"

        check_no_secret(command_lines(), *secrets)
        server.terminate()
        server.wait()
        assert idle.wait() == 1
        client.terminate()
        client.wait()
        for process in (server, client, wrong, idle, *proxies):
            # The access log has paths, and whoever writes a secret into one is past help.
            text = process.text.replace(f"?secret={CLIENT_SECRET}", "")
            check_no_secret(text, *secrets)
        # The logs did talk.
        assert "[DEBUG]" in server.text
        assert "request unreadable" in server.text
        assert server.text.count("code=unauthorized") >= 6


@pytest.mark.parametrize(("mode", "warned"), [(0o644, True), (0o600, False)])
def test_warning_is_given_when_others_can_read_the_credentials(
    tmp_path: Path, mode: int, warned: bool
) -> None:
    """It starts all the same, and says what to do."""
    path = tmp_path / "credentials.json"
    path.touch()
    path.chmod(mode)
    with start_server(tmp_path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == mode
    warnings = [line for line in server.lines if "WARNING" in line]
    assert len(warnings) == warned, server.text
    assert all(str(path) in line and "chmod" in line for line in warnings)


# The demo.

PARTS = (
    "http_network_relay",
    "client",
    "server",
    "deploy",
    "ssh_proxy_command.py",
    "wsgi.py",
    "gunicorn.conf.py",
)


def descendants(pid: int) -> set[int]:
    """All processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | descendants(child)
    return found


@contextmanager
def demo(folder: Path, ssh_port: int) -> Iterator[tuple[Proc, str]]:
    """What `make run` starts, from a copy of the project; and the line that it prints."""
    port = free_port()
    argv = [sys.executable, "deploy/demo.py", "--port", str(port), "--ssh-port", str(ssh_port)]
    env = child_environment()
    del env["PYTHONPATH"]
    with Proc(argv, env=env, cwd=folder) as process:
        line = process.wait_for_line(r"^ +ssh -o ProxyCommand=|^ +ssh -o 'ProxyCommand=", 20)
        assert f":{port} " in line
        below = descendants(process.pid)
        assert len(below) == 3  # the server's two and the client
        yield process, line.strip()
        process.signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0
        gone = [not Path(f"/proc/{pid}").exists() for pid in below]
        assert gone == [True] * len(below), "the demo left a process behind"


@pytest.mark.debian("openssh-client", "openssh-server")
def test_printed_line_logs_in_when_the_demo_runs(tmp_path: Path) -> None:
    """`make run`'s line, pasted; no secret in it, in its output or in `ps`; nothing left."""
    project = tmp_path / "project % with a space"
    project.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, project / part)
    with debian.run_sshd(tmp_path / "sshd") as sshd:
        with demo(project, sshd.port) as (process, line):
            credentials = json.loads((project / "credentials.json").read_text())
            secrets = [*credentials["clients"].values(), *credentials["proxy_users"]]
            # The user's own keys and known hosts, which the demo cannot know.
            ssh, *rest = shlex.split(line)
            done = run([ssh, *sshd.options, *rest, "echo logged in"], env=child_environment())
            assert (done.returncode, done.stdout, done.stderr) == (0, b"logged in\n", b"")
            with Pipes([ssh, *sshd.options, *rest, "cat"], env=child_environment()) as session:
                session.send(b"x")
                assert session.receive_exactly(1) == b"x"
                check_no_secret(command_lines(), *secrets)
            check_no_secret(process.text, *secrets)
        for path, mode in (
            (project / "credentials.json", 0o600),
            (project / ".run", 0o700),
            *((path, 0o600) for path in (project / ".run").iterdir()),
        ):
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
        # Again with the same secrets, so that a line pasted yesterday works today.
        with demo(project, sshd.port):
            assert json.loads((project / "credentials.json").read_text()) == credentials
    assert len({*secrets}) == 2
    assert min(map(len, secrets)) >= 32


def test_ports_can_be_chosen_when_make_runs_the_demo() -> None:
    """make run PORT=... SSH_PORT=..."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = run([make, "--dry-run", "run", "PORT=1234", "SSH_PORT=2222"], cwd=ROOT)
    assert done.returncode == 0
    assert b"deploy/demo.py --port 1234 --ssh-port 2222\n" in done.stdout
