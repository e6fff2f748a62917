"""Each link of a page, and each citation of a page anywhere, leads to what is there."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.pages import PAGES, page_id, prose, section
from tests.support.processes import ROOT

DOCS = ROOT / "docs"
# Where a comment or a docstring may cite a page.
_CITING = ("*.py", ".ci/*", "deploy/*", "Makefile", "pyproject.toml", "requirements.txt")
_CODE_FOLDERS = ("server", "client", "http_network_relay", "tests", "benchmarks")
# `docs/limits.md, "Audit log"`, `docs/protocol.md, "Order", rule 5`, or several titles.
_CITATION = re.compile(
    r'docs/(?P<name>[\w/-]+\.md)(?P<titles>(?:,\s(?:and\s)?"[^"\n]+")*)(?:,\srule\s(?P<rule>\d+))?'
)
# A rule of docs/architecture.md, "Rules", cited by its number alone.
_RULE = re.compile(r"(?<![\w-])rule\s(\d+)(?![\w.]*\d)")
_RULES = "## Rules"


@cache
def headings(page: Path) -> tuple[str, ...]:
    """The titles of a page, in order."""
    text = prose(page.read_text("utf-8"))
    return tuple(re.findall(r"^#+ (.*)$", text, re.MULTILINE))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make; one that comes again has a number behind it."""
    found: list[str] = []
    for title in headings(page):
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The path and the anchor of each link that stays within the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if not re.match(r"https?:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_within_the_project_resolve(page: Path) -> None:
    """Each relative link names a file that is there, and a heading in it."""
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    """A page that no other one leads to is not read."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [path for path, _ in links(page)]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent == DOCS], ids=page_id)
def test_contents_of_a_page_name_its_sections(page: Path) -> None:
    """Where a page begins with its contents, these are all its sections, in order."""
    text = prose(page.read_text("utf-8"))
    contents = re.search(r"^Contents: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if contents is not None:
        listed = re.findall(r"\[([^\]]+)\]", contents[1])
        assert listed == re.findall(r"^## (.*)$", text, re.MULTILINE)


# Citations.


def citing_files() -> list[Path]:
    """Code, tests, configuration and pages."""
    files = {path for pattern in _CITING for path in ROOT.glob(pattern)}
    for folder in _CODE_FOLDERS:
        files |= set((ROOT / folder).rglob("*.py"))
    return sorted({*filter(Path.is_file, files), *PAGES})


def joined(path: Path) -> str:
    """A file's text; what a comment or a docstring says stands on one line."""
    return re.sub(r"[ \t]*\n[ \t]*(?:# ?)?", " ", path.read_text("utf-8"))


def rules_of(text: str) -> set[int]:
    """The numbers of a section's rules."""
    return {int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)}


def test_every_citation_of_a_page_names_one_of_its_headings() -> None:
    """In code, tests and pages; a rule's number behind it is one of that section."""
    cited = 0
    for path in citing_files():
        for found in _CITATION.finditer(joined(path)):
            page, where = DOCS / found["name"], f"{path.relative_to(ROOT)}: {found[0]}"
            assert page.exists(), where
            for title in re.findall(r'"([^"]+)"', found["titles"]):
                assert title in headings(page), where
                cited += 1
                if found["rule"]:
                    level = re.search(rf"^(#+) {re.escape(title)}$", page.read_text("utf-8"), re.M)
                    assert level is not None
                    text = section(page.read_text("utf-8"), f"{level[1]} {title}")
                    assert int(found["rule"]) in rules_of(text), where
    assert cited > 20


def test_every_rule_that_code_cites_is_one_of_the_design() -> None:
    """`rule N` alone is one of docs/architecture.md, "Rules"."""
    known = rules_of(section((DOCS / "architecture.md").read_text("utf-8"), _RULES))
    assert known == set(range(1, len(known) + 1))
    for path in citing_files():
        if path in PAGES:
            continue
        for number in _RULE.findall(_CITATION.sub("", joined(path))):
            assert int(number) in known, f"{path.relative_to(ROOT)}: rule {number}"


def test_every_rule_of_the_design_names_a_test_that_exists() -> None:
    """docs/architecture.md, "Rules": the name of a test function and its file."""
    text = section((DOCS / "architecture.md").read_text("utf-8"), _RULES)
    named = re.findall(r"^ +Test: `(test_\w+)` in\n +`(tests/[\w/]+\.py)`\.$", text, re.MULTILINE)
    assert len(named) == len(rules_of(text))
    for name, path in named:
        assert f"def {name}(" in (ROOT / path).read_text("utf-8"), path
