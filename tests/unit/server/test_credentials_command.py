"""`server credentials`: what it writes, prints and refuses, and that no edit is lost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main as server_main
from server.access.command import write as credentials_write
from server.access.command.main import main
from server.access.file import load_credentials
from tests.support.processes import ROOT

VARIABLE = "HTTP_NETWORK_RELAY_CREDENTIALS_FILE"
ALL = ["--allow", "*:*:*"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the command edits, which is not there yet."""
    found = tmp_path / "relay" / "credentials.json"
    found.parent.mkdir()
    monkeypatch.setenv(VARIABLE, str(found))
    return found


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; give exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def write(path: Path, content: Any) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(content))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def new_secret(printed: tuple[int, str, str]) -> str:
    code, out, err = printed
    assert (code, err) == (0, "")
    secret = out.split("\n")[0]
    assert re.fullmatch(r"[\w-]{43}", secret)
    # Shown once: not in the command line below it.
    assert out.count(secret) == 1
    return secret


def test_added_secrets_let_in_and_are_not_in_the_file(path: Path, run: Run) -> None:
    """From no file to a client and a user who may open what the rules say."""
    secret = new_secret(run("add-client", "lab-1"))
    token = new_secret(run("add-user", "ops", "--allow", "lab-*:lan:22", "--expires", "2099-01-31"))

    credentials = load_credentials(str(path))
    assert credentials.check_client("lab-1", secret)
    assert credentials.check_user(token) == "ops"
    assert credentials.may_open("ops", "lab-1", "lan", 22) == "lab-*:lan:22"
    text = path.read_text()
    assert secret not in text
    assert token not in text
    assert read(path)["proxy_users"]["ops"]["expires"] == "2099-01-31"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_printed_commands_work_for_the_other_side(
    path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines that make the secret's file, and the flags that the programs know."""
    import client.config
    from tests.support.programs import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()

    def follow(out: str) -> list[str]:
        secret = out.split("\n")[0]
        to_file, command = [line.strip() for line in out.split("\n") if line.startswith("    ")][:2]
        subprocess.run(["sh", "-c", to_file], input=f"{secret}\n", text=True, check=True)
        shown = ["sh", "-c", f"printf '%s\\n' {command}"]
        return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()

    url = ["--server-url", "https://relay.test"]
    _, out, _ = run("add-client", "lab;1", *url)
    program, *argv = follow(out)
    config = client.config.read_config(argv, {})
    assert (program, config.name, config.secret) == ("client", "lab;1", out.split("\n")[0])
    assert config.endpoint.host == "relay.test"
    assert (tmp_path / "client.secret").stat().st_mode & 0o777 == 0o600

    for rule, target in (
        ("lab*:[fd00::1]:5432", ("fd00::1", 5432)),
        ("lab*:127.0.0.0/8:20-30", ("127.0.0.1", 22)),
        ("*:*.lan:*", ("HOST", 22)),
    ):
        _, out, _ = run("add-user", rule.replace(":", "_").replace("*", "_"), "--allow", rule, *url)
        program, *argv = follow(out)
        settings = load("script").read_settings(argv, {})
        assert program == "ssh_proxy_command.py"
        assert (settings.client, settings.token) == ("lab;1", out.split("\n")[0])
        assert (settings.host, settings.port) == target


def test_rotation_keeps_the_old_secret_until_it_is_revoked(path: Path, run: Run) -> None:
    """No moment in which neither is valid; the printed command ends the old one."""
    old = new_secret(run("add-client", "lab"))
    _, out, _ = printed = run("rotate", "lab")
    new = new_secret(printed)
    both = load_credentials(str(path))
    assert both.check_client("lab", old)
    assert both.check_client("lab", new)

    revoke = out.strip().split("\n")[-1].split()
    assert revoke[:3] == ["server", "credentials", "revoke"]
    assert run(*revoke[2:])[0] == 0

    only = load_credentials(str(path))
    assert not only.check_client("lab", old)
    assert only.check_client("lab", new)


def test_rotation_ends_the_old_secrets_at_once_when_told_so(path: Path, run: Run) -> None:
    """For a stolen device: name and rules stay, its secret does not."""
    old = new_secret(run("add-client", "lab"))
    run("add-user", "ops", "--allow", "lab:lan:22")
    new = new_secret(run("rotate", "lab", "--drop-old"))

    credentials = load_credentials(str(path))
    assert not credentials.check_client("lab", old)
    assert credentials.check_client("lab", new)
    assert credentials.may_open("ops", "lab", "lan", 22)


def test_short_form_is_kept_until_an_edit_needs_another(path: Path, run: Run) -> None:
    """Adding a client converts nothing; a token with a name becomes an object, its login stays."""
    short = {"clients": {"a": "plain-a"}, "proxy_users": ["tok-1", "tok-2"]}
    write(path, short)
    run("add-client", "b")
    assert read(path)["proxy_users"] == short["proxy_users"]
    assert read(path)["clients"]["a"] == "plain-a"
    before = load_credentials(str(path))
    logins = [before.login_user(token) for token in ("tok-1", "tok-2")]
    names = [login.name for login in logins if login is not None]

    new = new_secret(run("rotate", names[0]))
    new_secret(run("rotate", "a"))

    after = load_credentials(str(path))
    assert all(login is not None and after.is_valid(login) for login in logins)
    assert after.check_user(new) == names[0]
    assert after.may_open(names[1], "a", "lan", 22) == "*:*:*"
    assert after.check_client("a", "plain-a")
    assert read(path)["clients"]["a"]["secrets"][0] == "plain-a"


def test_short_form_token_is_revoked_by_the_name_that_logs_have(path: Path, run: Run) -> None:
    """The list stays a list."""
    write(path, {"clients": {"a": "x"}, "proxy_users": ["tok-1", "tok-2"]})
    name = load_credentials(str(path)).check_user("tok-1")
    assert name is not None

    assert run("revoke", name) == (0, f"revoked user {name}\n", "")

    assert read(path) == {"clients": {"a": "x"}, "proxy_users": ["tok-2"]}
    assert run("revoke", "a")[0] == 0
    assert read(path) == {"clients": {}, "proxy_users": ["tok-2"]}


def test_revoked_client_takes_its_own_rules_along_and_says_so(path: Path, run: Run) -> None:
    """Rules that match another client, or everything, stay."""
    for name in ("lab-1", "lab-2", "gw"):
        run("add-client", name)
    rules = ["lab-1:lan:22", "lab-*:lan:80", "gw:lan:22", "*:lan:443"]
    run("add-user", "ops", *[word for rule in rules for word in ("--allow", rule)])

    code, out, _ = run("revoke", "lab-1")

    assert code == 0
    assert out == "revoked client lab-1\nremoved rule lab-1:lan:22 of user ops\n"
    assert read(path)["proxy_users"]["ops"]["allow"] == rules[1:]


def test_revocation_never_removes_a_user_unasked(path: Path, run: Run) -> None:
    """A user without a rule would not load; the error says what to do, and both ways work."""
    run("add-client", "lab")
    run("add-user", "ops", "--allow", "lab:lan:22")
    before = path.read_text()

    code, out, err = run("revoke", "lab")

    assert (code, out) == (1, "")
    assert "name ops too" in err
    assert path.read_text() == before
    assert run("revoke", "lab", "ops")[0] == 0
    assert read(path) == {"clients": {}, "proxy_users": {}}


def test_name_of_a_client_and_a_user_has_to_be_told_apart(path: Path, run: Run) -> None:
    """--client or --user."""
    run("add-client", "lab")
    run("add-user", "lab", *ALL)

    assert run("rotate", "lab")[0] == 1
    assert "--client or --user" in run("revoke", "lab")[2]
    assert run("revoke", "--client", "lab")[1] == "revoked client lab\n"
    assert run("revoke", "--client", "lab")[0] == 1
    assert run("revoke", "--user", "lab")[1] == "revoked user lab\n"


def test_list_shows_everything_but_secrets(path: Path, run: Run) -> None:
    """Ids, plain ones marked, rules and last days."""
    content = {
        "clients": {"a": "hush-a", "b": {"secrets": ["hush-b"], "expires": "2020-01-31"}},
        "proxy_users": {"ops": {"secrets": ["hush-c"], "allow": ["a:lan:22", "*:[::1]:*"]}},
    }
    write(path, content)
    new_secret(run("rotate", "a"))

    code, out, err = run("list")

    assert (code, err) == (0, "")
    assert "hush" not in out
    ids = re.findall(r"\b[0-9a-f]{8}\b", out)
    assert out.splitlines() == [
        f"client a secrets={ids[0]}(plain),{ids[1]}",
        f"client b secrets={ids[2]}(plain) expires=2020-01-31(over)",
        f"user ops secrets={ids[3]}(plain) allow=a:lan:22 allow=*:[::1]:*",
    ]
    write(path, {"clients": {}, "proxy_users": ["hush"]})
    assert re.fullmatch(r"user token-(\w{8}) secrets=\1\(plain\) allow=\*:\*:\*\n", run("list")[1])


def test_check_says_ok_or_what_is_wrong(path: Path, run: Run) -> None:
    """Exit code 0 or 1, one line."""
    assert run("check")[0] == 1
    run("add-client", "a")
    assert run("check") == (0, f"OK: {path}: clients=1 proxy_users=0\n", "")
    path.write_text('{"clients": {"a": "hush"},\n"proxy_user": []}')

    code, out, err = run("check")

    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}: line 2: ")
    assert err.count("\n") == 1
    assert "hush" not in err


