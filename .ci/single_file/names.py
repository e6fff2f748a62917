"""Where imports stand in a syntax tree, and which names its statements bind."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import NamedTuple

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Scope = (*Function, ast.ClassDef, ast.Lambda)


class Place(NamedTuple):
    """An import statement and the statements around it, the outermost first."""

    node: ast.Import | ast.ImportFrom
    around: tuple[ast.stmt, ...]

    @property
    def function(self) -> ast.stmt | None:
        """The outermost function around the import."""
        return next((node for node in self.around if isinstance(node, Function)), None)

    @property
    def is_in_class(self) -> bool:
        scopes = [node for node in self.around if isinstance(node, Scope)]
        return bool(scopes) and isinstance(scopes[-1], ast.ClassDef)


def import_places(block: list[ast.stmt], around: tuple[ast.stmt, ...] = ()) -> Iterator[Place]:
    """Yield all imports of a block and of the blocks inside."""
    for node in block:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield Place(node, around)
        for inner in blocks(node):
            yield from import_places(inner, (*around, node))


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements that a statement holds."""
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
        elif isinstance(value, list):
            for handler in value:
                if isinstance(handler, ast.ExceptHandler):
                    yield from blocks(handler)


def bound_by(node: ast.AST) -> list[str]:
    """Return the names that the node itself binds or declares, in whichever scope."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, ast.ExceptHandler):
        return [node.name] if node.name else []
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        return node.names
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    return [node.arg] if isinstance(node, ast.arg) else []


def top_names(tree: ast.Module, skipped: Collection[ast.AST] = ()) -> dict[str, ast.AST]:
    """Return the names that a module has at its top level, each with its first place."""
    names: dict[str, ast.AST] = {}
    declared = (node for node in ast.walk(tree) if isinstance(node, ast.Global))
    for node in (*_own_nodes(tree), *declared):
        if node not in skipped and not isinstance(node, ast.arg):
            for name in bound_by(node):
                names.setdefault(name, node)
    return names


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node that run in the same scope."""
    for field, value in ast.iter_fields(node):
        is_other_scope = field == "body" and isinstance(node, Scope)
        if is_other_scope or (field == "target" and isinstance(node, ast.comprehension)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _own_nodes(child)
