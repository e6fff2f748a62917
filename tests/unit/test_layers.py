"""Which file may import what, and what stands once: the arrows of docs/architecture.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ssh_proxy_command.py"
SERVER = sorted((ROOT / "server").glob("*.py"))
CLIENT = sorted((ROOT / "client").glob("*.py"))
SHIPPED = [*SERVER, *CLIENT, SCRIPT, ROOT / "wsgi.py", ROOT / "gunicorn.conf.py"]
# What the script's block is made of, and so has to run where the script does.
BLOCK = ["wire", "errors", "backoff", "settings", "outbox", "duplex", "framing", "outlet"]
BLOCK += ["gather", "window", "stream", "dial", "transport", "tunnel_end", "timer"]
SCRIPT_PYTHON = (3, 9)
# May be imported by these files alone.
FENCED = {
    "simple_websocket": {"server/transport.py"},
    "flask": {"server/app.py"},
    "flask_sock": {"server/app.py"},
    "websocket": {"client/transport.py", "ssh_proxy_command.py"},
}
# client/: who may import whom, from the bottom up; an import goes down only.
CLIENT_LEVELS = [
    {"wire", "errors", "backoff", "duplex"},
    {"outbox", "settings", "rules", "framing", "window", "gather"},
    {"dial", "stream", "outlet", "covering"},
    {"transport", "tunnel_end", "timer"},
    {"tunnel", "config"},
    {"tunnels"},
    {"leg"},
    {"agent"},
    {"__main__"},
]
# What knows no socket, clock, thread or log.
PURE = {
    "client/wire.py": {"json", "re"},
    "client/stream.py": set(),
    "client/window.py": set(),
    "client/errors.py": set(),
    "client/backoff.py": {"os"},
    "client/gather.py": set(),
    "client/rules.py": {"dataclasses", "ipaddress", "re"},
    "client/covering.py": {"itertools"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, at whatever depth."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            if node.module in ("server", "client"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports_of(path)}


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_three_programs_never_import_each_other(path: Path) -> None:
    """server/, client/ and the script each stand alone; nothing imports the tests."""
    mine = {"server", "wsgi"} if path.parent != ROOT / "client" else {"client"}
    mine = set() if path == SCRIPT else mine
    others = {"server", "client", "ssh_proxy_command", "wsgi", "tests"} - mine
    assert not tops_of(path) & others
    if path.parent == ROOT / "server":
        assert "wsgi" not in tops_of(path)


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_library_is_imported_by_its_own_file_only(path: Path) -> None:
    """Each foreign library is met in one file, where its errors and traps are handled."""
    for library, allowed in FENCED.items():
        if library in tops_of(path):
            assert name_of(path) in allowed, library


@pytest.mark.parametrize(("library", "files"), FENCED.items())
def test_fence_stands_around_something(library: str, files: set[str]) -> None:
    """A fenced library that nobody imports any more would guard nothing."""
    if library == "simple_websocket":
        files = set()  # flask-sock makes its objects; our file is handed them.
    assert all(library in tops_of(ROOT / file) for file in files)


@pytest.mark.parametrize("path", CLIENT, ids=name_of)
def test_arrows_of_the_client_go_down(path: Path) -> None:
    """A file imports what stands below it, never beside or above."""
    if path.stem == "__init__":
        assert not list(imports_of(path))
        return
    level = {name: number for number, names in enumerate(CLIENT_LEVELS) for name in names}
    for module in imports_of(path):
        if module.startswith("client."):
            assert level[module.removeprefix("client.")] < level[path.stem], module


@pytest.mark.parametrize("path", SERVER, ids=name_of)
def test_flask_and_gunicorn_stay_at_the_servers_edge(path: Path) -> None:
    """Nothing but the entry points knows the application or gunicorn's worker."""
    wanted = {module for module in imports_of(path) if module.startswith("server.")}
    if "server.app" in wanted:
        assert path.stem in {"__main__", "gunicorn_conf", "worker"}
    if "server.transport" in wanted:
        assert path.stem in {"leg", "user_leg", "app", "relay"}