FAILS = {
    "add-client lab": "there is a client lab",
    "add-user ops --allow *:*:*": "there is a proxy user ops",
    "add-user new --allow lba-*:lan:22": "not changed: proxy user new: no client is named lba-*",
    "add-user new --allow *:*:* --allow lab:lan:22": "not changed: proxy user new: the rule",
    "add-user new --allow lab:lan:22 --allow lab:lan:22": "has no effect beside",
    "rotate nobody": "there is no client or user nobody",
    "rotate --user lab": "there is no user lab",
    "revoke lab nobody": "there is no client or user nobody",
    "revoke lab --secret 00000000": "has no secret 00000000; it has",
    "rotate over": "client over is expired",
}
WRONG = {
    "": "COMMAND",
    "destroy": "invalid choice",
    "add-client": "NAME",
    "add-client a:b": "without spaces, colons and stars",
    "add-client a*": "without spaces, colons and stars",
    "add-client a --expires 2020-01-01": "a day that is not over",
    "add-client a --expires 31.1.2099": "a day that is not over",
    "add-client a --expires 2099-02-30": "a day that is not over",
    "add-client a --expires never": "a day that is not over",
    "add-user a": "--allow",
    "add-user a --allow lab:lan": "CLIENT:TARGET",
    "add-user a --allow lab:10.0.0.1/8:22": "write 10.0.0.0/8",
    "revoke": "NAME",
    "revoke a b --secret 00000000": "one name",
    "revoke a --secret xyz": "8 hex digits",
    "list x": "unrecognized",
}


