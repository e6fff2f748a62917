"""Who may open which target, and for how long: real programs, and users by hand.

The expected answers stand in tables that were written by hand, rule by rule.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.flows import run
from tests.support.processes import (
    ROOT,
    TOKEN,
    Pipes,
    Proc,
    Server,
    child_environment,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import RawUser
from tests.support.secrecy import check_no_secret, note_credentials, note_secrets, secret_of
from tests.support.targets import EchoTarget
from tests.support.waiting import eventually

SECRETS = {"free": secret_of("cs-free"), "tied": secret_of("cs-tied")}
TOKENS = {"short": TOKEN, "ops": secret_of("pu-ops"), "net": secret_of("pu-net")}
# The limit of docs/access.md.
GONE_S = 5.0
RELOADED = "credentials reloaded"
NOT_RELOADED = "ERROR.* credentials not reloaded"
ids = itertools.count(1)


# Targets that a user may open.

# P has an echo, and the client `tied` was started with --allow 127.0.0.1:P; Q has an echo too.
# `short` may open everything. The rules of the others:
OPS_RULES = ["free:127.0.0.1:P", "tied:localhost:P", "tied:127.0.0.2:P"]
NET_RULES = ["*:127.0.0.0/8:P", "tied:local*:Q"]

MATRIX = {
    # client, host, port -> the answer to an `open` of short, ops, net
    ("free", "127.0.0.1", "P"): ("opened", "opened", "opened"),
    ("free", "::ffff:127.0.0.1", "P"): ("opened", "opened", "opened"),
    ("free", "[::ffff:7f00:1]", "P"): ("opened", "opened", "opened"),
    ("free", "localhost", "P"): ("opened", "denied", "denied"),
    ("free", "LocalHost", "P"): ("opened", "denied", "denied"),
    ("free", "127.0.0.2", "P"): ("target_refused", "denied", "target_refused"),
    ("free", "127.0.0.1", "Q"): ("opened", "denied", "denied"),
    ("free", "localhost", "Q"): ("opened", "denied", "denied"),
    ("free", "127.1", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "0x7f000001", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "0X7F.1", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "2130706433", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "0177.0.0.1", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "127.0.0.1.", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "[127.0.0.1]", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("free", "::1%lo", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("tied", "127.0.0.1", "P"): ("opened", "denied", "opened"),
    ("tied", "::ffff:127.0.0.1", "P"): ("opened", "denied", "opened"),
    ("tied", "localhost", "P"): ("opened", "opened", "denied"),
    ("tied", "LOCALHOST", "P"): ("opened", "opened", "denied"),
    ("tied", "127.0.0.2", "P"): ("denied_by_client", "denied_by_client", "denied_by_client"),
    ("tied", "127.0.0.1", "Q"): ("denied_by_client", "denied", "denied"),
    ("tied", "localhost", "Q"): ("denied_by_client", "denied", "denied_by_client"),
    ("tied", "127.1", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    ("nobody", "127.0.0.1", "P"): ("client_unknown", "denied", "client_unknown"),
    ("nobody", "127.0.0.1", "Q"): ("client_unknown", "denied", "denied"),
    ("nobody", "localhost", "P"): ("client_unknown", "denied", "denied"),
    ("nobody", "127.1", "P"): ("target_invalid", "target_invalid", "target_invalid"),
    # Names of clients are compared as they are.
    ("FREE", "127.0.0.1", "P"): ("client_unknown", "denied", "client_unknown"),
    ("fre*", "127.0.0.1", "P"): ("client_unknown", "denied", "client_unknown"),
    ("*", "127.0.0.1", "P"): ("client_unknown", "denied", "client_unknown"),
}
# The answer to an `open` -> the one to a `resume` of a tunnel that is not there.
OF_RESUME = {
    "opened": "unknown_tunnel",
    "target_refused": "unknown_tunnel",
    "denied_by_client": "unknown_tunnel",
    "denied": "denied",
    "target_invalid": "target_invalid",
    "client_unknown": "client_unknown",
}


@dataclass
class World:
    """Two servers with the same two clients each: one has rules, one the short form."""

    named: Server
    short: Server
    p: EchoTarget
    q: EchoTarget
    # By name, those of the first server.
    clients: dict[str, Proc]

    def port(self, name: str) -> int:
        return {"P": self.p, "Q": self.q}[name].port

    @property
    def dialled(self) -> int:
        return len(self.p.conversations) + len(self.q.conversations)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything that the matrix needs."""
    with ExitStack() as stack:
        p, q = stack.enter_context(EchoTarget()), stack.enter_context(EchoTarget())
        everything = {"secrets": [TOKENS["short"]], "allow": ["*:*:*"]}
        users = {"short": everything}
        for name, rules in (("ops", OPS_RULES), ("net", NET_RULES)):
            allow = [rule.replace("P", str(p.port)).replace("Q", str(q.port)) for rule in rules]
            users[name] = {"secrets": [TOKENS[name]], "allow": allow}
        servers: list[Server] = []
        clients: dict[str, Proc] = {}
        for proxy_users in (users, [TOKEN]):
            folder = tmp_path_factory.mktemp("server")
            credentials = {"clients": SECRETS, "proxy_users": proxy_users}
            server = start_server(folder, credentials=credentials, threads=48)
            servers.append(stack.enter_context(server))
            for name, secret in SECRETS.items():
                args = ["--allow", f"127.0.0.1:{p.port}"] if name == "tied" else []
                client = start_client(server.url, name=name, secret=secret, args=args)
                clients.setdefault(name, stack.enter_context(client))
        with_rules, with_token = servers
        yield World(with_rules, with_token, p, q, clients)


