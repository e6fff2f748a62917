"""Controls by their type's name and fields, as the golden vectors and the tests write them.

`program` is where the classes come from: the shared package, or the generated script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.support.programs import load

_OPTIONAL = ("channel", "user")


def from_dict(fields: Mapping[str, Any], program: Any = None) -> Any:
    """Return the control of a dict that as_dict() makes."""
    program = program or load("package")
    return program.TYPES[fields["type"]](**{k: v for k, v in fields.items() if k != "type"})


def encode(kind: str, channel: int = 0, **fields: Any) -> bytes:
    """Return the JSON of the control of that type; a newer peer says more than its fields."""
    program = load("package")
    known = {k: v for k, v in fields.items() if k in program.TYPES[kind]._fields}
    text: bytes = program.encode_control(from_dict({"type": kind, **known, "channel": channel}))
    return json.dumps({**json.loads(text), **fields}).encode() if known != fields else text


def as_dict(control: Any, program: Any = None) -> dict[str, Any]:
    """Return the control's type and fields, without those that its leg does not have."""
    program = program or load("package")
    fields = {"type": program.type_of(control), **control._asdict()}
    return {name: value for name, value in fields.items() if value or name not in _OPTIONAL}