@pytest.mark.parametrize(
    ("line", "code", "fix"),
    [(line, 1, fix) for line, fix in FAILS.items()]
    + [(line, 2, fix) for line, fix in WRONG.items()],
)
def test_refusal_is_one_line_and_changes_nothing(
    path: Path, run: Run, line: str, code: int, fix: str
) -> None:
    """1: the file says no; 2: the command line is wrong."""
    content = {
        "clients": {"lab": "hush", "over": {"secrets": ["x"], "expires": "2020-01-01"}},
        "proxy_users": {"ops": {"secrets": ["hush-t"], "allow": ["*:*:*"]}},
    }
    write(path, content)

    found, out, err = run(*line.split())

    assert (found, out) == (code, "")
    assert fix in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "hush" not in err
    assert read(path) == content


def test_only_secret_is_not_revoked_alone(path: Path, run: Run) -> None:
    """The error names both ways."""
    new_secret(run("add-client", "lab"))
    secret_id = run("list")[1].strip()[-8:]
    code, _, err = run("revoke", "lab", "--secret", secret_id)
    assert code == 1
    assert "`revoke lab`" in err
    assert "--drop-old" in err


def test_rotation_sets_and_ends_the_last_day(path: Path, run: Run) -> None:
    """A new date, `never`, or no change."""
    write(path, {"clients": {"a": {"secrets": ["x"], "expires": "2020-01-01"}}, "proxy_users": []})
    assert run("rotate", "a", "--expires", "2099-01-01")[0] == 0
    assert read(path)["clients"]["a"]["expires"] == "2099-01-01"
    assert run("rotate", "a")[0] == 0
    assert read(path)["clients"]["a"]["expires"] == "2099-01-01"
    assert run("rotate", "a", "--expires", "never")[0] == 0
    assert "expires" not in read(path)["clients"]["a"]
    assert date.today() < date(2099, 1, 1)