def ask(server: Server, token: str, kind: str, **opening: Any) -> dict[str, Any]:
    """Return the answer to an `open` or a `resume`; end a tunnel that was opened."""
    with RawUser(server.url, token) as user:
        opening["tunnel_id"] = f"{next(ids):032x}"
        if kind == "open":
            user.send_open(**opening)
        else:
            user.send_resume(**opening, grace_s=60)
        answer = user.recv_control()
        if answer["type"] == "opened":
            user.send_control({"type": "reset", "code": "user_gone", "message": ""})
            return {**answer, "code": "opened"}
        assert answer["type"] == "refused"
        assert user.recv_close()[0] == 1000
        return answer


@pytest.mark.parametrize("target", MATRIX, ids=" ".join)
def test_matrix_of_users_clients_and_targets_when_opened(
    world: World, target: tuple[str, str, str]
) -> None:
    """Each user gets the answer of the table; what was refused, nobody has dialled."""
    client, host, port = target
    opening = {"client": client, "host": host, "port": world.port(port)}
    before = world.dialled
    opened = 0
    for user, expected in zip(TOKENS, MATRIX[target], strict=True):
        servers = [world.named, world.short] if user == "short" else [world.named]
        for server in servers:
            assert ask(server, TOKENS[user], "open", **opening)["code"] == expected, user
            opened += expected == "opened"
    eventually(lambda: world.dialled - before >= opened)
    assert world.dialled - before == opened


@pytest.mark.parametrize("target", MATRIX, ids=" ".join)
def test_matrix_of_users_clients_and_targets_when_resumed(
    world: World, target: tuple[str, str, str]
) -> None:
    """A `resume` is judged like an `open`: what is denied tells nothing about tunnels."""
    client, host, port = target
    opening = {"client": client, "host": host, "port": world.port(port)}
    before = world.dialled
    for user, answer in zip(TOKENS, MATRIX[target], strict=True):
        servers = [world.named, world.short] if user == "short" else [world.named]
        for server in servers:
            code = ask(server, TOKENS[user], "resume", **opening)["code"]
            assert code == OF_RESUME[answer], user
    assert world.dialled == before


@pytest.mark.parametrize("kind", ["open", "resume"])
def test_denied_tells_nothing_of_clients_when_they_do_not_exist(world: World, kind: str) -> None:
    """The same words for a client that is there as for one that is not."""
    answers = []
    for client in ("free", "nobody"):
        answer = ask(
            world.named, TOKENS["ops"], kind, client=client, host="10.0.0.1", port=world.p.port
        )
        answers.append(json.dumps(answer).replace(client, "CLIENT"))
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["code"] == "denied"


REFUSALS = {
    # what the proxy command is to open, as whom -> its exit code, and what its line has
    ("free", "localhost", "ops"): (7, "no rule lets ops open localhost:"),
    ("nobody", "127.0.0.1", "ops"): (7, "no rule lets ops open 127.0.0.1:"),
    ("tied", "127.0.0.2", "ops"): (7, "its client was started with --allow"),
    ("nobody", "127.0.0.1", "short"): (4, "no client is named nobody"),
    ("free", "127.1", "short"): (2, "could be taken for an address"),
    ("free", "0x7f000001", "ops"): (2, "could be taken for an address"),
    ("nobody", "2130706433", "net"): (2, "could be taken for an address"),
}


