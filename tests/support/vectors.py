"""The golden vectors."""

from __future__ import annotations

import json
from typing import Any

from tests.support.processes import ROOT

VECTORS: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "wire.json").read_text("utf-8"))
