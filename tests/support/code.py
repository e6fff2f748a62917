"""The programs' code as text: its files, and the codes in them."""

import ast
from pathlib import Path

from http_network_relay.wire.codes import Code
from tests.support.processes import ROOT

PACKAGES = ("http_network_relay", "server", "client")


def code_files() -> list[Path]:
    """The programs' code, each line once: the single file is a copy."""
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def codes_in_code() -> set[str]:
    """Every code that the code can raise, send or answer."""
    makers = {"RelayError", "Refused", "refuse", "client_lost", "_lost"}
    makers |= {"detach", "reset", "_refuse", "_end_locked"}
    found = {code.value for code in Code}
    for path in code_files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = node.args[:1] if name in makers else []
            given += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            found |= set(filter(None, map(_code_of, given)))
    return found


def _code_of(node: ast.expr) -> str | None:
    """The code that an argument names: a literal, or a member of Code; None for another value."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "Code":
        return str(Code[node.attr])
    return None
