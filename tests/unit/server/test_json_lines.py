"""JSON with lines: the same values as json.loads(), and where each stands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.access.json_lines import JsonError, Node, parse_json

SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS | st.integers(-(2**50), 2**50),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@settings(deadline=None)
@given(VALUES, st.sampled_from([None, 0, 1, 3]), st.booleans())
def test_values_are_those_of_the_standard_library(
    value: Any, indent: int | None, is_ascii: bool
) -> None:
    """Whatever the layout; numbers are floats."""
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    content = text.encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(content.decode("utf-8"), parse_int=float)
    except UnicodeDecodeError:
        with pytest.raises(JsonError, match="UTF-8"):
            parse_json(content)
        return
    assert parse_json(content).plain() == expected


def outcome(content: bytes) -> Node | JsonError:
    """What becomes of the content; any other exception fails the test."""
    try:
        return parse_json(content)
    except JsonError as exc:
        return exc


PIECES = ["{", "}", "[", "]", ":", ",", '"', '"a"', "1", "-1.5e3", "null", "tru", " ", "\n", "\\"]
PIECES += [
    "NaN",
    "-",
    "-Infinity",
    "1e999",
    "\ufeff",
    "\ud800",
    '"\\ud800"',
    "\x0c",
    "//",
    "[" * 50,
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20))
@example("[" * 100_000)
@example("9" * 5000)
@example("")
@example("\ufeff\ufeff1")
def test_only_json_is_taken(text: str) -> None:
    """What is taken is what json.loads() takes, less NaN and names that stand twice."""
    content = text.encode("utf-8", "surrogatepass")
    found = outcome(content)
    try:
        expected = json.loads(content.decode("utf-8-sig"), parse_int=float)
    except (ValueError, RecursionError):
        assert isinstance(found, JsonError)
        assert 1 <= found.line <= content.count(b"\n") + 1
        return
    if isinstance(found, JsonError):
        assert "NaN" in text or "Infinity" in text or "twice" in found.message
    else:
        assert found.plain() == expected


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_bytes_of_any_kind_are_json_or_an_error(content: bytes) -> None:
    """No other exception."""
    found = outcome(content)
    assert isinstance(found, Node) or "\n" not in found.message


@settings(deadline=None)
@given(VALUES)
def test_lines_are_those_on_which_the_values_stand(value: Any) -> None:
    """With one value a line, each line that is told holds its own value or key."""
    text = json.dumps(value, indent=1)
    lines = text.split("\n")

    def check(node: Node) -> None:
        line = lines[node.line - 1]
        if isinstance(node.value, dict):
            assert "{" in line
            assert list(node.keys) == list(node.value)
            for key, child in node.value.items():
                assert lines[node.keys[key] - 1].lstrip().startswith(json.dumps(key))
                assert child.line == node.keys[key]
                check(child)
        elif isinstance(node.value, list):
            assert "[" in line
            for child in node.value:
                check(child)
        elif isinstance(node.value, str):
            assert json.dumps(node.value) in line

    check(parse_json(text.encode()))


def test_name_that_stands_twice_is_an_error_with_the_second_line() -> None:
    """The standard library would take the last and be silent."""
    with pytest.raises(JsonError, match="for the second time") as caught:
        parse_json(b'{"a": 1,\n"b": {"a": 2},\n\n"a": 3}')
    assert caught.value.line == 4


def test_name_that_stands_twice_is_not_quoted() -> None:
    """It may be a secret, or a file of the wrong kind that would fill the log with one line."""
    with pytest.raises(JsonError) as caught:
        parse_json(b'{"%s": 1, "%s": 2}' % (b"xyz" * 3000, b"xyz" * 3000))
    assert "xyz" not in str(caught.value)


def test_byte_order_mark_and_spaces_around_are_no_error() -> None:
    """Editors on Windows write the one, and line ends of their own."""
    node = parse_json(b'\xef\xbb\xbf\r\n [\r\n"a"\r\n]\r\n')
    assert node.line == 2
    assert node.value[0].line == 3
