"""docs/troubleshooting.md has each sentence of the programs, and no other one."""

import ast
import re
from pathlib import Path

import pytest

from http_network_relay.wire.codes import Code
from tests.support.code import code_files, codes_in_code
from tests.support.pages import rows, section
from tests.support.processes import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
CODES = "## Codes and exit codes"
# Stands for a value that is put into a sentence.
GAP = "\0"

# Whose text arguments a user or an operator reads.
_SAYS = re.compile(r"(Error|Refusal|Refused)$")
_ALSO_SAY = {"refuse", "revoke", "_refuse_user", "_reset_client", "_fail", "_doubt", "_usage"}
_ALSO_SAY |= {"failed_login", "warn", "warning", "error"}
# Broken rules of the wire: the page has one paragraph for all of them.
_OF_THE_WIRE = {"LegError", "TunnelError"}
# Of Python, or of our own code when it is used wrongly.
_NOT_OURS = {"OSError", "ValueError", "EOFError", "NotImplementedError", "AssertionError"}


def template(node: ast.expr) -> str | None:
    """The text that an expression makes, with a gap for each value put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(?:\.\d)?[sdg]", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [getattr(part, "value", None) for part in node.values]
        return "".join(part if isinstance(part, str) else GAP for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or GAP) + (template(node.right) or GAP)
    return None


def strings_of(path: Path) -> set[str]:
    """Every text that a file could say."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    found = (template(n) for n in nodes if isinstance(n, ast.expr) and is_text(n))
    return {text for text in found if text is not None}


def is_text(node: ast.AST) -> bool:
    return isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))


def sentences_of(path: Path) -> set[str]:
    """What a file raises, answers, prints or logs as a warning or an error."""
    tree, found = ast.parse(path.read_text("utf-8")), set()
    named = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", "")).lstrip("_")
        says = _SAYS.search(name) or name in {each.lstrip("_") for each in _ALSO_SAY}
        if not says or name in _OF_THE_WIRE | _NOT_OURS:
            continue
        for argument in call.args:
            made = named.get(argument.id) if isinstance(argument, ast.Name) else argument
            text = template(made) if made is not None else None
            if text is not None and is_sentence(text):
                found.add(text)
    return found


def is_sentence(text: str) -> bool:
    """Not a code, a status of HTTP or a name."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    return len(words) > 2 and " " in text and not re.match(r"[0-9]{3} ", text)


def quotes() -> list[str]:
    """The phrases of the first column, without the codes."""
    pages = TEXT.replace(section(TEXT, CODES), "")
    return [phrase for row in rows(pages) for phrase in re.findall(r"`([^`]+)`", row[0])]


def has(phrase: str, text: str) -> bool:
    """Whether the pieces between the dots stand in the text, in their order."""
    at = 0
    for piece in phrase.split("..."):
        at = text.find(piece.strip(), at)
        if at < 0:
            return False
        at += len(piece.strip())
    return True


def test_every_quoted_line_is_one_that_the_programs_write() -> None:
    """A line that nobody writes any more helps nobody."""
    strings = set().union(*map(strings_of, code_files()))
    assert len(quotes()) > 100
    # What is put together from several texts has its pieces in them.
    unknown = [
        phrase
        for phrase in quotes()
        if not any(has(phrase, text) for text in strings)
        and not all(any(p.strip() in text for text in strings) for p in phrase.split("..."))
    ]
    assert unknown == []


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_sentence_of_the_code_is_on_the_page(path: Path) -> None:
    """Whoever meets a line finds it."""
    phrases = [phrase for phrase in quotes() if len(phrase.replace("...", "").strip()) > 7]
    missing = [
        text for text in sentences_of(path) if not any(has(phrase, text) for phrase in phrases)
    ]
    assert missing == []


def test_page_lists_every_code_with_its_exit_code_and_hint() -> None:
    """As the table of codes and the proxy command's hints have them."""
    listed = {code.strip("`"): rest for code, *rest in rows(section(TEXT, CODES))}
    known = {code.value: [str(code.exit_code), code.hint or "-"] for code in Code}
    assert listed == known
    # What has no exit code never comes to the proxy command.
    assert codes_in_code() >= set(listed)
