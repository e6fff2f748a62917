"""Write ssh_proxy_command.py whole from the package http_network_relay, or check the file.

The entry module and all modules of the package that the entry imports become one file.
The entry's head comes first, then the foreign imports of all modules, then one section
for each module, dependencies before users. The syntax tree gives the positions; the text
is that of the sources. Code that would mean something else in one file is refused.

`python .ci/amalgamate.py` writes; with `--check`, the exit code is 1 if the file differs.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import sys
from pathlib import Path

from single_file.imports import LINE_LENGTH, Foreign, import_block
from single_file.part import Part, examine
from single_file.source import Package, Refusal, Source

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "http_network_relay/proxy_command/main.py"
OUTPUT = "ssh_proxy_command.py"
# The reading order of the package's folders and modules, as far as imports leave a choice.
LEVELS = ("wire", "rules", "leg", "settings", "timer", "end", "dial", "proxy_command")


def amalgamation(root: Path = ROOT, entry: str = ENTRY) -> str:
    """Return the text of the one file."""
    package = Package(root, entry)
    parts = _parts(package)
    _check_collisions(parts)
    sections = "\n\n\n".join(_section(part) for part in parts)
    tree = ast.parse(sections)
    entry_part = parts[-1]
    lines = entry_part.source.lines[: entry_part.source.head]
    names = {name for part in parts for name, _ in part.foreign}
    names -= {name for name, node in entry_part.foreign if node.lineno <= len(lines)}
    if all(getattr(node, "id", "") != "TYPE_CHECKING" for node in ast.walk(tree)):
        names.discard(Foreign("typing", "TYPE_CHECKING", ""))
    lines.insert(
        1 if lines[0].startswith("#!") else 0,
        f"# Generated from {package.name}/ by .ci/amalgamate.py: edit there, `make amalgamate`.",
    )
    head = "\n".join(lines)
    imports = f"\n\n{import_block(names)}" if names else ""
    gap = "\n" if names else "\n" * _blank_lines(tree)
    return f"{head}{imports}\n{gap}{sections}\n"


def included_modules(root: Path = ROOT, entry: str = ENTRY) -> list[Path]:
    """Return the files that the one file is made from, in its order."""
    return [part.source.path for part in _parts(Package(root, entry))]


def _parts(package: Package) -> list[Part]:
    """Return all parts, dependencies before users, and otherwise by LEVELS."""
    parts: dict[str, Part] = {}

    def rank(module: str) -> int:
        if module == package.entry:
            return len(LEVELS) + 1
        level = f"{module}.".split(".")[1]
        return LEVELS.index(level) if level in LEVELS else len(LEVELS) if level else -1

    def visit(module: str, path: tuple[str, ...], done: dict[str, Part]) -> None:
        part = parts.get(module) or examine(package, package.source(module))
        parts[module] = part
        for used in sorted(part.uses, key=rank):
            if used in (*path, module):
                circle = ", ".join((*path, module, used))
                raise part.source.refuse(part.uses[used], f"the imports run in a circle: {circle}")
            if used not in done:
                visit(used, (*path, module), done)
        done[module] = part

    found: dict[str, Part] = {}
    visit(package.entry, (), found)
    ordered: dict[str, Part] = {}
    for module in sorted(found, key=rank):
        if module not in ordered:
            visit(module, (), ordered)
    return list(ordered.values())


def _check_collisions(parts: list[Part]) -> None:
    """Refuse a name with two meanings in the one file."""
    imported: dict[str, tuple[Foreign, str]] = {}
    owners: dict[str, tuple[Source, ast.AST]] = {}
    for part in parts:
        for foreign, node in part.foreign:
            name, here = foreign.bound, (foreign, part.source.place(node))
            other, there = imported.setdefault(name, here)
            if other.meaning != foreign.meaning:
                sentence = f"{name} is imported at {there} with another meaning"
                raise part.source.refuse(node, sentence)
            if hasattr(builtins, name):
                raise part.source.refuse(node, f"{name} would hide Python's own {name}")
    for part in parts:
        for name, at in part.names.items():
            owner, first = owners.setdefault(name, (part.source, at))
            if owner is not part.source:
                raise part.source.refuse(at, f"{name} is also defined at {owner.place(first)}")
            if name in imported:
                raise part.source.refuse(at, f"{name} is also imported at {imported[name][1]}")
            if hasattr(builtins, name):
                raise part.source.refuse(at, f"{name} would hide Python's own {name}")


def _section(part: Part) -> str:
    """Return a header with the path and the module's docstring, then the module's code.

    The docstring is a comment without blank lines, so that all of it belongs to the header.
    """
    header = [f"# --- {part.source.shown} ".ljust(LINE_LENGTH, "-")]
    docstring = ast.get_docstring(part.source.tree, clean=False)
    if docstring and not part.source.is_entry:
        header.extend(f"# {line}" for line in docstring.split("\n") if line.strip())
    body = part.body()
    if body:
        header.append("\n" * _blank_lines(ast.parse(body)) + body)
    return "\n".join(header)


def _blank_lines(tree: ast.Module) -> int:
    """Return how many blank lines ruff wants before the first statement."""
    first = tree.body[0] if tree.body else None
    return 2 if isinstance(first, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the proxy command as one file.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if different")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the package")
    parser.add_argument("--entry", default=ENTRY, help=f"relative to the root (default: {ENTRY})")
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT} in the root")
    options = parser.parse_args(argv)
    output: Path = options.output or options.root / OUTPUT
    try:
        wanted = amalgamation(options.root, options.entry).encode()
    except Refusal as exc:
        print(exc, file=sys.stderr)
        return 1
    is_there = output.is_file()
    if options.check:
        if is_there and output.read_bytes() == wanted:
            return 0
        package = options.entry.split("/")[0]
        print(f"{output.name} is not what {package}/ makes: run `make amalgamate`", file=sys.stderr)
        return 1
    output.write_bytes(wanted)
    if not is_there:
        output.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
