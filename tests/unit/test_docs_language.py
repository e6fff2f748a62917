"""The pages are written in plain sentences, with one word for one thing."""

import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES, page_id, prose

MOST_WORDS = 25
# The word that stood for a thing -> its name now.
WORDS = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bseed form\b": "short form",
    r"\bdeaf\b": "stale",
    r"(?<!round )(?<!round-)\btrips?\b": "round trip",
    r"\bpurses?\b": "token bucket",
    r"\bhand(s|ed|ing)? on\b": "deliver",
    r"\btold by\b": "shown by",
    r"\b(own|its|his|their) hands\b": "buffer",
}
# In a user's words, and as it was when it was written.
PLAIN = [page for page in PAGES if page.name not in ("architecture.md", "CHANGELOG.md")]


def sentences(text: str) -> list[str]:
    """The sentences of a page's paragraphs and lists, without code, tables and headings."""
    text = re.sub(r"^(?:#|\||\[|!\[|Contents: ).*(?:\n(?=\S).+)*$", "", prose(text), flags=re.M)
    text = re.sub(r"^(?: {4}.*\n?)+(?=\n|$)(?<!\S)", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # A paragraph, a list's item or a rule is one piece.
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    found = []
    for piece in pieces:
        line = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", " ".join(piece.split()))
        found += re.split(r"(?<=[.!?:])(?:\*\*|\)|\"|_)?\s+(?=\S)", line)
    return [sentence for sentence in found if sentence]


@pytest.mark.parametrize("page", PLAIN, ids=page_id)
def test_sentences_are_short(page: Path) -> None:
    """No reader has to read a sentence twice."""
    long = [
        each
        for each in sentences(page.read_text("utf-8"))
        if len(re.findall(r"[\w'%/.-]*\w", each)) > MOST_WORDS
    ]
    assert long == []


@pytest.mark.parametrize("page", PLAIN, ids=page_id)
def test_pages_use_the_words_of_the_project(page: Path) -> None:
    """Each thing has one name, and no picture stands for it."""
    text = page.read_text("utf-8")
    found = {m[0]: name for word, name in WORDS.items() for m in re.finditer(word, text, re.I)}
    assert found == {}
