"""The foreign imports of all modules as one block, in the order and form of ruff."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

LINE_LENGTH = 100


class Foreign(NamedTuple):
    """One name that a module imports at its top level from outside the package."""

    module: str
    # Empty for `import module`.
    name: str
    alias: str

    @property
    def bound(self) -> str:
        return self.alias or self.name or self.module.split(".")[0]

    @property
    def meaning(self) -> tuple[str, str]:
        """What the bound name stands for; `import a` and `import a.b` both bind a."""
        is_plain = not self.alias and not self.name
        return (self.bound if is_plain else self.module, self.name)


def foreign_of(node: ast.Import | ast.ImportFrom) -> Iterator[Foreign]:
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield Foreign(alias.name, "", alias.asname or "")
        else:
            yield Foreign(node.module or "", alias.name, alias.asname or "")


def import_block(names: Iterable[Foreign]) -> str:
    """Return the import statements: the standard library's first, then those of others."""
    sections: dict[bool, list[tuple[Any, str]]] = {False: [], True: []}
    members: dict[tuple[str, str], list[str]] = {}
    for foreign in sorted(names):
        is_other = foreign.module.split(".")[0] not in sys.stdlib_module_names
        renamed = f" as {foreign.alias}" if foreign.alias else ""
        if foreign.name:
            # A renamed member has a statement of its own.
            own = f"{foreign.name}{renamed}" if renamed else ""
            members.setdefault((foreign.module, own), []).append(f"{foreign.name}{renamed}")
        else:
            key = (0, _natural(foreign.module), renamed)
            sections[is_other].append((key, f"import {foreign.module}{renamed}"))
    for (module, _), found in members.items():
        found.sort(key=_member_key)
        line = f"from {module} import {', '.join(found)}"
        if len(line) > LINE_LENGTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in found) + ")"
        is_other = module.split(".")[0] not in sys.stdlib_module_names
        sections[is_other].append(((1, _natural(module), _member_key(found[0])), line))
    texts = ["\n".join(line for _, line in sorted(section)) for section in sections.values()]
    return "\n\n".join(text for text in texts if text)


def _member_key(name: str) -> tuple[int, Any]:
    """Constants come first, then classes, then the rest."""
    own = name.split(" ")[0]
    kind = 0 if len(own) > 1 and own.isupper() else 1 if own[0].isupper() else 2
    return kind, _natural(name)


def _natural(text: str) -> tuple[Any, str]:
    """Return a key that ignores case and sorts numbers by their value."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdigit() else part for part in parts], text
