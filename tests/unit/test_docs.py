"""What README.md and docs/ say is what the programs know, and the other way round."""

import argparse
import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import client.config
import server.__main__
from client import wire
from client.errors import ERRORS
from server.errors import HTTP_ANSWERS
from tests.support.pages import rows, section
from tests.support.processes import ROOT
from tests.support.vectors import VECTORS, load

README = (ROOT / "README.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

# The README's section -> the program's parser.
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "### 1. Server": server.__main__._parser,
    "### 2. Client": client.config.make_parser,
    "### 3. Proxy command": lambda: load("script").make_parser(),
}
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")
_VARIABLE = re.compile(r"HTTP_NETWORK_RELAY_[A-Z_]+")
_CODE = re.compile(r"`([a-z][a-z_]*)`")


@pytest.fixture(params=PROGRAMS, ids=lambda heading: heading.split(". ")[1])
def program(request: pytest.FixtureRequest) -> tuple[str, argparse.ArgumentParser]:
    """A program's section of the README, and its parser."""
    return section(README, request.param), PROGRAMS[request.param]()


def test_readme_lists_every_flag_of_the_help(
    program: tuple[str, argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags of the section's table are those of --help."""
    text, parser = program
    monkeypatch.setenv("COLUMNS", "1000")  # No name is broken over two lines.
    listed = {flag for row in rows(text) for flag in _FLAG.findall(row[0])}
    assert listed == set(_FLAG.findall(parser.format_help())) - {"--help"}


def test_readme_lists_the_variable_of_every_flag(
    program: tuple[str, argparse.ArgumentParser],
) -> None:
    """A variable stands beside its flag, in the README as in --help."""
    text, parser = program
    listed = {
        (flag, variable)
        for row in rows(text)
        for flag in _FLAG.findall(row[0])
        for variable in _VARIABLE.findall(row[1])
    }
    known = {
        (flag, variable)
        for action in parser._actions
        for flag in _FLAG.findall(" ".join(action.option_strings))
        for variable in _VARIABLE.findall(action.help or "")
    }
    assert listed == known


def test_every_variable_in_the_code_is_in_the_readme() -> None:
    """None is read in secret, and none is promised that nobody reads."""
    code = "".join(path.read_text("utf-8") for path in code_files())
    assert set(_VARIABLE.findall(README)) == set(_VARIABLE.findall(code))


def test_readme_lists_every_positional_argument() -> None:
    """The proxy command's arguments, in order."""
    parser = load("script").make_parser()
    wanted = [action.dest for action in parser._actions if not action.option_strings]
    text = section(README, "### 3. Proxy command")
    listed = [row[0].strip("`") for row in rows(text) if not row[0].startswith("`--")]
    assert listed == wanted


def test_readme_lists_every_exit_code() -> None:
    """Each exit code that an error can have is explained."""
    listed = {row[0] for row in rows(section(README, "## Exit codes"))}
    assert listed == {"0", "128+n", *(str(exit_code) for exit_code, _ in ERRORS.values())}


def test_readme_ssh_config_starts_the_proxy_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ProxyCommand of `Host *.relay`, as ssh hands it to a shell, names the right client."""
    block = section(README, "### 4. `~/.ssh/config`").split("```")[1]
    line = re.search(r"Host \*\.relay\n +ProxyCommand ssh_proxy_command\.py (.*)", block)
    assert line is not None
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "relay.token").write_text("TOKEN\n")
    command = line[1].replace("%n", "Lab-1.relay").replace("%p", "2222")
    shell = ["sh", "-c", f"printf '%s\\n' {command}"]
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    settings = load("script").read_settings(argv, {})
    assert (settings.client, settings.host, settings.port) == ("Lab-1", "127.0.0.1", 2222)
    assert settings.endpoint.url == "wss://relay.example:443/ws_for_ssh_proxy_command"
    assert settings.token == "TOKEN"


def test_readme_names_only_make_targets_that_exist() -> None:
    """`make ...` in the README can be typed."""
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"run", "test"} <= named


def strings_in_code() -> set[str]:
    """Every string that the programs could say, with a gap for each value put into it."""
    found = set()
    for path in code_files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(value, "value", "") for value in node.values]
                found.add("\0".join(part if isinstance(part, str) else "" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_troubleshooting_quotes_lines_that_the_programs_write() -> None:
    """A line that nobody writes any more helps nobody."""
    strings = strings_in_code()
    quoted = [
        phrase
        for row in rows(section(README, "## Troubleshooting"))
        for phrase in re.findall(r"`([^`]+)`", row[0])
    ]
    assert len(quoted) > 20
    for phrase in quoted:
        for piece in phrase.split("..."):
            assert any(piece.strip() in string for string in strings), piece


# Codes.


def code_files() -> list[Path]:
    """The programs' code, each line once: the script's block is a copy."""
    files = [ROOT / "ssh_proxy_command.py"]
    for package in ("server", "client"):
        files += sorted((ROOT / package).glob("*.py"))
    return files


def codes_in_code() -> set[str]:
    """Every code that the code can raise, send or answer."""
    makers = {"RelayError", "HttpRefusal", "TunnelRefused", "refuse", "client_lost", "_lost"}
    makers |= {"_refuse_user", "_reset_client"}
    found = {*ERRORS, *HTTP_ANSWERS}
    for path in code_files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = node.args[:1] if name in makers else []
            given += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            found |= {
                value.value
                for value in given
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
            }
    return found


def documented_codes(heading: str, column: int = 0) -> set[str]:
    return {code for row in rows(section(PROTOCOL, heading)) for code in _CODE.findall(row[column])}


CODE_TABLES = ("### In `refused`", "### In `reset`", "### In `detached`", "### Local codes")


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    """docs/protocol.md, "Codes", against the code."""
    documented = documented_codes("## Before the upgrade", column=1)
    for heading in CODE_TABLES:
        documented |= documented_codes(heading)
    assert documented == codes_in_code()


def test_http_answers_are_the_documented_ones() -> None:
    """Status, code and Retry-After of each refusal."""
    listed = {}
    for status, code, when in rows(section(PROTOCOL, "## Before the upgrade")):
        retry_after = re.search(r"`Retry-After: (\d+)`", when)
        listed[code.strip("`")] = (int(status), int(retry_after[1]) if retry_after else None)
    assert listed == {code: tuple(answer) for code, answer in HTTP_ANSWERS.items()}


def test_retryable_refusals_are_the_documented_ones() -> None:
    """The column `retry` is what the ends do."""
    for code, _, _, retry in rows(section(PROTOCOL, "### In `refused`")):
        assert retry == ("yes" if ERRORS[code.strip("`")][1] else "no"), code


def test_every_close_code_is_documented() -> None:
    """Also those that are only sent."""
    listed = {row[0] for row in rows(section(PROTOCOL, "### Close codes"))}
    known = {str(value) for name, value in vars(wire).items() if name.startswith("CLOSE_")}
    assert known <= listed


def test_every_control_and_field_is_documented() -> None:
    """The tables of docs/protocol.md, "Controls", are the code's."""
    types, fields = {}, set()
    for first, *rest in rows(section(PROTOCOL, "## Controls")):
        names = _CODE.findall(first)
        if len(rest) == 2:
            types[names[0]] = set(_CODE.findall(rest[1].split(".")[0]))
        else:
            fields.update(names)
    assert set(types) == set(wire.FIELDS)
    for kind, checks in wire.FIELDS.items():
        named = types[kind] | (types["open"] if "open" in types[kind] else set())
        assert named - {"open", "user"} == set(checks), kind
    known = {name for checks in wire.FIELDS.values() for name in checks}
    assert fields == {*known, "channel", "user"}


def test_every_section_of_the_vectors_is_explained() -> None:
    """Whoever runs the vectors needs to know how to read them."""
    listed = {row[0].strip("`") for row in rows(section(PROTOCOL, "## Golden vectors"))}
    assert listed == set(VECTORS) - {"about"}


# Links.


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_resolve(page: Path) -> None:
    """Each relative link names a file that is there, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["server", "client"])
def test_architecture_names_every_file(name: str) -> None:
    """The picture of files is true."""
    text = section((ROOT / "docs" / "architecture.md").read_text("utf-8"), "## Files and arrows")
    block = text.split(f"\n{name}/\n")[1].split("\n\n")[0]
    files = {path.name for path in (ROOT / name).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", block)) - {"script.py"} >= files


_FILE = re.compile(r"`([\w/]+\.py)`")


def test_architecture_names_every_lock() -> None:
    """The table of locks is true."""
    text = section((ROOT / "docs" / "architecture.md").read_text("utf-8"), "## Locks")
    listed = {(row[0].strip("`"), path) for row in rows(text) for path in _FILE.findall(row[1])}
    known = set()
    for path in code_files()[1:]:
        if path.read_text("utf-8").startswith("# Written by `make sync`"):
            continue
        for owner in re.findall(
            r"self\.(\w+) = threading\.(?:R?Lock|Condition)\(", path.read_text()
        ):
            known.add((owner, path.name))
    assert {(lock.split(".")[-1], Path(path).name) for lock, path in listed} == known
