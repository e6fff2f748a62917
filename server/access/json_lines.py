"""JSON with the line of each value, for messages that name it. No I/O."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"-?[0-9][0-9.eE+-]*|true|false|null")


class LineError(ValueError):
    """A line of a file is wrong; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


class JsonError(LineError):
    """The content is no JSON, or has a key twice. The message quotes nothing of it."""


@dataclass(frozen=True)
class Node:
    """A JSON value and its line.

    `value` is a str, a dict of Nodes (`keys` has the keys' lines), a list of Nodes, a
    float, a bool or None.
    """

    value: Any = field(repr=False)
    line: int
    keys: dict[str, int] = field(default_factory=dict, repr=False)

    def plain(self) -> Any:
        """Return the value without lines, as json.loads() gives it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def parse_json(content: bytes) -> Node:
    """Read one JSON value in UTF-8, with a byte order mark or without. Raises JsonError."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise JsonError("not JSON in UTF-8", line) from None
    try:
        # The standard library checks the text; the walk below only finds the lines. float, since
        # int() raises for thousands of digits.
        json.loads(text, parse_int=float)
        return _Walk(text).value(_skip(text, 0))[0]
    except json.JSONDecodeError as exc:
        # Not str(exc.doc), which is the whole file.
        raise JsonError(f"not JSON ({exc.msg}, column {exc.colno})", exc.lineno) from None
    except RecursionError:
        raise JsonError("not JSON of ours: too deeply nested", 1) from None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


class _Walk:
    """Goes once through a text that is valid JSON. Each step returns the offset of its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._line = 1
        self._counted_to = 0

    def _line_at(self, at: int) -> int:
        # Offsets only grow, so each line end is counted once.
        self._line += self._text.count("\n", self._counted_to, at)
        self._counted_to = at
        return self._line

    def value(self, at: int) -> tuple[Node, int]:
        text, line = self._text, self._line_at(at)
        if text[at] == "{":
            return self._object(at, line)
        if text[at] == "[":
            return self._array(at, line)
        if text[at] == '"':
            string, end = scanstring(text, at + 1)
            return Node(string, line), end
        word = _WORD.match(text, at)
        if word is None:
            # json.loads() takes NaN and Infinity.
            raise JsonError("not JSON (neither a number, true, false nor null)", line)
        return Node(json.loads(word[0], parse_int=float), line), word.end()

    def _object(self, at: int, line: int) -> tuple[Node, int]:
        text, found, keys = self._text, {}, {}
        at = _skip(text, at + 1)
        while text[at] != "}":
            key_line = self._line_at(at)
            key, at = scanstring(text, at + 1)
            if key in found:
                raise JsonError("a name stands here for the second time; remove one", key_line)
            keys[key] = key_line
            # Skips the colon, and behind the value the comma.
            found[key], at = self.value(_skip(text, _skip(text, at) + 1))
            at = self._next(at)
        return Node(found, line, keys), at + 1

    def _array(self, at: int, line: int) -> tuple[Node, int]:
        found: list[Node] = []
        at = _skip(self._text, at + 1)
        while self._text[at] != "]":
            node, at = self.value(at)
            found.append(node)
            at = self._next(at)
        return Node(found, line), at + 1

    def _next(self, at: int) -> int:
        """Return the offset of the next member, or of the end of the object or array."""
        at = _skip(self._text, at)
        return _skip(self._text, at + 1) if self._text[at] == "," else at
