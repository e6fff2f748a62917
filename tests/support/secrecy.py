"""No program may write a secret of a test into a log, a message or an audit line.

A test that passes a secret to a program, right or wrong, MUST note the secret here.
tests/support/processes.py searches all output when a process ends.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path

# Shorter secrets appear in output by chance, so a search for them proves nothing.
SHORTEST_SECRET = 16
AUDIT_LOG = "HTTP_NETWORK_RELAY_AUDIT_LOG"

# Each secret of this run, and the forms in which it may appear.
_noted: dict[str, tuple[bytes, ...]] = {}
# A secret inside a URL cannot be hidden: the access log has the URL.
_IN_A_URL = re.compile(rb"\?secret=\S*")


def secret_of(name: str) -> str:
    """Return a made-up secret that names its owner and has the length of a real one."""
    return f"{name}-hT7wq0ZkV3yB9uXn5rLm"


def note_secrets(*secrets: str | None) -> None:
    """Let no process write these secrets. None and "" are no secrets; hashes may be written."""
    for secret in secrets:
        if not secret or secret.startswith("sha256:"):
            continue
        assert len(secret) >= SHORTEST_SECRET, f"too short to be looked for: {secret!r}"
        _noted[secret] = _forms(secret.encode())


def note_credentials(credentials: object) -> None:
    """Note the secrets of a credentials file; of one of the wrong form what can be found."""
    if not isinstance(credentials, dict):
        return
    users = credentials.get("proxy_users", [])
    entries = [*credentials.get("clients", {}).values()]
    entries += users.values() if isinstance(users, dict) else users
    for entry in entries:
        note_secrets(*(entry["secrets"] if isinstance(entry, dict) else [entry]))


def check_no_secret(who: str, *texts: bytes | str) -> None:
    """Raise AssertionError if the text has a noted secret in any form."""
    for text in texts:
        data = text.encode(errors="replace") if isinstance(text, str) else text
        data = _IN_A_URL.sub(b"", data)
        shown = [
            secret[:4] + "..."
            for secret, forms in _noted.items()
            if any(form in data for form in forms)
        ]
        assert not shown, f"{who} has written secrets: {shown}"


def audit_logs(env: Mapping[str, str] | None) -> list[Path]:
    """The audit files that a server with this environment has written, rotated ones too."""
    name = (env or {}).get(AUDIT_LOG, "")
    path = Path(name)
    if not path.is_absolute():
        return []  # Off, or stdout.
    return [each for each in path.parent.glob(f"{path.name}*") if each.is_file()]


def _forms(secret: bytes) -> tuple[bytes, ...]:
    """A secret as it is, and the part of it that is in base64 wherever it stands in a text.

    HTTP Basic sends `name:secret` so, with any name: its length says where the groups of three
    bytes begin. The first characters and the last depend on what is beside the secret.
    """
    forms = [secret]
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + secret)
        first = -(-before * 8 // 6)
        forms.append(encoded[first : (before + len(secret)) * 8 // 6])
    return tuple(forms)
