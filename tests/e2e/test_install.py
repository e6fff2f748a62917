"""`pip install .` and the script alone, as a new user has them, without the project's folder."""

import json
import os
import re
import shutil
import signal
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.flows import run, side_by_side
from tests.support.ports import free_port
from tests.support.processes import (
    CLIENT_NAME,
    CLIENT_SECRET,
    ROOT,
    TOKEN,
    Finished,
    Pipes,
    Proc,
    child_environment,
    wait_listening,
    write_credentials,
)
from tests.support.targets import EchoTarget

# The parts of the project that `pip install .` needs.
PARTS = (
    "http_network_relay",
    "client",
    "server",
    "ssh_proxy_command.py",
    "wsgi.py",
    "pyproject.toml",
    "README.md",
)
COMMANDS = ("server", "client", "ssh-proxy-command")
DEBIAN_PYTHON = "/usr/bin/python3"
INSTALL_S = 120.0
pytestmark = pytest.mark.timeout(2 * INSTALL_S)
HINT = "pip install websocket-client"
# The script's oldest Python; its inline metadata says the same.
OLDEST = (3, 9)
MINORS = range(OLDEST[1], 20)


def clean_environment(**extra: str) -> dict[str, str]:
    """Without this project on any path."""
    env = child_environment(extra)
    if "PYTHONPATH" not in extra:
        del env["PYTHONPATH"]
    return env


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a copy, because a build leaves folders behind; return the commands' folder."""
    folder = tmp_path_factory.mktemp("install")
    project, environment = folder / "project", folder / "venv"
    project.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / part)
    # This environment's pip can install there: a pip of its own would cost seconds. Python
    # compiles what it imports, so pip need not compile all.
    venv.create(environment, with_pip=False, symlinks=True)
    argv = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    argv += ["--quiet", "--disable-pip-version-check", "install", "--no-compile", str(project)]
    with Proc(argv, env=clean_environment(), cwd=folder) as process:
        assert process.wait(INSTALL_S) == 0, process.text
    return environment / "bin"