@pytest.mark.parametrize("asked", REFUSALS, ids=" ".join)
def test_proxy_command_ends_with_one_line_when_refused(
    world: World, asked: tuple[str, str, str]
) -> None:
    """The documented exit code, one line that says why, and nothing on stdout."""
    client, host, user = asked
    exit_code, words = REFUSALS[asked]
    with start_proxy(
        world.named.url, name=client, host=host, port=world.p.port, token=TOKENS[user]
    ) as proxy:
        finished = proxy.finish()
    assert (finished.status, finished.stdout) == (exit_code, b"")
    assert len(finished.lines) == 1
    assert words in finished.lines[0]


def test_client_says_what_it_dials_when_it_starts(world: World) -> None:
    """Its rules; or, without any, a warning that it dials whatever the server asks for."""
    free, tied = world.clients["free"], world.clients["tied"]
    tied.wait_for_line(f" INFO dials allow=127.0.0.1:{world.p.port}")
    assert "whatever the server asks for" not in tied.text
    free.wait_for_line(" WARNING dials whatever the server asks for: --allow limits it")
    assert "dials allow=" not in free.text


# Access that is taken away.

LIVE = {"device": secret_of("cs-device"), "other": secret_of("cs-other")}


def live_credentials(port: int) -> dict[str, Any]:
    """Two clients; `ops` and `neighbour` at `device`, `bystander` at `other`."""
    rule = f"127.0.0.1:{port}"
    return {
        "clients": {name: {"secrets": [secret]} for name, secret in LIVE.items()},
        "proxy_users": {
            "ops": {
                "secrets": [secret_of("pu-ops")],
                "allow": [f"device:{rule}", "other:10.0.0.1:1"],
            },
            "neighbour": {"secrets": [secret_of("pu-neighbour")], "allow": [f"device:{rule}"]},
            "bystander": {"secrets": [secret_of("pu-bystander")], "allow": [f"other:{rule}"]},
        },
    }


@dataclass
class Live:
    """A server, its two clients, an echo, and the first credentials."""

    server: Server
    device: Proc
    target: EchoTarget
    credentials: dict[str, Any]

    def write(self, credentials: object) -> float:
        """Write new content into the file; return the time by which it must be in force."""
        note_credentials(credentials)
        text = credentials if isinstance(credentials, str) else json.dumps(credentials)
        self.server.credentials_file.write_text(text)
        return time.monotonic() + GONE_S

    def reload(self, credentials: object) -> None:
        """The same, and wait until it is in force."""
        mark = self.server.line_count
        self.write(credentials)
        self.server.wait_for_line(RELOADED, GONE_S, after=mark)

    def proxy(self, user: str, client: str = "device") -> Pipes:
        """A real proxy command with a tunnel that echoes."""
        url, token = self.server.url, secret_of(f"pu-{user}")
        proxy = start_proxy(url, name=client, port=self.target.port, token=token)
        try:
            echo(proxy)
        except BaseException:
            proxy.close()
            raise
        return proxy


@contextmanager
def living(folder: Path) -> Iterator[Live]:
    with EchoTarget() as target:
        credentials = live_credentials(target.port)
        with (
            start_server(folder, credentials=credentials) as server,
            start_client(server.url, name="device", secret=LIVE["device"]) as device,
            start_client(server.url, name="other", secret=LIVE["other"]),
        ):
            yield Live(server, device, target, credentials)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """One for each test: they take things away."""
    with living(tmp_path) as found:
        yield found


def echo(proxy: Pipes, data: bytes = b"sixteen bytes ..") -> None:
    proxy.send(data)
    assert proxy.receive_exactly(len(data)) == data


def echo_raw(user: RawUser, data: bytes) -> None:
    user.send_binary(data)
    received = b""
    while len(received) < len(data):
        received += user.recv_binary()
    assert received == data


def reset_code(user: RawUser, deadline: float) -> str:
    """The code of the `reset` that must come until then."""
    while True:
        message = user.recv(max(0.0, deadline - time.monotonic()))
        assert message[0] == "text", message
        if message[1]["type"] == "reset":
            code: str = message[1]["code"]
            return code