def loaded_by(*argv: str) -> set[str]:
    """The modules that a Python program imports in its life."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, check=False
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}


def test_script_starts_without_modules_that_it_hardly_needs() -> None:
    """Each would cost every ssh a millisecond or more, up to the end of a try to connect."""
    target = ["device", "127.0.0.1", "22", "--server-url", "http://127.0.0.1:1"]
    loaded = loaded_by(str(SCRIPT), *target, "--secret-key", "x")
    needed = loaded_by("-c", "import websocket, ssl, json")
    assert {"argparse", "websocket", "ipaddress"} <= loaded
    assert not {"shutil", "random", "queue", "encodings.idna", "dataclasses"} & (loaded - needed)


@pytest.mark.parametrize(("file", "allowed"), PURE.items(), ids=PURE)
def test_state_and_wire_know_no_socket_clock_thread_or_log(file: str, allowed: set[str]) -> None:
    """Protocol apart from I/O: only names for types, and what computing needs."""
    tops = tops_of(ROOT / file) - {"__future__", "typing", "collections", "client"}
    assert tops == allowed


@pytest.mark.parametrize("path", CLIENT, ids=name_of)
def test_client_needs_only_websocket_client(path: Path) -> None:
    """The client runs from the standard library and one package."""
    known = {"client", "websocket"} | set(sys.stdlib_module_names)
    assert tops_of(path) <= known


def test_script_needs_only_websocket_client() -> None:
    """One file that is copied alone."""
    assert tops_of(SCRIPT) <= {"websocket"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [ROOT / "client" / "transport.py", SCRIPT], ids=name_of)
def test_library_is_imported_late(path: Path) -> None:
    """`import websocket` stands in a function: its absence is a sentence, not a traceback."""
    for node in tree_of(path).body:
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        assert "websocket" not in names


def test_wsgi_holds_the_application_and_nothing_else() -> None:
    """`wsgi:app` and its two imports."""
    body = tree_of(ROOT / "wsgi.py").body
    rest = [node for node in body if not isinstance(node, ast.Expr | ast.ImportFrom)]
    assert [ast.unparse(node) for node in rest] == ["app = create_app(Config.from_env())"]
    assert set(imports_of(ROOT / "wsgi.py")) == {"server.app", "server.config"}


def test_gunicorn_conf_at_the_root_only_points_to_the_servers() -> None:
    """One import; a second setting there would be lost with `-c`."""
    body = tree_of(ROOT / "gunicorn.conf.py").body[1:]
    assert [ast.unparse(node) for node in body] == ["from server.gunicorn_conf import *"]


def test_copies_of_the_shared_code_are_what_client_says() -> None:
    """`.ci/sync.py --check`: server/ and the script's block hold client/'s text."""
    command = [sys.executable, str(ROOT / ".ci" / "sync.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_of_the_copies_sees_a_difference(tmp_path: Path) -> None:
    """A byte more, a tail less, a file that is missing: each is told by its name."""
    for folder in (".ci", "client", "server"):
        (tmp_path / folder).mkdir()
    for path in (ROOT / ".ci" / "sync.py", SCRIPT, *CLIENT, *SERVER):
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())

    def check() -> tuple[int, str]:
        command = [sys.executable, str(tmp_path / ".ci" / "sync.py"), "--check"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout

    assert check() == (0, "")
    text = (tmp_path / "server" / "outbox.py").read_text("utf-8")
    (tmp_path / "server" / "outbox.py").write_text(text + "\n", "utf-8")
    script = SCRIPT.read_text("utf-8").splitlines(keepends=True)
    end = script.index("# --- end of the shared block ---\n")
    short = script[: end - 4] + script[end:]  # The block's last lines.
    (tmp_path / SCRIPT.name).write_text("".join(short), "utf-8")
    (tmp_path / "server" / "duplex.py").unlink()
    status, output = check()
    assert status == 1
    assert [line.split()[0] for line in output.splitlines()] == [
        "server/outbox.py",
        "server/duplex.py",
        "ssh_proxy_command.py",
    ]


@pytest.mark.parametrize(
    "path", [SCRIPT, *(ROOT / "client" / f"{name}.py" for name in BLOCK)], ids=name_of
)
def test_block_and_script_are_python_3_9(path: Path) -> None:
    """The grammar of the laptop's own Python: no `match`, no bracketed `with`."""
    ast.parse(path.read_text("utf-8"), str(path), feature_version=SCRIPT_PYTHON)


