"""The command `server credentials`: adds, rotates, revokes, lists and checks.

It prints a secret when it makes it and never again: the file holds a hash.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import date
from typing import NoReturn

from http_network_relay.rules.target import AccessRule, RuleError
from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import matches
from http_network_relay.wire.errors import ConfigError
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
_EXIT_USAGE = 2
_NEVER = "never"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_USAGE, f"error: {message}; --help lists all arguments\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `server credentials`."""
    parser = _Parser(
        prog="server credentials", description="Change and check who may connect (docs/access.md)."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], about: str
    ) -> Callable[..., argparse.Action]:
        one = commands.add_parser(name, help=about, description=about)
        one.set_defaults(run=run)
        one.add_argument(
            "--credentials-file",
            metavar="FILE",
            help=f"({CREDENTIALS_FILE.variable}, default: {CREDENTIALS_FILE.default})",
        )
        return one.add_argument

    date_help = "the last day on which it is valid, in UTC, such as 2027-01-31"
    url_help = "for the command line that is printed"
    add = command("add-client", _add_client, "add a client; the file is made if there is none")
    add("name", metavar="NAME", type=_new_name)
    add("--expires", metavar="DATE", type=_day, help=date_help)
    add("--server-url", metavar="URL", default="https://relay.example", help=url_help)
    add = command("add-user", _add_user, "add a proxy user; the file is made if there is none")
    add("name", metavar="NAME", type=_new_name)
    add(
        "--allow",
        metavar="RULE",
        type=_rule,
        action="append",
        required=True,
        help="CLIENT:HOST:PORT, such as 'lab-*:127.0.0.1:22', or '*:*:*' for everything; "
        "repeat it for more",
    )
    add("--expires", metavar="DATE", type=_day, help=date_help)
    add("--server-url", metavar="URL", default="https://relay.example", help=url_help)
    add = command("rotate", _rotate, "add a new secret; the old ones stay valid until revoked")
    add("name", metavar="NAME")
    _add_kind(add)
    add("--drop-old", action="store_true", help="end the old secrets at once")
    add("--expires", metavar="DATE", type=_day_or_never, help=f"{date_help}, or {_NEVER}")
    add("--server-url", metavar="URL", default="https://relay.example", help=url_help)
    add = command("revoke", _revoke, "remove clients and proxy users, or one secret of one")
    add("names", metavar="NAME", nargs="+")
    _add_kind(add)
    add("--secret", metavar="ID", type=_secret_id, help="only this one, as `list` shows it")
    command("list", _list, "show names, the ids of secrets, last days and rules; no secret")
    command("check", _check, "read the file as the server does")
    return parser


def _add_kind(add: Callable[..., argparse.Action]) -> None:
    about = "where a client and a proxy user have one name"
    for kind in ("client", "user"):
        add(f"--{kind}", dest="kind", action="store_const", const=kind, help=about)


def main(argv: list[str]) -> int:
    """Run one command; return the exit code: 0, 1 failed, 2 wrong arguments."""
    try:
        args = make_parser().parse_args(argv)
        args.file_flag = []
        if args.credentials_file is None:
            args.credentials_file = CREDENTIALS_FILE.text(os.environ)
        else:
            args.file_flag = [f"--credentials-file={args.credentials_file}"]
        args.run(args)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else _EXIT_USAGE
    except (ConfigError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return _EXIT_FAILED
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


def _add_client(args: argparse.Namespace) -> None:
    with edited(args.credentials_file, create=True) as data:
        secret = add_client(data, args.name, args.expires)
    _print_new("client", args.name, secret, data, args.server_url)


def _add_user(args: argparse.Namespace) -> None:
    with edited(args.credentials_file, create=True) as data:
        secret = add_user(data, args.name, args.allow, args.expires)
    _print_new("user", args.name, secret, data, args.server_url)


def _rotate(args: argparse.Namespace) -> None:
    with edited(args.credentials_file) as data:
        kind, secret, old = rotate(data, args.name, args.kind, args.expires, drop_old=args.drop_old)
    _print_new(kind, args.name, secret, data, args.server_url)
    for secret_id in old:
        command = ["server", "credentials", "revoke", *args.file_flag, f"--{kind}"]
        command += [f"--secret={secret_id}", args.name]
        print(f"\nThe secret {secret_id} stays valid until\n\n    {shlex.join(command)}")


def _revoke(args: argparse.Namespace) -> None:
    if args.secret is not None and len(args.names) > 1:
        raise SystemExit(_usage("--secret goes with one name"))
    with edited(args.credentials_file) as data:
        if args.secret is None:
            done = revoke(data, args.names, args.kind)
        else:
            done = revoke_secret(data, args.names[0], args.kind, args.secret)
    print("\n".join(done))


def _usage(message: str) -> int:
    print(f"error: {message}; --help lists all arguments", file=sys.stderr)
    return _EXIT_USAGE


def _list(args: argparse.Namespace) -> None:
    load_credentials(args.credentials_file, warn=False)
    data = parse_json(read_file(args.credentials_file)).plain()
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
    # Doubts go to stderr, as in the server's log.
    set_up_logging()
    credentials = load_credentials(args.credentials_file)
    print(f"OK: {args.credentials_file}: {credentials.summary}")


# What the other side types.


def _print_new(kind: Kind, name: str, secret: str, data: Data, server_url: str) -> None:
    """Print a new secret, and what to do with it; the secret is on no command line."""
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
    """Return client, host, port of a target that the user may open, as far as rules tell."""
    rule = AccessRule.parse(data["proxy_users"][user]["allow"][0])
    client = next(filter(rule.matches_client, data["clients"]), "CLIENT")
    host = rule.target.text.rpartition(":")[0].strip("[]")
    if "*" in host or "/" in host:
        host = "127.0.0.1" if rule.target.matches("127.0.0.1", rule.target.lowest_port) else "HOST"
    port = 22 if rule.target.lowest_port <= 22 <= rule.target.highest_port else 0
    return [client, host, str(port or rule.target.lowest_port)]
