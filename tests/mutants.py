"""Break each rule of the design once, and see the test that guards it fail.

`make mutants` copies the project, applies one small patch at a time, runs the tests
named beside it, and expects them to fail. A patch that no longer applies, and a test
that passes with its rule broken, are both failures of this command.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("client", "server", "tests", "docs", "deploy", ".ci")
COPIED_FILES = ("ssh_proxy_command.py", "wsgi.py", "gunicorn.conf.py", "pyproject.toml")
# A mutant that hangs is caught as well; no test of these takes a tenth of it.
TEST_S = 120.0
# pytest's exit code for "some test failed"; others mean that no test has judged.
TESTS_FAILED = 1


class Mutant(NamedTuple):
    """`old` stands exactly once in `file` and becomes `new`; then `tests` must fail."""

    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = ()


def apply(folder: Path, mutant: Mutant) -> str | None:
    """Patch the copy; return why that is not possible."""
    path = folder / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return f"the patch matches {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    # The server's copies and the script's block carry the same fault.
    subprocess.run([sys.executable, ".ci/sync.py"], cwd=folder, check=True)
    return None


def judge(folder: Path, mutant: Mutant) -> str | None:
    """Run the tests in the patched copy; return what is wrong with them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
    try:
        result = subprocess.run(
            command, cwd=folder, timeout=TEST_S, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode == TESTS_FAILED:
        return None
    return f"pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-500:]}"


def copy_project(folder: Path) -> None:
    """Make a clean copy, without caches."""
    for name in COPIED:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in COPIED_FILES:
        shutil.copy2(ROOT / name, folder / name)


def main(argv: list[str]) -> int:
    """Try all mutants, or those whose rule contains the first argument."""
    chosen = [m for m in MUTANTS if not argv or argv[0] in m.rule]
    survivors = 0
    for mutant in chosen:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as name:
            folder = Path(name)
            copy_project(folder)
            wrong = apply(folder, mutant) or judge(folder, mutant)
        verdict = "SURVIVED" if wrong else "killed"
        print(f"{verdict:8} {time.monotonic() - begun:5.1f} s  {mutant.rule}", flush=True)
        if wrong:
            survivors += 1
            print(f"         {wrong}", flush=True)
    print(f"{len(chosen) - survivors} passed, {survivors} failed")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
