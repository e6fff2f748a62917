"""What README.md and docs/ say is what the programs know, and the other way round."""

import argparse
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import client.config
import server.__main__
import server.config
from http_network_relay.wire.codes import CloseCode, Code
from tests.support.code import PACKAGES, code_files, codes_in_code
from tests.support.pages import PAGES, rows, section
from tests.support.processes import ROOT
from tests.support.programs import load
from tests.support.vectors import VECTORS

README = (ROOT / "README.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text("utf-8")

# The section of docs/reference.md -> the program's parser.
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "## Server": server.__main__.make_parser,
    "## Client": client.config.make_parser,
    "## Proxy command": lambda: load("script").make_parser(),
}
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")
_VARIABLE = re.compile(r"HTTP_NETWORK_RELAY_[A-Z_]+")
_CODE = re.compile(r"`([a-z][a-z_]*)`")


@pytest.fixture(params=PROGRAMS, ids=lambda heading: heading.removeprefix("## "))
def program(request: pytest.FixtureRequest) -> tuple[str, argparse.ArgumentParser]:
    """A program's section of docs/reference.md, and its parser."""
    return section(REFERENCE, request.param), PROGRAMS[request.param]()


def test_reference_lists_every_flag_of_the_help(
    program: tuple[str, argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags of the section's table are those of --help."""
    text, parser = program
    monkeypatch.setenv("COLUMNS", "1000")  # No name is broken over two lines.
    listed = {flag for row in rows(text) for flag in _FLAG.findall(row[0])}
    assert listed == set(_FLAG.findall(parser.format_help())) - {"--help"}


def test_reference_lists_the_variable_of_every_flag(
    program: tuple[str, argparse.ArgumentParser],
) -> None:
    """A variable stands beside its flag, on the page as in --help."""
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


def test_reference_lists_the_default_of_every_flag(
    program: tuple[str, argparse.ArgumentParser],
) -> None:
    """Where --help gives a default, the page gives the same."""
    text, parser = program
    listed = {flag: row[2].strip("`") for row in rows(text) for flag in _FLAG.findall(row[0])}
    known = {}
    for action in parser._actions:
        told = (action.help or "").replace("%(default)s", str(action.default))
        found = re.search(r"default:? ([^\s;)]*[^\s;),])", told)
        known.update({flag: found[1] for flag in action.option_strings if found})
    assert len(known) >= 3
    assert known == {flag: listed[flag] for flag in known}


def test_reference_explains_every_flag_as_the_help_does(
    program: tuple[str, argparse.ArgumentParser],
) -> None:
    """Meaning and range, from the row of the setting; the page may say more behind them."""
    text, parser = program
    listed = {}
    for row in rows(text):
        # Without markup, and numbers as a program prints them.
        meaning = re.sub(r"(?<=\d),(?=\d{3})", "", row[-1].replace("`", ""))
        listed.update(dict.fromkeys(_FLAG.findall(row[0]), meaning))
    known = {}
    for action in parser._actions:
        told = re.sub(r" \((HTTP_|default:)[^()]*(\(default\)s)?\)$", "", action.help or "")
        known.update(dict.fromkeys(action.option_strings, told.replace("`", "")))
    del known["-h"], known["--help"]
    assert {flag: meaning[: len(known[flag])] for flag, meaning in listed.items()
            if flag in known} == known  # fmt: skip


def test_every_variable_of_the_code_is_in_the_reference() -> None:
    """None is read in secret, and none is promised that nobody reads."""
    tables = (*server.config.SETTINGS.values(), *client.config.SETTINGS, client.config.ALLOW)
    known = {row.variable for row in (*tables, *load("script").SETTINGS)}
    code = "".join(path.read_text("utf-8") for path in code_files())
    # Only a row may make the name of a variable; a text may name one of them.
    assert set(_VARIABLE.findall(code)) <= known
    assert set(_VARIABLE.findall(REFERENCE)) == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_only_variables_that_the_code_reads(page: Path) -> None:
    """What a reader sets has an effect."""
    assert set(_VARIABLE.findall(page.read_text("utf-8"))) <= set(_VARIABLE.findall(REFERENCE))


def test_reference_lists_every_positional_argument() -> None:
    """The proxy command's arguments, in order."""
    parser = load("script").make_parser()
    wanted = [action.dest for action in parser._actions if not action.option_strings]
    text = section(REFERENCE, "## Proxy command")
    listed = [row[0].strip("`") for row in rows(text) if not row[0].startswith("`--")]
    assert listed == wanted


@pytest.mark.parametrize(
    ("page", "heading"),
    [(README, "## Exit codes"), (REFERENCE, "### Proxy command exits")],
    ids=["README", "reference"],
)
def test_page_lists_every_exit_code(page: str, heading: str) -> None:
    """Each exit code that an error can have is explained."""
    listed = {row[0] for row in rows(section(page, heading))}
    assert listed == {"0", "128+n", *(str(code.exit_code) for code in Code)}


def test_exit_codes_mean_the_same_on_both_pages() -> None:
    """README.md and docs/reference.md."""
    short, whole = (
        {row[0]: row[1] for row in rows(section(page, heading))}
        for page, heading in ((README, "## Exit codes"), (REFERENCE, "### Proxy command exits"))
    )
    assert all(meaning.startswith(short[code]) for code, meaning in whole.items())


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_only_make_targets_that_exist(page: Path) -> None:
    """`make ...` on a page can be typed."""
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    if page.name == "README.md" and page.parent == ROOT:
        assert {"run", "test"} <= named
    if page.name == "CONTRIBUTING.md":
        listed = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
        assert listed - {"help"} <= named


# Codes.


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
    assert listed == {
        code: (code.http_status, code.retry_after_s or None) for code in Code if code.http_status
    }


def test_retryable_refusals_are_the_documented_ones() -> None:
    """The column `retry` is what the ends do."""
    for code, _, _, retry in rows(section(PROTOCOL, "### In `refused`")):
        assert retry == ("yes" if Code(code.strip("`")).is_retryable else "no"), code


def test_every_close_code_is_documented() -> None:
    """Also those that are only sent."""
    listed = {row[0] for row in rows(section(PROTOCOL, "### Close codes"))}
    assert {str(code.value) for code in CloseCode} <= listed


def test_every_control_and_field_is_documented() -> None:
    """The tables of docs/protocol.md, "Controls", are the code's."""
    types, fields = {}, set()
    for first, *rest in rows(section(PROTOCOL, "## Controls")):
        names = _CODE.findall(first)
        if len(rest) == 2:
            types[names[0]] = set(_CODE.findall(rest[1].split(".")[0]))
        else:
            fields.update(names)
    assert set(types) == set(load("package").FIELDS)
    for kind, checks in load("package").FIELDS.items():
        named = types[kind] | (types["open"] if "open" in types[kind] else set())
        assert named - {"open", "user"} == set(checks), kind
    known = {name for checks in load("package").FIELDS.values() for name in checks}
    assert fields == {*known, "channel", "user"}


def test_every_section_of_the_vectors_is_explained() -> None:
    """Whoever runs the vectors needs to know how to read them."""
    listed = {row[0].strip("`") for row in rows(section(PROTOCOL, "## Golden vectors"))}
    assert listed == set(VECTORS) - {"about"}


@pytest.mark.parametrize("name", PACKAGES)
def test_architecture_names_every_file(name: str) -> None:
    """The picture of files is true."""
    text = section((ROOT / "docs" / "architecture.md").read_text("utf-8"), "## Files and arrows")
    block = re.split(rf"\n{name}/[^\n]*\n", text)[1].split("\n\n")[0]
    files = {path.name for path in (ROOT / name).rglob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", block)) >= files


_FILE = re.compile(r"`([\w/]+\.py)`")


def test_architecture_names_every_lock() -> None:
    """The table of locks is true."""
    text = section((ROOT / "docs" / "architecture.md").read_text("utf-8"), "## Locks")
    listed = {(row[0].strip("`"), path) for row in rows(text) for path in _FILE.findall(row[1])}
    known = set()
    for path in code_files():
        for owner in re.findall(
            r"self\.(\w+) = threading\.(?:R?Lock|Condition)\(", path.read_text()
        ):
            known.add((owner, path.name))
    assert {(lock.split(".")[-1], Path(path).name) for lock, path in listed} == known