@pytest.fixture(scope="module")
def server_url(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A relay of the installed commands, started in a folder with nothing of the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    credentials = write_credentials(folder)
    (folder / "secret").write_text(CLIENT_SECRET + "\n")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = [str(installed / "server"), "--port", str(port), "--threads", "8"]
    server += ["--credentials-file", str(credentials)]
    client = [str(installed / "client"), "--server_url", url, "--client-name", CLIENT_NAME]
    client += ["--client-secret-file", "secret"]
    with Proc(server, env=clean_environment(), cwd=folder) as server_process:
        wait_listening(server_process, port)
        with Proc(client, env=clean_environment(), cwd=folder) as client_process:
            client_process.wait_for_line("registered")
            yield url


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The script, copied alone into an empty folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    script = "ssh_proxy_command.py"
    shutil.copy(Path(__file__).resolve().parents[2] / script, folder / script)
    return folder / script


def echo(argv: list[str], server_url: str, folder: Path, env: dict[str, str]) -> Finished:
    """Run a proxy command `argv` to an echo; what it said and how it ended."""
    (folder / "token").write_text(TOKEN + "\n")
    with EchoTarget() as target:
        # As a user types it, with flags only.
        argv = [*argv, CLIENT_NAME, "127.0.0.1", str(target.port), "--server-url", server_url]
        with Pipes([*argv, "--secret-key-file", "token"], env=env, cwd=folder) as proxy:
            return proxy.finish(b"there and back")


WENT_WELL = Finished(0, b"there and back", [])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_answers_help_when_installed(installed: Path, tmp_path: Path, command: str) -> None:
    """`pip install .` gives the three commands."""
    done = run([str(installed / command), "--help"], env=clean_environment(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: ")
    assert b"HTTP_NETWORK_RELAY_" in done.stdout


def test_tunnel_works_when_all_three_are_installed_commands(
    installed: Path, server_url: str, tmp_path: Path
) -> None:
    """A whole tunnel without the project's folder."""
    argv = [str(installed / "ssh-proxy-command")]
    assert echo(argv, server_url, tmp_path, clean_environment()) == WENT_WELL


def test_command_says_nothing_when_ctrl_c_comes_during_its_start(
    installed: Path, tmp_path: Path
) -> None:
    """No traceback while the imports of the installed command are still on their way."""
    (tmp_path / "websocket.py").write_text(
        "import os, signal, threading\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Event().wait(10)\n"
    )
    argv = [str(installed / "ssh-proxy-command")]
    done = echo(argv, "ws://127.0.0.1:1", tmp_path, clean_environment(PYTHONPATH=str(tmp_path)))
    assert done == Finished(-signal.SIGINT, b"", [])


def test_script_works_alone_when_websocket_client_is_the_newest(
    installed: Path, server_url: str, alone: Path
) -> None:
    """Executable as it is, by its own first line."""
    env = clean_environment(PATH=f"{installed}{os.pathsep}{os.environ['PATH']}")
    assert echo([str(alone)], server_url, alone.parent, env) == WENT_WELL


@pytest.mark.debian("python3-websocket")
def test_script_works_alone_when_websocket_client_is_debians(server_url: str, alone: Path) -> None:
    """Debian's own Python and package; 1.2.3 in Debian 12."""
    version = run([DEBIAN_PYTHON, "-c", "import websocket; print(websocket.__version__)"])
    print("websocket-client", version.stdout.decode().strip())
    argv = [DEBIAN_PYTHON, "-W", "error", str(alone)]
    assert echo(argv, server_url, alone.parent, clean_environment()) == WENT_WELL


def test_script_says_how_to_get_it_when_websocket_client_is_missing(
    alone: Path, tmp_path: Path
) -> None:
    """One line, exit 2; and the same with another package of that module name."""
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    argv = [str(bare / "bin" / "python"), str(alone)]
    missing = echo(argv, "ws://127.0.0.1:1", tmp_path, clean_environment())
    assert (missing.status, missing.stdout, len(missing.lines)) == (2, b"", 1)
    assert HINT in missing.lines[0]

    other = tmp_path / "other"
    (other / "websocket").mkdir(parents=True)
    (other / "websocket" / "__init__.py").write_text("class WebSocketServer: pass\n")
    env = clean_environment(PYTHONPATH=str(other))
    wrong = echo(argv, "ws://127.0.0.1:1", tmp_path, env)
    assert (wrong.status, wrong.stdout, len(wrong.lines)) == (2, b"", 1)
    assert "another package" in wrong.lines[0]
    assert HINT in wrong.lines[0]


def interpreters() -> list[str]:
    """Every Python on PATH that is new enough, by its path."""
    found = {}
    for name in ["python3", *(f"python3.{minor}" for minor in MINORS)]:
        path = shutil.which(name)
        if path is None:
            continue
        ask = "import json, sys; print(json.dumps([sys.version_info[:2], sys.executable]))"
        done = run([path, "-c", ask], env=clean_environment())
        if done.returncode == 0:  # else a version manager's empty shim
            version, real_path = json.loads(done.stdout)
            if tuple(version) >= OLDEST:
                found[str(version)] = real_path
    return list(found.values())


def test_script_answers_help_when_any_python_here_runs_it(alone: Path) -> None:
    """Every interpreter from 3.9 on that PATH has; no syntax and no import is too new."""
    paths = interpreters()
    assert paths
    print(" ".join(paths))

    def ask(python: str) -> None:
        argv = [python, "-W", "error", str(alone)]
        asked = run([*argv, "--help"], env=clean_environment(), cwd=alone.parent)
        assert (asked.returncode, asked.stderr) == (0, b""), python
        assert asked.stdout.startswith(b"usage: "), python

    side_by_side([lambda python=python: ask(python) for python in paths])


def test_metadata_is_what_is_installed_when_a_runner_reads_it(alone: Path) -> None:
    """PEP 723: `uv run` and `pipx run` take the requirements from the script itself."""
    text = alone.read_text("utf-8")
    block = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", text)
    assert block is not None
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in block[1]
    assert 'dependencies = ["websocket-client>=1.2.3"]' in block[1]
    assert os.access(alone, os.X_OK)
    assert sys.version_info >= OLDEST
