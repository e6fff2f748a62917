"""Which file may import what, and what stands once: the arrows of docs/architecture.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from http_network_relay.wire.codes import CloseCode

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ssh_proxy_command.py"
PACKAGES = ("http_network_relay", "server", "client")
SHARED, SERVER, CLIENT = (sorted((ROOT / name).rglob("*.py")) for name in PACKAGES)

ENTRIES = [ROOT / "wsgi.py", ROOT / "gunicorn.conf.py"]
SHIPPED = [*SHARED, *SERVER, *CLIENT, *ENTRIES, SCRIPT]
SCRIPT_PYTHON = (3, 9)

# The arrows of docs/architecture.md, from the bottom up. A module imports from its own row
# and from the rows below, never from a row above. A prefix stands for all below it, unless
# a longer prefix stands elsewhere.
SHARED_ROWS = [
    {"http_network_relay", "http_network_relay.wire"},
    {"http_network_relay.leg", "http_network_relay.rules"},
    {"http_network_relay.settings", "http_network_relay.timer"},
    {"http_network_relay.end", "http_network_relay.dial"},
    {"http_network_relay.proxy_command", "http_network_relay.tools"},
]
SERVER_ROWS = [
    *SHARED_ROWS[:3],
    {"server.logs", "server.service_thread"},
    {"server.addresses", "server.log_paths"},
    {"server.config"},
    {"server.tunnels", "server.access", "server.audit"},
    {"server.limits"},
    {"server.legs", "server.registry"},
    {"server.relay", "server.live_legs", "server.tunnel_opener"},
    {"server.app"},
    {"server.worker"},
    {"server.__main__", "server.access.command", "wsgi", "gunicorn.conf"},
]
CLIENT_ROWS = [
    *SHARED_ROWS,
    {"client.config"},
    {"client.forwarder"},
    {"client.tunnel_table"},
    {"client.leg"},
    {"client.agent"},
    {"client.__main__"},
]
# Not even downwards: who imports -> what is never imported.
NEVER = {
    "http_network_relay": ("server", "client"),
    "client": ("server", "http_network_relay.proxy_command"),
    "server": (
        "client",
        *(f"http_network_relay.{name}" for name in ("end", "dial", "proxy_command")),
    ),
    "server.tunnels": ("server.legs",),
    # A class of settings opens no log and no socket.
    "server.config": ("server.logs", "server.audit", "logging", "socket"),
    "client.config": ("logging", "socket"),
    "http_network_relay.settings": ("logging", "socket"),
}
# May be imported by these files alone.
FENCED = {
    "flask": {"server/app.py"},
    "flask_sock": {"server/app.py"},
    "werkzeug": {"server/app.py"},
    "simple_websocket": set(),  # flask-sock builds its objects; one file is handed them.
    "wsproto": {"server/legs/websocket.py"},
    "gunicorn": {
        "server/__main__.py",
        "server/worker/gunicorn_settings.py",
        "server/worker/relay_worker.py",
    },
    "websocket": {"http_network_relay/dial/connection.py", "ssh_proxy_command.py"},
}
# What knows no socket, clock, thread or log.
PURE = {
    "http_network_relay/wire/constants.py": set(),
    "http_network_relay/wire/codes.py": {"enum"},
    "http_network_relay/wire/errors.py": set(),
    "http_network_relay/wire/frames.py": {"functools", "struct"},
    "http_network_relay/wire/controls.py": {"json", "re"},
    "http_network_relay/end/stream.py": set(),
    "http_network_relay/end/window.py": set(),
    "http_network_relay/end/read_coalescer.py": set(),
    "http_network_relay/dial/backoff.py": {"os"},
    "http_network_relay/rules/target.py": {"dataclasses", "ipaddress", "re"},
    "http_network_relay/rules/shadowed.py": {"itertools"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Return every module that the file names in an import, at whatever depth."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in modules)


def module_of(path: Path) -> str:
    name = name_of(path).removesuffix(".py").removesuffix("/__init__")
    return name.replace("/", ".")


MODULES = {module_of(path): path for path in SHIPPED}


def tops_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports_of(path)}


def is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def row_of(module: str, rows: list[set[str]]) -> int:
    """The row of the longest prefix that fits."""
    fits = [
        (len(prefix), row)
        for row, prefixes in enumerate(rows)
        for prefix in prefixes
        if is_below(module, prefix)
    ]
    assert fits, f"{module} stands in no row"
    return max(fits)[1]


def upwards(rows: list[set[str]], paths: list[Path]) -> list[str]:
    """The imports that go to a row above that of their file."""
    return [
        f"{module_of(path)} -> {wanted}"
        for path in paths
        for wanted in imports_of(path)
        if wanted in MODULES and row_of(wanted, rows) > row_of(module_of(path), rows)
    ]


@pytest.mark.parametrize(
    ("rows", "paths"),
    [
        (SHARED_ROWS, SHARED),
        (SERVER_ROWS, [*SERVER, *ENTRIES]),
        (CLIENT_ROWS, CLIENT),
    ],
    ids=PACKAGES,
)
def test_arrows_go_down(rows: list[set[str]], paths: list[Path]) -> None:
    """A file imports from its own row and from those below."""
    assert upwards(rows, paths) == []


def test_arrow_upwards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule above can fail: a frame that knows a tunnel's end."""
    path = tmp_path / "http_network_relay" / "wire" / "frames.py"
    path.parent.mkdir(parents=True)
    path.write_text("from http_network_relay.end.stream import Stream\n", "utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert upwards(SHARED_ROWS, [path]) == [
        "http_network_relay.wire.frames -> http_network_relay.end.stream"
    ]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the members of one circle, in its order; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for wanted in sorted(graph.get(module, ())):
            if found := walk(wanted, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_no_imports_form_a_circle() -> None:
    """Neither files nor folders, imports for type checkers included."""
    files = {
        module: {wanted for wanted in imports_of(path) if wanted in MODULES and wanted != module}
        for module, path in MODULES.items()
    }
    assert circle_in(files) == []
    folders: dict[str, set[str]] = {}
    for module, wanted in files.items():
        # A file directly in a program's folder stands for itself.
        mine = folder_of(module)
        folders.setdefault(mine, set()).update(map(folder_of, wanted))
        folders[mine].discard(mine)
    assert circle_in(folders) == []


def folder_of(module: str) -> str:
    parts = module.split(".")
    is_in_folder = MODULES[module].name != "__init__.py" and len(parts) > 2
    return ".".join(parts[:-1]) if is_in_folder else module


def test_circle_is_found() -> None:
    """The search above can fail."""
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(("importer", "never"), NEVER.items(), ids=NEVER)
def test_some_arrows_are_never_drawn(importer: str, never: tuple[str, ...]) -> None:
    """Not even downwards."""
    paths = [path for module, path in MODULES.items() if is_below(module, importer)]
    assert paths
    for path in paths:
        found = [
            wanted
            for wanted in imports_of(path)
            if any(is_below(wanted, prefix) for prefix in never)
        ]
        assert found == [], path


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_imports_tests_or_the_script(path: Path) -> None:
    """The single file is a product, and no part of any program."""
    assert not tops_of(path) & {"tests", "ssh_proxy_command", "benchmarks"}


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_library_is_imported_by_its_own_file_only(path: Path) -> None:
    """Each foreign library is met in few files, where its errors and traps are handled."""
    for library, allowed in FENCED.items():
        if library in tops_of(path):
            assert name_of(path) in allowed, library


@pytest.mark.parametrize(("library", "files"), FENCED.items())
def test_fence_stands_around_something(library: str, files: set[str]) -> None:
    """A fenced library that nobody imports any more would guard nothing."""
    assert all(library in tops_of(ROOT / file) for file in files)


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
    tops = tops_of(ROOT / file) - {"__future__", "typing", "collections", "http_network_relay"}
    assert tops == allowed


@pytest.mark.parametrize("path", [*CLIENT, *SHARED], ids=name_of)
def test_client_needs_only_websocket_client(path: Path) -> None:
    """The client runs from the standard library and one package."""
    known = {"client", "http_network_relay", "websocket"} | set(sys.stdlib_module_names)
    assert tops_of(path) <= known


def test_script_needs_only_websocket_client() -> None:
    """One file that is copied alone."""
    assert tops_of(SCRIPT) <= {"websocket"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "path", [ROOT / "http_network_relay" / "dial" / "connection.py", SCRIPT], ids=name_of
)
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
    assert [ast.unparse(node) for node in body] == ["from server.worker.gunicorn_settings import *"]


def test_script_is_what_the_package_says() -> None:
    """`.ci/amalgamate.py --check`: the whole text of the single file."""
    command = [sys.executable, str(ROOT / ".ci" / "amalgamate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("path", [SCRIPT, *SHARED], ids=name_of)
def test_script_and_package_are_python_3_9(path: Path) -> None:
    """The grammar of the laptop's own Python: no `match`, no bracketed `with`."""
    ast.parse(path.read_text("utf-8"), str(path), feature_version=SCRIPT_PYTHON)


@pytest.mark.parametrize(
    "path", [SCRIPT, *(path for path in SHARED if path.stem != "__init__")], ids=name_of
)
def test_script_and_package_use_nothing_newer_at_run_time(path: Path) -> None:
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
    for node in tree.body:
        # An alias such as `A = B | C` is evaluated at import.
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            names = [part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)]
            classes = [name for name in names if name[0].isupper() and not name.isupper()]
            assert not (classes and isinstance(node.value.op, ast.BitOr)), names
    # Annotations may use new syntax only because they are not evaluated.
    assert any(
        isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
    )


def constants_of(path: Path) -> dict[str, ast.expr]:
    """Module-level NAME = value, with and without annotation."""
    found: dict[str, ast.expr] = {}
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign):
            found |= {
                target.id: node.value for target in node.targets if isinstance(target, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = node.value
    return found


WIRE = [ROOT / "http_network_relay" / "wire" / f"{name}.py" for name in ("constants", "codes")]
OTHERS = [path for path in (*SHARED, *SERVER, *CLIENT) if path not in WIRE]


def test_constant_of_the_wire_stands_once() -> None:
    """The constants and codes of the wire are defined in its two files alone."""
    shared = {name for path in WIRE for name in constants_of(path) if not name.startswith("_")}
    for path in OTHERS:
        assert not shared & set(constants_of(path)), path


def test_words_of_the_wire_stand_once() -> None:
    """Paths, header names and the subprotocol are not written out anywhere else."""
    values = (node.value for node in constants_of(WIRE[0]).values()
              if isinstance(node, ast.Constant))  # fmt: skip
    words = {value for value in values if isinstance(value, str) and len(value) > 8}
    assert words
    for path in OTHERS:
        strings = {
            node.value
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & strings, path


def test_number_of_the_wire_is_imported() -> None:
    """Close codes of four digits are known by their names outside the wire."""
    codes = set(CloseCode)
    assert len(codes) > 5
    for path in OTHERS:
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


@pytest.mark.parametrize("path", [*SHARED, *CLIENT, *SERVER, SCRIPT], ids=name_of)
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