@pytest.mark.parametrize(
    "path", [SCRIPT, *(ROOT / "client" / f"{name}.py" for name in BLOCK)], ids=name_of
)
def test_block_and_script_use_nothing_newer_at_run_time(path: Path) -> None:
    """What only a newer library has: `X | Y` in isinstance, zip(strict=), dataclass(slots=)."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            keywords = {keyword.arg for keyword in node.keywords}
            assert not keywords & {"slots", "kw_only"}, ast.unparse(node)
            assert name != "zip" or "strict" not in keywords, ast.unparse(node)
            if name == "isinstance":
                assert not isinstance(node.args[1], ast.BinOp), ast.unparse(node)
    # Annotations may use new syntax only because they are not evaluated.
    assert any(
        isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
    )


def constants_of(path: Path) -> dict[str, ast.expr]:
    """Module-level NAME = value, with and without annotation."""
    found: dict[str, ast.expr] = {}
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                assert isinstance(target, ast.Name)
                found[target.id] = node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = node.value
    return found


@pytest.mark.parametrize("folder", ["server", "client"])
def test_constant_of_the_wire_stands_once(folder: str) -> None:
    """wire.py alone defines its names; the others import them."""
    wire = constants_of(ROOT / folder / "wire.py")
    shared = {name for name in wire if name.isupper() and not name.startswith("_")}
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.stem != "wire":
            assert not shared & set(constants_of(path)), path


@pytest.mark.parametrize("folder", ["server", "client"])
def test_words_of_the_wire_stand_once(folder: str) -> None:
    """Paths, header names and the subprotocol are not written out anywhere else."""
    values = (node.value for node in constants_of(ROOT / folder / "wire.py").values()
              if isinstance(node, ast.Constant))  # fmt: skip
    words = {value for value in values if isinstance(value, str) and len(value) > 8}
    assert words
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.stem == "wire":
            continue
        strings = {
            node.value
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & strings, path


@pytest.mark.parametrize("folder", ["server", "client"])
def test_number_of_the_wire_is_imported(folder: str) -> None:
    """Close codes of four digits are known by their names outside wire.py."""
    codes = {
        node.value
        for name, node in constants_of(ROOT / folder / "wire.py").items()
        if name.startswith("CLOSE_") and isinstance(node, ast.Constant)
    }
    assert len(codes) > 5
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.stem == "wire":
            continue
        used = {
            node.value
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Constant) and type(node.value) is int
        }
        # 1000 is also what turns seconds into milliseconds.
        assert not used & (codes - {1000}), path


def test_script_defines_each_name_once() -> None:
    """A name of the script's own part must not replace one of the block, nor one file's another's.

    The block is one namespace made of many files: two private helpers of one name would
    silently be the second.
    """
    seen: set[str] = set()
    for node in tree_of(SCRIPT).body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            assert name not in seen, name
            seen.add(name)


@pytest.mark.parametrize("path", [*CLIENT, *SERVER, SCRIPT], ids=name_of)
def test_no_thread_is_started_and_no_log_written_at_import(path: Path) -> None:
    """Importing a file has no effect that another file or a fork would notice."""
    effects = {"Thread", "start", "Timer", "socket", "open", "connect", "basicConfig", "signal"}
    effects |= {"print", "debug", "info", "warning", "error", "exception", "setswitchinterval"}
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
            for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
                func = call.func
                name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "?")
                assert name not in effects, ast.unparse(call)
