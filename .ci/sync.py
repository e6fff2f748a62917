"""Rewrite the copies of the code that both ends of a leg share, or check them.

The server, the client and the script never import each other. What they must have
in common stands once, in client/, and is copied by this command:

- wire.py, outbox.py, duplex.py, framing.py, outlet.py, rules.py and covering.py whole into
  server/;
- the files of BLOCK_PARTS in order, without their imports of each other, into the
  marked block of ssh_proxy_command.py.

`python .ci/sync.py` writes, `python .ci/sync.py --check` exits 1 if a copy differs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER_COPIES = ("wire", "outbox", "duplex", "framing", "outlet", "rules", "covering")
BLOCK_PARTS = (
    "wire",
    "errors",
    "backoff",
    "settings",
    "outbox",
    "duplex",
    "framing",
    "outlet",
    "gather",
    "window",
    "stream",
    "dial",
    "transport",
    "tunnel_end",
    "timer",
)
BEGIN = "# --- begin of the shared block: written by `make sync` from client/, do not edit ---\n"
END = "# --- end of the shared block ---\n"

_DOCSTRING = re.compile(r'\A"""(.*?)"""\n', re.DOTALL)
_IMPORT = re.compile(r"^(?:from [\w.]+ import (?:\([^)]*\)|[^\n(]+)|import [^\n]+)\n", re.MULTILINE)


def server_copy(name: str) -> str:
    """Return what server/NAME.py must be."""
    text = (ROOT / "client" / f"{name}.py").read_text("utf-8")
    head = f"# Written by `make sync` from client/{name}.py, do not edit.\n"
    return head + text.replace("from client.", "from server.")


def script_block() -> str:
    """Return what stands between the marks; the script itself imports what it needs."""
    bodies: list[str] = []
    for name in BLOCK_PARTS:
        text = (ROOT / "client" / f"{name}.py").read_text("utf-8")
        docstring = _DOCSTRING.match(text)
        if docstring is None:
            raise SystemExit(f"client/{name}.py has no docstring")
        # Imports inside a function are indented and stay.
        text = _IMPORT.sub("", text[docstring.end() :])
        about = "".join(f"# {line}".rstrip() + "\n" for line in docstring[1].strip().split("\n"))
        bodies.append(f"# {name}\n#\n{about}\n\n{text.strip()}\n")
    return "\n" + "\n\n".join(bodies) + "\n\n"


def copies() -> dict[Path, str]:
    """Return every file that holds a copy, with the text that it must have."""
    wanted = {ROOT / "server" / f"{name}.py": server_copy(name) for name in SERVER_COPIES}
    script = ROOT / "ssh_proxy_command.py"
    before, rest = script.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    wanted[script] = before + BEGIN + script_block() + END + after
    return wanted


def main(argv: list[str]) -> int:
    stale = [
        path for path, text in copies().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what client/ says: run `make sync`")
        return 1 if stale else 0
    for path, text in copies().items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
