"""The modules of the package, as their files have them."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

# The oldest Python that reads the one file.
PYTHON = (3, 9)


class Refusal(Exception):
    """A source cannot become a part of the one file; the sentence names file and line."""


class Source(NamedTuple):
    """A module of the package: its file, its text and its syntax tree."""

    path: Path
    # The path relative to the root, for headers and refusals.
    shown: str
    module: str
    is_entry: bool
    lines: list[str]
    tree: ast.Module
    # The numbers of the lines that hold nothing but a comment.
    comments: set[int]
    # The number of lines that belong to the head: 0 for all modules but the entry.
    head: int

    def place(self, node: ast.AST) -> str:
        return f"{self.shown}:{getattr(node, 'lineno', 1)}"

    def refuse(self, node: ast.AST, sentence: str) -> Refusal:
        return Refusal(f"{self.place(node)}: {sentence}")

    def docstring(self) -> ast.Expr | None:
        first = self.tree.body[0] if self.tree.body else None
        is_there = ast.get_docstring(self.tree, clean=False) is not None
        return first if is_there and isinstance(first, ast.Expr) else None


class Package:
    """The sources of one package; each is read once, when somebody asks for it."""

    def __init__(self, root: Path, entry: str) -> None:
        self.root = root
        self.entry = entry.removesuffix(".py").replace("/", ".")
        self.name = self.entry.split(".")[0]
        self._sources: dict[str, Source | None] = {}

    def holds(self, module: str) -> bool:
        return module.split(".")[0] == self.name

    def find(self, module: str) -> Source | None:
        if module not in self._sources:
            path = self.root / module.replace(".", "/")
            files = [path.with_suffix(".py"), path / "__init__.py"]
            found = next((file for file in files if file.exists()), None)
            self._sources[module] = self._read(module, found) if found else None
        return self._sources[module]

    def source(self, module: str) -> Source:
        """Return a module's source, after a look at the packages around the module."""
        inner = self.find(module)
        if inner is None:
            raise Refusal(f"{module.replace('.', '/')}.py: there is no such file")
        while "." in module:
            module = module.rpartition(".")[0]
            self.find(module)
        return inner

    def _read(self, module: str, path: Path) -> Source:
        shown = path.relative_to(self.root).as_posix()
        text = path.read_text("utf-8")
        try:
            tree = ast.parse(text, shown, feature_version=PYTHON)
        except SyntaxError as exc:
            sentence = f"Python {PYTHON[0]}.{PYTHON[1]} cannot read this: {exc.msg}"
            raise Refusal(f"{shown}:{exc.lineno}: {sentence}") from None
        comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        }
        is_entry = module == self.entry
        source = Source(path, shown, module, is_entry, text.split("\n"), tree, comments, 0)
        if path.name == "__init__.py":
            _check_init(source, is_top=module == self.name)
        return source._replace(head=_head_of(source)) if is_entry else source


def _check_init(source: Source, *, is_top: bool) -> None:
    for node in source.tree.body:
        is_version = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
        if node is not source.docstring() and not (is_top and is_version):
            raise source.refuse(
                node, "an __init__.py has a docstring alone; the top one also sets __version__"
            )


def _head_of(source: Source) -> int:
    """Return how many lines the head has: up to the first of two `__main__` blocks."""
    body = source.tree.body
    blocks = [node for node in body if is_if(node, "__name__ == '__main__'")]
    if not blocks or blocks[-1] is not body[-1]:
        last = body[-1] if body else source.tree
        raise source.refuse(last, "the entry has to end with an `if __name__` block")
    if source.docstring() is None:
        raise source.refuse(body[0], "the entry has to start with a docstring")
    if len(blocks) > 1:
        return blocks[0].end_lineno or 0
    early = [node for node in body if node is body[0] or is_future(node)]
    return early[-1].end_lineno or 0


def is_if(node: ast.stmt, *tests: str) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in tests


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"
