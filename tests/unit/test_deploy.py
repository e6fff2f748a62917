"""deploy/: what the systemd unit of the server sets up is what the server needs."""

import re
from pathlib import Path

from server.config import AUDIT_LOG, CREDENTIALS_FILE
from tests.support.processes import ROOT

UNIT = (ROOT / "deploy" / "http-network-relay-server.service").read_text("utf-8")


def values(key: str) -> list[str]:
    """What the unit gives for a key, in its order."""
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


def path_of(variable: str) -> Path:
    """The path that a variable has in the unit, be it only in a comment to take it from."""
    (found,) = re.findall(rf"^#?Environment={variable}=(.*)$", UNIT, re.MULTILINE)
    return Path(found)


def test_server_reads_the_credentials_file_itself_and_no_copy_of_it() -> None:
    """systemd copies a credential once, at the start: nobody could be revoked after it."""
    for key in ("LoadCredential", "LoadCredentialEncrypted", "SetCredential"):
        assert values(key) == []
    assert "CREDENTIALS_DIRECTORY" not in UNIT
    path = path_of(CREDENTIALS_FILE.variable)
    assert path.is_absolute()
    assert "%d" not in str(path)


def test_user_of_the_unit_may_replace_the_credentials_file_and_write_the_audit_log() -> None:
    """The folder is made for the very user that the server runs as, who must be no dynamic one."""
    (user,) = values("User")
    assert values("DynamicUser") == []
    assert re.search(rf"^#   useradd .* {user}$", UNIT, re.MULTILINE)
    folder = path_of(CREDENTIALS_FILE.variable).parent
    assert f"#   install -d -o {user} -g {user} -m 0700 {folder}\n" in UNIT
    assert [Path("/var/log", each) for each in values("LogsDirectory")] == [
        path_of(AUDIT_LOG.variable).parent
    ]


def test_access_page_names_the_user_and_the_file_of_the_unit() -> None:
    """What a reader types there edits the file that the unit reads."""
    page = (ROOT / "docs" / "access.md").read_text("utf-8")
    assert f"sudo -u {values('User')[0]} " in page
    assert f"--credentials-file {path_of(CREDENTIALS_FILE.variable)} " in page
