"""The shared code as its two users see it: the package, and the generated single file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ssh_proxy_command.py"
PACKAGE = ROOT / "http_network_relay"


@cache
def load_script() -> ModuleType:
    """Return the single file as a module."""
    spec = importlib.util.spec_from_file_location("ssh_proxy_command_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


@cache
def load_package() -> Any:
    """Return all public names of the shared package in one namespace, as the script has them."""
    names: dict[str, Any] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem != "__init__":
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            names.update(
                (name, value) for name, value in vars(module).items() if not name.startswith("_")
            )
    return SimpleNamespace(**names)


def load(name: str) -> Any:
    """Return the names of the `package` or of the `script`."""
    return {"package": load_package, "script": load_script}[name]()
