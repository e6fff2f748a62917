"""No secret that a test uses may show in what a program writes: log, message or audit line.

Whoever gives a program a secret, right or wrong, notes it here; tests/support/processes.py looks
through all output when a process ends.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path

# Shorter ones stand in honest output by chance, and looking for them would tell nothing.
SHORTEST_SECRET = 16
AUDIT_LOG = "HTTP_NETWORK_RELAY_AUDIT_LOG"

# Each secret of this run, and how it may look.
_noted: dict[str, tuple[bytes, ...]] = {}
# Whoever writes a secret into a URL is past help: the access log has it.
_IN_A_URL = re.compile(rb"\?secret=\S*")


def secret_of(name: str) -> str:
    """A made-up secret that says whose it is, and is as long as real ones are."""
    return f"{name}-hT7wq0ZkV3yB9uXn5rLm"


def note_secrets(*secrets: str | None) -> None:
    """See to it that no process shows these. None and "" are none; hashes may be shown."""
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
    """AssertionError if one of the noted secrets stands there, in any form."""
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
