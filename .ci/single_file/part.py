"""What one module brings into the one file, and what it must not do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from single_file.imports import Foreign, foreign_of
from single_file.names import Place, blocks, bound_by, import_places, top_names
from single_file.source import Package, Source, is_future, is_if

# Names that depend on the module which uses them.
MODULE_NAMES = {"__name__", "__file__", "__package__", "__doc__", "__spec__", "globals"}


class Part(NamedTuple):
    """A source with all that the one file needs to know of its statements."""

    source: Source
    # Each other module of the package that this one imports, and the first such import.
    uses: dict[str, ast.stmt]
    foreign: list[tuple[Foreign, ast.stmt]]
    # Each name that the module binds at its top level, and where.
    names: dict[str, ast.AST]
    # The statements to remove; true for the first of its block.
    drops: list[tuple[ast.stmt, bool]]

    def body(self) -> str:
        """Return the text without the head and without what is to be removed."""
        lines = list(self.source.lines)
        for node, is_first in sorted(self.drops, key=lambda drop: -drop[0].lineno):
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            before, after = start, end
            while before > 0 and not lines[before - 1].strip():
                before -= 1
            while after < len(lines) and not lines[after].strip():
                after += 1
            blank = 0 if is_first else max(start - before, after - end)
            lines[before:after] = [""] * blank
        return "\n".join(lines[self.source.head :]).strip("\n")


def examine(package: Package, source: Source) -> Part:
    """Sort the imports of a source into kept and removed, and refuse what cannot be."""
    uses: dict[str, ast.stmt] = {}
    foreign: list[tuple[Foreign, ast.stmt]] = []
    inner, resolved = [], set[ast.stmt]()
    for place in import_places(source.tree.body):
        node = place.node
        if _is_inner(package, source, place):
            uses.setdefault(getattr(node, "module", ""), node)
            inner.append(place)
        elif is_future(node):
            _check_future(package, source, node)
        elif not place.around:
            foreign.extend((name, node) for name in foreign_of(node))
        else:
            continue
        resolved.add(node)
    for place in inner:
        _check_locals(source, place, resolved)
    _check_names(source)
    removed = {node for node in resolved if node.lineno > source.head}
    docstring = source.docstring()
    if docstring is not None and not source.is_entry:
        removed.add(docstring)
    drops = list(_drops(source, source.tree.body, removed))
    return Part(source, uses, foreign, top_names(source.tree, resolved), drops)


def _is_inner(package: Package, source: Source, place: Place) -> bool:
    """Tell whether an import is of the package; refuse the forms that have no one meaning."""
    node = place.node
    if any(alias.name == "*" for alias in node.names):
        raise source.refuse(node, "`import *` hides which names come in")
    if isinstance(node, ast.Import):
        if any(package.holds(alias.name) for alias in node.names):
            raise source.refuse(node, "import names of the package's module, not the module")
        return False
    if node.level:
        raise source.refuse(node, "write the full name of the module to import from")
    if not package.holds(node.module or ""):
        return False
    if node.lineno <= source.head:
        raise source.refuse(node, "the head must not import from the package")
    if place.is_in_class:
        raise source.refuse(node, "a class body must not import from the package")
    for alias in node.names:
        if alias.asname:
            raise source.refuse(node, f"import {alias.name} under its own name")
        _check_defined(package, source, node, alias.name)
    return True


def _check_defined(package: Package, source: Source, node: ast.ImportFrom, name: str) -> None:
    module = node.module or ""
    target = package.find(module)
    if target is None:
        raise source.refuse(node, f"there is no module {module}")
    # A foreign import inside a block stays where it stands, and so defines its name.
    moved = [
        place.node
        for place in import_places(target.tree.body)
        if not place.around or package.holds(getattr(place.node, "module", None) or "")
    ]
    if name in top_names(target.tree, moved):
        return
    if package.find(f"{module}.{name}") is not None:
        sentence = f"import names of {module}.{name}, not the module"
    elif name in top_names(target.tree):
        sentence = f"import {name} from the module that defines it, not from {target.shown}"
    else:
        sentence = f"{target.shown} does not define {name}"
    raise source.refuse(node, sentence)


def _check_future(package: Package, source: Source, node: ast.stmt) -> None:
    body = package.source(package.entry).tree.body
    known = {name for other in body if is_future(other) for name in bound_by(other)}
    if not known.issuperset(bound_by(node)):
        raise source.refuse(node, "the entry lacks this import from __future__")


def _check_locals(source: Source, place: Place, resolved: set[ast.stmt]) -> None:
    """Refuse an import in a function that also binds the name in another way."""
    if place.function is None:
        return
    for node in ast.walk(place.function):
        if node is not place.function and node not in resolved:
            for name in sorted({*bound_by(node)} & {*bound_by(place.node)}):
                where = f"line {place.node.lineno} imports {name} from the package"
                raise source.refuse(node, f"{where}, so this must have another name")


def _check_names(source: Source) -> None:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and node.id == "__all__":
            raise source.refuse(node, "__all__ has no meaning in one file")
        if isinstance(node, ast.Name) and node.id in MODULE_NAMES and not source.is_entry:
            raise source.refuse(node, f"{node.id} means something else in one file")


def _drops(
    source: Source, block: list[ast.stmt], removed: set[ast.stmt]
) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield what to remove; an `if TYPE_CHECKING` that would be empty goes as a whole."""
    for node in block:
        inner = list(blocks(node))
        empty = [statements for statements in inner if removed.issuperset(statements)]
        is_typing = is_if(node, "TYPE_CHECKING", "typing.TYPE_CHECKING") and len(inner) == 1
        if empty and not is_typing:
            raise source.refuse(empty[0][0], "without this import, its block would be empty")
        if node in removed or empty:
            _check_lines(source, node)
            yield node, node is block[0]
        else:
            for statements in inner:
                yield from _drops(source, statements, removed)


def _check_lines(source: Source, node: ast.stmt) -> None:
    """Refuse to remove a statement if something of the lines around would be lost."""
    last = node.end_lineno or node.lineno
    before = source.lines[node.lineno - 1].encode()[: node.col_offset].strip()
    after = source.lines[last - 1].encode()[node.end_col_offset :].strip()
    if before or (after and not after.startswith(b"#")):
        raise source.refuse(node, "another statement stands in the same line")
    if node.lineno - 1 in source.comments:
        raise source.refuse(node, "the comment above would stand over something else")
