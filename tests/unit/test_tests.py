"""Which test file may import what: fakes and steps that tests share live in tests/support."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# Packages of tests, and the packages that their files may import from.
TIERS = ("unit", "integration", "e2e", "survival", "soak")
SHARED = {"tests.support", "tests.fuzz", "tests.mutants"}
FILES = sorted(TESTS.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(TESTS.parent).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    """Every name in the package `tests` that the file imports, at whatever depth."""
    package = path.relative_to(TESTS.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "tests")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_test_file_is_imported(path: Path) -> None:
    """A test imports from tests.support and from the two packages of tools, and from no test.

    tests/fuzz and tests/mutants are packages of tools, not of tests: they hold no test, and
    `make fuzz` and `make mutants` run them. The short fuzz tests in unit/ and integration/ run
    the same functions as `make fuzz`. tests/support imports nothing from either.
    """
    tier = path.relative_to(TESTS).parts[0]
    allowed = SHARED if tier != "support" else {"tests.support"}
    for name in imports_of(path):
        assert ".".join(name.split(".")[:2]) in allowed, name


def test_tests_stand_in_their_tiers_only() -> None:
    """A test in tests/support or tests/fuzz would run in no tier, or imported by one."""
    found = {path.relative_to(TESTS).parts[0] for path in FILES if path.name.startswith("test_")}
    assert found == set(TIERS)
