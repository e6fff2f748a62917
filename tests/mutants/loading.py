"""The loader of the mutants' files, and the check of mutants against the project."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(__file__).resolve().parent
_TEXTS = ("rule", "file", "old", "new")
_KEYS = {*_TEXTS, "tests"}


class Mutant(NamedTuple):
    """A patch of one file, with the tests that must fail once the patch is applied."""

    subject: str
    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        """The mutant's own file and rule, for reports."""
        return f"{self.subject}.toml: {self.rule}"


def load(folder: Path = FOLDER) -> tuple[list[Mutant], list[str]]:
    """Return the mutants of all TOML files in a folder, and the faults of their form."""
    mutants: list[Mutant] = []
    faults: list[str] = []
    for path in sorted(folder.glob("*.toml")):
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            faults.append(f"{path.name}: {error}")
            continue
        faults += [f"{path.name}: unknown key {key!r}" for key in sorted({*document} - {"mutant"})]
        entries = document.get("mutant")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            faults.append(f"{path.name}: no [[mutant]] tables")
            continue
        for number, entry in enumerate(entries, 1):
            wrong = list(_form_faults(entry))
            title = f"{path.name}: {entry.get('rule', f'mutant {number}')}"
            faults += [f"{title}: {fault}" for fault in wrong]
            if not wrong:
                texts = {key: entry[key] for key in _TEXTS}
                mutants.append(Mutant(path.stem, **texts, tests=tuple(entry["tests"])))
    return mutants, faults


def _form_faults(entry: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*entry} - _KEYS):
        yield f"unknown key {key!r}"
    for key in sorted(_KEYS - {*entry}):
        yield f"no key {key!r}"
    for key in _TEXTS:
        if not isinstance(entry.get(key, ""), str):
            yield f"{key!r} is no string"
    tests = entry.get("tests", [""])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        yield "'tests' is no list of strings"
    elif not tests:
        yield "'tests' is empty"


def find_faults(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Return each difference between the mutants and the project, by file and rule."""
    faults: list[str] = []
    known: dict[tuple[str, str, str], Mutant] = {}
    for mutant in mutants:
        found = [patch_fault(mutant, root), *(_test_fault(test, root) for test in mutant.tests)]
        first = known.setdefault((mutant.file, mutant.old, mutant.new), mutant)
        if first is not mutant:
            found.append(f"the same patch as {first.title}")
        faults += [f"{mutant.title}: {fault}" for fault in found if fault]
    return faults


def patch_fault(mutant: Mutant, root: Path) -> str | None:
    """Return why a patch does not apply, or None."""
    path = root / mutant.file
    if not path.is_file():
        return f"no file {mutant.file}"
    count = path.read_text("utf-8").count(mutant.old)
    if count != 1:
        return f"'old' stands {count} times in {mutant.file}"
    return "'new' is the same as 'old'" if mutant.new == mutant.old else None


def _test_fault(test: str, root: Path) -> str | None:
    name, *parts = test.split("::")
    path = root / name
    if not parts:
        return None if path.exists() else f"no test file {name}"
    if not path.is_file():
        return f"no test file {name}"
    # A parameter's id in brackets belongs to the run, not to the definition.
    definition = "::".join(parts).partition("[")[0]
    return None if definition in _definitions(path) else f"no test {definition} in {name}"


@cache
def _definitions(path: Path) -> set[str]:
    """Return the functions of a module, and the methods of its classes as Class::method."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            names.update(f"{node.name}::{method.name}" for method in methods)
    return names
