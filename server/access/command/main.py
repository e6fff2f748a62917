"""The command `server credentials`: adds, rotates, revokes, lists and checks.

A secret is printed when it is made and never again: the file has a hash of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import date

from http_network_relay.rules.target import AccessRule, RuleError
from http_network_relay.settings import OneLineParser, add_settings
from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import ConfigError, RelayError
from server.access.command.edit import (
    EVERYTHING_RULE,
    Data,
    add_client,
    add_user,
    revoke,
    revoke_secret,
    rotate,
    secrets_of,
    user_names,
)
from server.access.command.write import edited
from server.access.credentials import HASH_PREFIX, Kind, digest_in_file, id_of, utc_today
from server.access.file import load_credentials, read_file
from server.access.json_lines import parse_json
from server.config import CREDENTIALS_FILE
from server.logs import set_up_logging

_EXIT_FAILED = 1
_NEVER = "never"


# Adds an argument to the parser of a command.
_Add = Callable[..., argparse.Action]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `server credentials`."""
    parser = OneLineParser(
        prog="server credentials", description="Change and check who may connect (docs/access.md)."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> _Add:
        one = commands.add_parser(name, help=about, description=about)
        one.set_defaults(run=run)
        add_settings(one, [CREDENTIALS_FILE])
        return one.add_argument

    add = command("add-client", _add_client, "add a client; the file is made if there is none")
    add("name", metavar="NAME", type=_new_name)
    _add_expires_and_url(add)
    add = command("add-user", _add_user, "add a proxy user; the file is made if there is none")
    add("name", metavar="NAME", type=_new_name)
    _add_allow(add)
    _add_expires_and_url(add)
    add = command("rotate", _rotate, "add a new secret; the old ones stay valid until revoked")
    add("name", metavar="NAME")
    _add_kind(add)
    add("--drop-old", action="store_true", help="end the old secrets at once")
    _add_expires_and_url(add, or_never=True)
    add = command("revoke", _revoke, "remove clients and proxy users, or one secret of one")
    add("names", metavar="NAME", nargs="+")
    _add_kind(add)
    add("--secret", metavar="ID", type=_secret_id, help="only this one, as `list` shows it")
    command("list", _list, "show names, the ids of secrets, last days and rules; no secret")
    command("check", _check, "read the file as the server does")
    return parser


def _add_expires_and_url(add: _Add, or_never: bool = False) -> None:
    about = "the last day on which it is valid, in UTC, such as 2027-01-31"
    if or_never:
        add("--expires", metavar="DATE", type=_day_or_never, help=f"{about}, or {_NEVER}")
    else:
        add("--expires", metavar="DATE", type=_day, help=about)
    about = "for the command line that is printed"
    add("--server-url", metavar="URL", default="https://relay.example", help=about)


def _add_allow(add: _Add) -> None:
    about = "CLIENT:HOST:PORT, such as 'lab-*:127.0.0.1:22', or '*:*:*' for everything"
    add(
        "--allow",
        metavar="RULE",
        type=_rule,
        action="append",
        required=True,
        help=f"{about}; repeat it for more",
    )


def _add_kind(add: _Add) -> None:
    about = "where a client and a proxy user have one name"
    for kind in ("client", "user"):
        add(f"--{kind}", dest="kind", action="store_const", const=kind, help=about)


def main(argv: list[str]) -> int:
    """Run one command; return the exit code: 0, 1 failed, 2 wrong arguments."""
    try:
        args = make_parser().parse_args(argv)
        args.run(args)
    except (ConfigError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return _EXIT_FAILED
    except RelayError as exc:
        # The parser's.
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


# Arguments.


def _new_name(text: str) -> str:
    if not matches(NAME_PATTERN, text) or "*" in text or text.startswith("-"):
        raise argparse.ArgumentTypeError(
            f"the name {text!r} must be 1 to 128 printable ASCII characters without spaces, "
            "colons and stars"
        )
    return text


def _rule(text: str) -> str:
    try:
        return AccessRule.parse(text).text
    except RuleError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else None
    except ValueError:
        day = None
    if day is None or day < utc_today():
        raise argparse.ArgumentTypeError("write a day that is not over as 2027-01-31")
    return day


def _day_or_never(text: str) -> date | str:
    return text if text == _NEVER else _day(text)


def _secret_id(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{8,64}", text):
        raise argparse.ArgumentTypeError("an id is 8 hex digits in lower case; `list` shows them")
    return text


# Commands.


def _path(args: argparse.Namespace) -> str:
    flag: str | None = args.credentials_file
    return CREDENTIALS_FILE.text(os.environ) if flag is None else flag


def _add_client(args: argparse.Namespace) -> None:
    with edited(_path(args), create=True) as data:
        secret = add_client(data, args.name, args.expires)
    _print_new("client", args.name, secret, data, args.server_url)


def _add_user(args: argparse.Namespace) -> None:
    with edited(_path(args), create=True) as data:
        secret = add_user(data, args.name, args.allow, args.expires)
    _print_new("user", args.name, secret, data, args.server_url)


def _rotate(args: argparse.Namespace) -> None:
    with edited(_path(args)) as data:
        kind, secret, old = rotate(data, args.name, args.kind, args.expires, drop_old=args.drop_old)
    _print_new(kind, args.name, secret, data, args.server_url)
    for secret_id in old:
        command = ["server", "credentials", "revoke", f"--{kind}"]
        if args.credentials_file is not None:
            command.insert(3, f"--credentials-file={args.credentials_file}")
        command += [f"--secret={secret_id}", args.name]
        print(f"\nThe secret {secret_id} stays valid until\n\n    {shlex.join(command)}")


def _revoke(args: argparse.Namespace) -> None:
    if args.secret is not None and len(args.names) > 1:
        make_parser().error("--secret goes with one name")
    with edited(_path(args)) as data:
        if args.secret is None:
            done = revoke(data, args.names, args.kind)
        else:
            done = revoke_secret(data, args.names[0], args.kind, args.secret)
    print("\n".join(done))


def _list(args: argparse.Namespace) -> None:
    load_credentials(_path(args), warn=False)
    data = parse_json(read_file(_path(args))).plain()
    for name in data["clients"]:
        print(_line(data, "client", name))
    for name in user_names(data):
        print(_line(data, "user", name))


def _line(data: Data, kind: Kind, name: str) -> str:
    section = data["clients" if kind == "client" else "proxy_users"]
    entry = section[name] if isinstance(section, dict) else {"allow": [EVERYTHING_RULE]}
    ids = [
        id_of(digest_in_file(each)) + ("" if each.startswith(HASH_PREFIX) else "(plain)")
        for each in secrets_of(data, kind, name)
    ]
    line = f"{kind} {name} secrets={','.join(ids)}"
    if isinstance(entry, dict):
        line += "".join(f" allow={rule}" for rule in entry.get("allow", []))
        expires = entry.get("expires")
        if expires is not None:
            is_over = date.fromisoformat(expires) < utc_today()
            line += f" expires={expires}" + ("(over)" if is_over else "")
    return line


def _check(args: argparse.Namespace) -> None:
    # Warnings go to stderr, as in the server's log.
    set_up_logging()
    credentials = load_credentials(_path(args))
    print(f"OK: {_path(args)}: {credentials.summary}")


# What the operator passes on to the device's owner or the proxy user.


def _print_new(kind: Kind, name: str, secret: str, data: Data, server_url: str) -> None:
    """Print a new secret, and the commands that use it. No command line has the secret."""
    where = "device" if kind == "client" else "laptop"
    file = "client.secret" if kind == "client" else "~/.ssh/relay.token"
    if kind == "client":
        words = ["client", f"--server_url={server_url}", f"--client-name={name}"]
        command = f"{shlex.join(words)} --client-secret-file {file}"
    else:
        words = ["ssh_proxy_command.py", *_example(name, data), f"--server-url={server_url}"]
        command = f"{shlex.join(words)} --secret-key-file {file}"
    print(secret)
    print(f"\nThis secret is shown only now. On the {where}, put it in a file: type\n")
    print(f"    (umask 077; read -r SECRET; printf '%s\\n' \"$SECRET\" > {file})")
    print(f"\npaste it, and press Enter. Then\n\n    {command}")


def _example(user: str, data: Data) -> list[str]:
    """Return client, host and port of a target that the user may open, if the rules name one."""
    rule = AccessRule.parse(data["proxy_users"][user]["allow"][0])
    client = next(filter(rule.matches_client, data["clients"]), "CLIENT")
    host = rule.target.text.rpartition(":")[0].strip("[]")
    if "*" in host or "/" in host:
        host = "127.0.0.1" if rule.target.matches("127.0.0.1", rule.target.lowest_port) else "HOST"
    port = 22 if rule.target.lowest_port <= 22 <= rule.target.highest_port else 0
    return [client, host, str(port or rule.target.lowest_port)]