@contextmanager
def carrying(proxy: Pipes) -> Iterator[None]:
    """Let a thread send through that tunnel meanwhile; each byte must come back."""
    stop = threading.Event()
    rounds = 0
    problems: list[BaseException] = []

    def pump() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                echo(proxy, b"%16d" % rounds)
                rounds += 1
        except BaseException as exc:
            problems.append(exc)

    def goes_on() -> None:
        mark = rounds
        eventually(lambda: problems or rounds > mark + 2)
        assert not problems

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        goes_on()
        yield
        goes_on()
    finally:
        stop.set()
        thread.join()
    assert not problems


def without(credentials: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy without what is at `path`."""
    copy: dict[str, Any] = json.loads(json.dumps(credentials))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def changed(credentials: dict[str, Any], kind: str, name: str, **values: Any) -> dict[str, Any]:
    """A copy in which one entry has other values."""
    copy: dict[str, Any] = json.loads(json.dumps(credentials))
    copy[kind][name].update(values)
    return copy


@dataclass(frozen=True)
class Ending:
    """A change of the file, and what it does to the tunnels of `ops` at `device`."""

    change: Any
    code: str
    # Whether the client `device` is what loses its access, and so its other tunnels too.
    ends_client: bool = False


def without_device(credentials: dict[str, Any]) -> dict[str, Any]:
    """The client goes, and with it the rules for it alone, as the command does it."""
    left = without(credentials, "clients", "device")
    left["proxy_users"]["ops"]["allow"].pop(0)
    del left["proxy_users"]["neighbour"]
    return left


ENDINGS = {
    "user revoked": Ending(lambda old: without(old, "proxy_users", "ops"), "revoked"),
    "user's secret rotated away": Ending(
        lambda old: changed(old, "proxy_users", "ops", secrets=[secret_of("pu-new")]), "revoked"
    ),
    "user's token given to another": Ending(
        lambda old: changed(
            changed(old, "proxy_users", "ops", secrets=[secret_of("pu-new")]),
            *("proxy_users", "bystander"),
            secrets=[secret_of("pu-bystander"), secret_of("pu-ops")],
        ),
        "revoked",
    ),
    "user expired": Ending(
        lambda old: changed(old, "proxy_users", "ops", expires="2020-01-01"), "revoked"
    ),
    "rule removed": Ending(
        lambda old: changed(old, "proxy_users", "ops", allow=["other:10.0.0.1:1"]), "denied"
    ),
    "rule made narrower": Ending(
        lambda old: changed(old, "proxy_users", "ops", allow=["device:127.0.0.1:1"]), "denied"
    ),
    "client revoked": Ending(without_device, "revoked", ends_client=True),
    "client's secret rotated away": Ending(
        lambda old: changed(old, "clients", "device", secrets=[secret_of("cs-new")]),
        "revoked",
        ends_client=True,
    ),
    "client expired": Ending(
        lambda old: changed(old, "clients", "device", expires="2020-01-01"),
        "revoked",
        ends_client=True,
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_tunnels_end_within_5_s_when_access_is_taken_away(live: Live, name: str) -> None:
    """Both ends hear it, by the code; whoever has nothing to do with it goes on."""
    ending = ENDINGS[name]
    with (
        RawUser(live.server.url, secret_of("pu-ops")) as raw,
        live.proxy("bystander", "other") as bystander,
        live.proxy("neighbour") as neighbour,
    ):
        raw.send_open(client="device", port=live.target.port, grace_s=60)
        raw.recv_control("opened")
        echo_raw(raw, b"raw")
        with live.proxy("ops") as proxy, carrying(bystander):
            mark = live.device.line_count
            deadline = live.write(ending.change(live.credentials))
            assert reset_code(raw, deadline) == ending.code
            assert proxy.wait(deadline - time.monotonic()) == 1
            # Not a FIN, after which a target would take what it has for all.
            for conversation in (live.target.conversation(2), live.target.conversation(3)):
                assert conversation.wait_ended(deadline - time.monotonic()) == "reset"
            if ending.ends_client:
                assert neighbour.wait(deadline - time.monotonic()) == 1
                live.device.wait_for_line("1008|revoked", after=mark)
                live.device.wait_for_line("401|unauthorized", after=mark)
                assert live.device.is_running
            else:
                echo(neighbour)
        echo(bystander)


def test_old_secrets_are_refused_when_they_were_rotated_away(live: Live) -> None:
    """The new ones of the client and the user work at once, without a restart of the server."""
    new = changed(live.credentials, "clients", "device", secrets=[secret_of("cs-new")])
    mark = live.device.line_count
    live.reload(changed(new, "proxy_users", "ops", secrets=[secret_of("pu-new")]))
    live.device.wait_for_line("401|unauthorized", after=mark)
    url, port = live.server.url, live.target.port
    with (
        start_client(url, name="device", secret=secret_of("cs-new")),
        start_proxy(url, port=port, token=secret_of("pu-new")) as proxy,
        start_proxy(url, port=port, token=secret_of("pu-ops")) as old,
    ):
        echo(proxy)
        assert old.finish().status == 3


def test_tunnels_go_on_when_what_they_use_stays_allowed(live: Live) -> None:
    """A second secret, another rule that allows it, more users: nobody notices."""
    with live.proxy("ops") as proxy, carrying(proxy):
        rules = ["dev*:127.0.0.0/8:*"]
        new = changed(
            live.credentials,
            "proxy_users",
            "ops",
            allow=rules,
            secrets=[secret_of("pu-second"), secret_of("pu-ops")],
        )
        new["proxy_users"]["late"] = {"secrets": [secret_of("pu-late")], "allow": ["*:*:*"]}
        del new["proxy_users"]["neighbour"]
        live.reload(new)
        with live.proxy("late"):
            pass


# A tunnel that lives, and its `resume`.

OWN: dict[str, Any] = {
    "client": "device",
    "tunnel_id": "a" * 32,
    "resume_token": "b" * 64,
    "grace_s": 60,
}
COUNTS = {"received": 6, "delivered": 6, "limit": 262_150}


def open_own(live: Live) -> RawUser:
    user = RawUser(live.server.url, secret_of("pu-ops"))
    try:
        user.send_open(**OWN, port=live.target.port)
        assert user.recv_control("opened")["grace_s"] > 0
        echo_raw(user, b"before")
    except BaseException:
        user.close()
        raise
    return user


def resume_own(live: Live, token: str = secret_of("pu-ops"), attempt: int = 1) -> dict[str, Any]:
    """The answer to a `resume` of the tunnel of `open_own`."""
    with RawUser(live.server.url, token, resumes="a" * 32) as user:
        user.send_resume(**{**OWN, **COUNTS, "port": live.target.port, "attempt": attempt})
        return user.recv_control()


def test_resume_of_own_tunnel_is_denied_when_the_rule_was_taken_away(live: Live) -> None:
    """The tunnel is reset, its `resume` refused, and it is not there when the rule is back."""
    with open_own(live) as user:
        less = changed(live.credentials, "proxy_users", "ops", allow=["other:10.0.0.1:1"])
        deadline = live.write(less)
        assert reset_code(user, deadline) == "denied"
        assert live.target.conversation().wait_ended() == "reset"
        assert user.recv_close()[0] == 1000
        answer = resume_own(live)
        assert (answer["type"], answer["code"]) == ("refused", "denied")
        live.reload(live.credentials)
        answer = resume_own(live, attempt=2)
        assert (answer["type"], answer["code"]) == ("refused", "unknown_tunnel")


def test_resume_is_denied_when_the_rule_goes_while_the_user_is_away(live: Live) -> None:
    """Nobody is there to be reset: the `resume` is where it ends."""
    open_own(live).drop()
    live.server.wait_for_line("leg down .*user=ops")
    live.reload(changed(live.credentials, "proxy_users", "ops", allow=["other:10.0.0.1:1"]))
    answer = resume_own(live)
    assert (answer["type"], answer["code"]) == ("refused", "denied")


def test_resume_is_refused_when_the_token_belongs_to_another_user_now(live: Live) -> None:
    """A tunnel is its user's, by name; the secret alone does not bring it along."""
    with open_own(live) as user:
        new = changed(live.credentials, "proxy_users", "ops", secrets=[secret_of("pu-new")])
        rules = [f"*:127.0.0.1:{live.target.port}"]
        heir = {"secrets": [secret_of("pu-ops"), secret_of("pu-bystander")], "allow": rules}
        deadline = live.write(changed(new, "proxy_users", "bystander", **heir))
        assert reset_code(user, deadline) == "revoked"
        assert resume_own(live)["code"] == "unknown_tunnel"


def test_resume_goes_on_when_the_secret_was_rotated_without_a_gap(live: Live) -> None:
    """The old leg is gone with the old secret's end, the user comes with the new one."""
    open_own(live).drop()
    live.server.wait_for_line("leg down .*user=ops")
    live.reload(changed(live.credentials, "proxy_users", "ops", secrets=[secret_of("pu-new")]))
    assert resume_own(live, secret_of("pu-new"))["type"] == "resumed"


# How the file changes.


def test_old_state_stays_when_the_new_file_is_broken(live: Live) -> None:
    """One ERROR line for each broken version; tunnels go on and logins are as before."""
    broken = {"half": json.dumps(live.credentials)[:-9], "rule": ""}
    wrong = changed(live.credentials, "proxy_users", "ops", allow=["nobody:127.0.0.1:22"])
    broken["rule"] = json.dumps(wrong)
    with live.proxy("ops") as proxy, carrying(proxy):
        for text in broken.values():
            mark = live.server.line_count
            live.write(text)
            live.server.wait_for_line(NOT_RELOADED, GONE_S, after=mark)
            with live.proxy("ops"), RawUser(live.server.url, secret_of("pu-neighbour")) as raw:
                raw.send_open(client="other", port=live.target.port)
                assert raw.recv_control("refused")["code"] == "denied"
        live.reload(without(live.credentials, "proxy_users", "neighbour"))
    errors = [line for line in live.server.lines if "credentials not reloaded" in line]
    assert len(errors) == len(broken)


def test_file_is_taken_when_it_is_replaced(live: Live) -> None:
    """os.replace() makes a new inode under the same name."""
    path = live.server.credentials_file
    with live.proxy("ops") as proxy, live.proxy("neighbour") as neighbour, carrying(neighbour):
        new = path.with_name("new.json")
        new.touch(mode=0o600)
        new.write_text(json.dumps(without(live.credentials, "proxy_users", "ops")))
        os.replace(new, path)
        assert proxy.wait(GONE_S) == 1


def test_file_is_taken_when_a_link_on_the_way_is_swapped(tmp_path: Path) -> None:
    """As a mounted volume does it: the name leads through a link to a folder."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v2").mkdir()
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "credentials.json").symlink_to("data/credentials.json")
    with (
        living(tmp_path) as live,
        live.proxy("ops") as proxy,
        live.proxy("neighbour") as neighbour,
        carrying(neighbour),
    ):
        assert (tmp_path / "v1" / "credentials.json").is_file()
        new = tmp_path / "v2" / "credentials.json"
        new.touch(mode=0o600)
        new.write_text(json.dumps(without(live.credentials, "proxy_users", "ops")))
        (tmp_path / "data2").symlink_to("v2")
        os.replace(tmp_path / "data2", tmp_path / "data")
        assert proxy.wait(GONE_S) == 1


# The command.


def made_by_command(file: Path, *args: str) -> str:
    """Run `server credentials`; the new secret that it prints, the one time that it may."""
    argv = [sys.executable, "-m", "server", "credentials", *args, "--credentials-file", str(file)]
    done = run(argv, cwd=ROOT, env=child_environment())
    assert done.returncode == 0, done.stderr
    secret, _, rest = done.stdout.decode().partition("\n")
    note_secrets(secret)
    check_no_secret("the command", rest, done.stderr)
    return secret


def test_printed_secrets_work_when_the_command_made_the_file(tmp_path: Path) -> None:
    """From an empty folder to a tunnel; then a rotation under it, with the server running."""
    file = tmp_path / "empty" / "credentials.json"
    file.parent.mkdir()
    with EchoTarget() as target:
        client_secret = made_by_command(file, "add-client", "lab-1")
        rule = f"lab-*:127.0.0.1:{target.port}"
        token = made_by_command(file, "add-user", "ops-laptop", "--allow", rule)
        assert file.stat().st_mode & 0o777 == 0o600
        assert client_secret not in file.read_text()
        assert token not in file.read_text()
        env = {"HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(file)}
        with (
            start_server(tmp_path, env=env) as server,
            start_client(server.url, name="lab-1", secret=client_secret),
            start_proxy(server.url, name="lab-1", port=target.port, token=token) as proxy,
        ):
            echo(proxy)
            with start_proxy(server.url, name="lab-1", port=1, token=token) as denied:
                assert denied.finish().status == 7
            new = made_by_command(file, "rotate", "ops-laptop", "--drop-old")
            assert proxy.wait(GONE_S) == 1
            with start_proxy(server.url, name="lab-1", port=target.port, token=new) as again:
                echo(again)
