"""The mutants' files, and the check that compares mutants with the project."""

from pathlib import Path

import pytest

from tests.mutants.loading import find_faults, load

GOOD = """\
[[mutant]]
rule = "1: a rule"
file = "code.py"
old = '''
    return 1
'''
new = '''
    return 2
'''
tests = ["test_code.py::test_one"]
"""
TITLE = "subject.toml: 1: a rule: "


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one source file and two tests."""
    (tmp_path / "code.py").write_text("def one():\n    return 1\n\n\ndef two():\n    return 2\n")
    (tmp_path / "test_code.py").write_text(
        "def test_one(): ...\n\n\nclass TestTwo:\n    def test_two(self): ...\n"
    )
    return tmp_path


def faults_of(project: Path, text: str) -> list[str]:
    """Return the faults of a mutants' file, as the check reports them."""
    folder = project / "mutants"
    folder.mkdir()
    (folder / "subject.toml").write_text(text)
    mutants, faults = load(folder)
    return faults + find_faults(mutants, project)


def test_all_mutants_of_the_project_load() -> None:
    """The project's own files have the right form; `make check` compares the rest."""
    mutants, faults = load()
    assert faults == []
    assert len(mutants) > 100


def test_texts_keep_their_line_ends(project: Path) -> None:
    """The line end behind the opening quotes is dropped, and the last one is kept."""
    assert faults_of(project, GOOD) == []
    mutant = load(project / "mutants")[0][0]
    assert (mutant.subject, mutant.old, mutant.new) == (
        "subject",
        "    return 1\n",
        "    return 2\n",
    )


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ("return 1", "return 3", "'old' stands 0 times in code.py"),
        ("    return 1\n", "    return ", "'old' stands 2 times in code.py"),
        ("return 2", "return 1", "'new' is the same as 'old'"),
        ('"code.py"', '"gone.py"', "no file gone.py"),
        ("test_code.py::test_one", "test_gone.py", "no test file test_gone.py"),
        ("test_code.py::test_one", "test_gone.py::test_one", "no test file test_gone.py"),
        ("::test_one", "::test_gone", "no test test_gone in test_code.py"),
        ("::test_one", "::test_two", "no test test_two in test_code.py"),
        ("rule =", "extra = 1\nrule =", "unknown key 'extra'"),
        ('file = "code.py"\n', "", "no key 'file'"),
        ('"code.py"', "7", "'file' is no string"),
        ('["test_code.py::test_one"]', '"test_code.py"', "'tests' is no list of strings"),
        ('["test_code.py::test_one"]', "[]", "'tests' is empty"),
    ],
)
def test_fault_is_reported_by_file_and_rule(project: Path, good: str, bad: str, fault: str) -> None:
    """A mutant that differs from the project, or from the form, is named with its fault."""
    assert good in GOOD
    assert faults_of(project, GOOD.replace(good, bad, 1)) == [TITLE + fault]


@pytest.mark.parametrize("test", ["test_one", "test_one[a::b]", "TestTwo::test_two"])
def test_definition_is_found(project: Path, test: str) -> None:
    """Parameters' ids and methods of classes are no faults."""
    assert faults_of(project, GOOD.replace("test_one", test)) == []


def test_same_patch_twice_is_reported(project: Path) -> None:
    """Two mutants with the same patch are one mutant, whatever their rules say."""
    second = GOOD.replace("1: a rule", "2: another")
    assert faults_of(project, f"{GOOD}\n{second}") == [
        "subject.toml: 2: another: the same patch as subject.toml: 1: a rule"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[[mutant]\n", "subject.toml: Expected"),
        (f"mutants = 1\n{GOOD}", "subject.toml: unknown key 'mutants'"),
        ("", "subject.toml: no [[mutant]] tables"),
    ],
)
def test_file_of_another_form_is_reported(project: Path, text: str, fault: str) -> None:
    """A file that is no list of mutants is named too."""
    (reported,) = faults_of(project, text)
    assert reported.startswith(fault)