def test_file_that_is_wrong_is_not_edited(path: Path, run: Run) -> None:
    """Its error comes first, with the line of the file as it stands."""
    path.write_text('{"clients": {},\n "proxy_users": 5}')
    code, _, err = run("add-client", "a")
    assert code == 1
    assert f"{path}: line 2: " in err
    assert path.read_text() == '{"clients": {},\n "proxy_users": 5}'


def test_link_stays_a_link_and_what_it_leads_to_is_replaced(
    path: Path, run: Run, tmp_path: Path
) -> None:
    """The lock is beside the file itself, so both names exclude each other."""
    real = tmp_path / "real.json"
    write(real, {"clients": {}, "proxy_users": []})
    path.symlink_to(real)
    new_secret(run("add-client", "a"))
    assert path.is_symlink()
    assert list(read(real)["clients"]) == ["a"]
    assert (tmp_path / "real.json.lock").exists()


@pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o640, 0o640), (0o400, 0o600)])
def test_mode_gives_others_nothing(path: Path, run: Run, before: int, after: int) -> None:
    """A group that reads the file, as the server's may, goes on to."""
    write(path, {"clients": {}, "proxy_users": []})
    path.chmod(before)
    new_secret(run("add-client", "a"))
    assert path.stat().st_mode & 0o777 == after


def test_file_that_everybody_could_read_is_closed_with_a_warning(
    path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be that the server read it so."""
    write(path, {"clients": {}, "proxy_users": []})
    path.chmod(0o644)
    run("add-client", "a")
    assert path.stat().st_mode & 0o777 == 0o640
    assert "was readable by everybody" in caplog.text


def test_owner_stays_when_root_edits(path: Path, run: Run) -> None:
    """The server's user goes on to read the file, and to edit it. (Others have one owner.)"""
    write(path, {"clients": {}, "proxy_users": []})
    owner = (12345, 23456) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for each in (path, path.parent):
        os.chown(each, *owner)
    new_secret(run("add-client", "a"))
    assert (path.stat().st_uid, path.stat().st_gid) == owner
    assert Path(f"{path}.lock").stat().st_uid == owner[0]


def test_lock_of_another_name_is_left_to_its_owner(path: Path, run: Run, tmp_path: Path) -> None:
    """Whoever owns the folder must not get a file of root's by linking it there."""
    other = tmp_path / "other"
    other.touch()
    owner = (12345, 23456) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path.parent, *owner)
    os.link(other, f"{path}.lock")
    new_secret(run("add-client", "a"))
    assert other.stat().st_uid == os.geteuid()
    os.unlink(f"{path}.lock")
    os.symlink(other, f"{path}.lock")
    assert run("add-client", "b")[0] == 1


def test_failed_write_leaves_the_old_file_and_nothing_else(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for one."""
    run("add-client", "a")
    before = path.read_text()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("add-client", "b")

    assert (code, out) == (1, "")
    assert "No space left on device" in err
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_wait_for_the_lock_has_an_end(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds it for too long is named as the cause."""
    monkeypatch.setattr(credentials_write, "_LOCK_TIMEOUT_S", 0.05)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = run("add-client", "a")
    assert code == 1
    assert "held by another command" in err
    assert run("add-client", "a")[0] == 0


def test_no_edit_is_lost_when_many_run_at_once(path: Path) -> None:
    """Each reads what the one before has written."""

    def add(number: int) -> None:
        assert main(["add-client", f"c-{number}"]) == 0

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read(path)["clients"]) == {f"c-{number}" for number in range(12)}


def test_command_is_a_part_of_the_servers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`server credentials ...` ends with the command's exit code."""
    with pytest.raises(SystemExit) as caught:
        server_main(["credentials", "add-client", "a", f"--credentials-file={path}"])
    assert caught.value.code == 0
    assert path.exists()
    with pytest.raises(SystemExit) as caught:
        server_main(["credentials", "check", "--credentials-file=/none"])
    assert caught.value.code == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        server_main(["credentials", "--help"])
    assert caught.value.code == 0
    assert "add-client" in capsys.readouterr().out


def test_command_runs_as_a_module(tmp_path: Path) -> None:
    """`python -m server credentials`, in a folder of its own and with the default file."""
    command = [sys.executable, "-m", "server", "credentials", "add-client", "a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(VARIABLE, None)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert load_credentials(str(tmp_path / "credentials.json")).has_client("a")
