"""The golden vectors, and the modules that they are read by."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "wire.json").read_text("utf-8"))
SCRIPT = ROOT / "ssh_proxy_command.py"


@cache
def load(name: str) -> ModuleType:
    """Return a module of the project, or the script, which is no package's member."""
    if name != "script":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("ssh_proxy_command_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module
