"""Break each rule of the design once, and see the tests of the rule fail.

Each mutant is applied to a copy of the project, and its tests have to fail there. A patch that
does not apply, and a test that passes with its rule broken, both fail the command.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.loading import ROOT, Mutant, find_faults, load, patch_fault

# The parts of the project that a copy needs: folders and files.
COPIED = (
    "http_network_relay",
    "client",
    "server",
    "tests",
    "docs",
    "deploy",
    ".ci",
    "ssh_proxy_command.py",
    "wsgi.py",
    "gunicorn.conf.py",
    "pyproject.toml",
)
# Files are generated from the code in these folders: after a mutation there, the command runs.
SHARED = ("http_network_relay/",)
GENERATE = (".ci/amalgamate.py",)
# A hanging test counts as failed; no test of a mutant takes a tenth of the limit.
TEST_S = 60.0
# pytest's exit code for "some test failed"; after any other code no test has judged the mutant.
TESTS_PASSED, TESTS_FAILED = 0, 1


def copy_project(folder: Path) -> None:
    """Make a clean copy, without caches."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)


def patch(folder: Path, mutant: Mutant) -> None:
    """Apply the mutant to the copy, generated files included."""
    path = folder / mutant.file
    path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
    if mutant.file.startswith(SHARED):
        subprocess.run([sys.executable, *GENERATE], cwd=folder, check=True)


def run_tests(folder: Path, mutant: Mutant) -> tuple[str, str]:
    """Run the mutant's tests in the copy; return the verdict and its reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
    try:
        result = subprocess.run(
            command, cwd=folder, timeout=TEST_S, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return "killed", ""
    if result.returncode == TESTS_FAILED:
        return "killed", ""
    verdict = "SURVIVED" if result.returncode == TESTS_PASSED else "UNJUDGED"
    output = f"{result.stdout[-2000:]}{result.stderr[-500:]}"
    return verdict, f"pytest ended with {result.returncode}\n{output}"


def judge(mutant: Mutant) -> bool:
    """Try one mutant, print a line about the verdict, and return whether a test failed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_project(folder)
        fault = patch_fault(mutant, folder)
        if fault is not None:
            verdict, reason = "UNJUDGED", fault
        else:
            patch(folder, mutant)
            verdict, reason = run_tests(folder, mutant)
    line = f"{verdict:8} {time.monotonic() - begun:5.1f} s  {mutant.title}"
    print(f"{line}\n         {reason}" if reason else line, flush=True)
    return verdict == "killed"


def check(mutants: list[Mutant]) -> int:
    """Print each difference between the mutants and the project; return the exit code."""
    faults = find_faults(mutants)
    for fault in faults:
        print(fault)
    print(f"{len(mutants)} mutants, {len(faults)} faults")
    return 1 if faults or not mutants else 0


def run(mutants: list[Mutant], jobs: int) -> int:
    """Try the mutants, `jobs` at a time; return the exit code."""
    with ThreadPoolExecutor(jobs) as pool:
        killed = sum(pool.map(judge, mutants))
    print(f"{killed} killed, {len(mutants) - killed} not")
    return 0 if mutants and killed == len(mutants) else 1


def main() -> int:
    """Read the command line and the mutants, then check the mutants or try them."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only mutants with one of these in the rule, file or subject"
    )
    parser.add_argument("--check", action="store_true", help="compare with the project, no tests")
    parser.add_argument(
        "--jobs", type=int, default=1, help="mutants at a time (1); a busy machine fails tests too"
    )
    args = parser.parse_args()
    mutants, faults = load()
    if faults:
        print("\n".join(faults))
        return 1
    if args.words:
        mutants = [
            mutant
            for mutant in mutants
            if any(word in text for word in args.words for text in mutant[:3])
        ]
    return check(mutants) if args.check else run(mutants, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
