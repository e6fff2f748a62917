"""What the end-to-end tests share: slow things begun early, and logs in reports of failures."""

import shutil
import sys
from collections.abc import Generator, Iterator

import pytest

from tests.support import processes
from tests.support.early import CLIENTS, OFFLINE, Installation, Slow
from tests.support.processes import (
    CREDENTIALS,
    ROOT,
    Proc,
    child_environment,
    running_relay,
)
from tests.support.raw import RawClient
from tests.support.targets import black_hole_port

# Fixtures that take long: begun before the first test of a run that has a test for them.
EARLY = ("slow", "installation")
# The parts of the project that `pip install .` needs.
_PARTS = (
    "http_network_relay",
    "client",
    "server",
    "ssh_proxy_command.py",
    "wsgi.py",
    "pyproject.toml",
    "README.md",
)

_LINES_SHOWN = 60


@pytest.fixture(scope="session", autouse=True)
def _early(request: pytest.FixtureRequest) -> None:
    """Begin what takes long, so that it runs beside the other tests."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in EARLY:
        if name in wanted:
            request.getfixturevalue(name)


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    """On a relay of their own, which nothing else disturbs."""
    credentials = {**CREDENTIALS, "clients": CLIENTS}
    with (
        running_relay(tmp_path_factory.mktemp("slow"), credentials=credentials) as relay,
        RawClient(relay.url, OFFLINE, CLIENTS[OFFLINE]),
        black_hole_port() as port,
        relay.proxy(port) as target_is_silent,
        relay.proxy(port, name=OFFLINE) as client_is_silent,
    ):
        yield Slow(target_is_silent, client_is_silent)


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Of a copy, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("install")
    project, environment = folder / "project", folder / "venv"
    project.mkdir()
    for part in _PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / part)
    python = environment / "bin" / "python"
    # Without a pip of its own, which costs seconds: this one's can install there.
    line = (
        '"$0" -m venv --without-pip "$1" && '
        '"$0" -m pip --python "$2" --quiet --disable-pip-version-check install "$3"'
    )
    argv = ["sh", "-c", line, sys.executable, str(environment), str(python), str(project)]
    env = child_environment()
    del env["PYTHONPATH"]
    with Proc(argv, env=env, cwd=folder) as process:
        yield Installation(process, environment / "bin")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The harness shows what a test itself started; this adds its fixtures' programs."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            parts = [value] + [
                getattr(value, name, None) for name in ("server", "client", "process")
            ]
            for process in parts:
                if isinstance(process, Proc) and process not in processes.started:
                    text = "\n".join(process.lines[-_LINES_SHOWN:])
                    report.sections.append((repr(process), text))
    return report
