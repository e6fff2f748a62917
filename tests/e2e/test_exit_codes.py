"""How the proxy command ends: the exit code, one line on stderr, and a clean stdout."""

import re
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import debian
from tests.support.certs import Certs
from tests.support.flows import AT_ONCE_S, Mark, count, lines_since, relay_argv
from tests.support.ports import free_port
from tests.support.processes import (
    CLIENT_NAME,
    CLIENT_SECRET,
    CREDENTIALS,
    TOKEN,
    Finished,
    Pipes,
    Relay,
    proxy_env,
    running_relay,
    start_client,
    start_proxy,
    start_server,
)
from tests.support.raw import RawClient, RawUser
from tests.support.targets import (
    EchoTarget,
    RecordingTarget,
    SourceTarget,
    black_hole_port,
)
from tests.support.waiting import eventually

LOST, USAGE, SECRET, CLIENT, TARGET, SERVER = 1, 2, 3, 4, 5, 6
SIGPIPE_STATUS = 128 + signal.SIGPIPE
WRONG_TOKEN = "pu-wrong-wrong-wrong-wrong-wrong"
# Time limit of the client's dial of a target.
DIAL_S = 10.0
# Time limit of the proxy command for an answer of the client.
OPEN_S = 15.0
PROXY_PASSWORD = "pw-Zk3vB9uXn5"
OFFLINE = "switched-off"
CLIENTS = {CLIENT_NAME: CLIENT_SECRET, OFFLINE: "cs-of-a-device-that-is-switched-off"}


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that also knows a client which is not there."""
    credentials = {**CREDENTIALS, "clients": CLIENTS}
    with running_relay(tmp_path_factory.mktemp("relay"), credentials=credentials) as running:
        yield running
        # However all the proxy commands ended, no tunnel is left.
        Mark.now(running)


@dataclass(frozen=True)
class Slow:
    """Proxy commands whose end takes many seconds."""

    target_is_silent: Pipes
    client_is_silent: Pipes


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    """Two slow proxy commands on a relay of their own, which nothing else disturbs."""
    credentials = {**CREDENTIALS, "clients": CLIENTS}
    with (
        running_relay(tmp_path_factory.mktemp("slow"), credentials=credentials) as relay,
        RawClient(relay.url, OFFLINE, CLIENTS[OFFLINE]),
        black_hole_port() as port,
        relay.proxy(port) as target_is_silent,
        relay.proxy(port, name=OFFLINE) as client_is_silent,
    ):
        yield Slow(target_is_silent, client_is_silent)


@pytest.fixture(scope="module", autouse=True)
def _slow_begins_early(request: pytest.FixtureRequest) -> None:
    """Begin what takes 15 s before the first test of this file, if a test of this run wants it."""
    if any("slow" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("slow")


def check_failed(done: Finished, status: int, *words: str) -> None:
    """The exit code, exactly one line on stderr with all words, and nothing on stdout."""
    assert (done.status, done.stdout) == (status, b""), done.lines
    assert len(done.lines) == 1, done.lines
    line = done.lines[0]
    assert [word for word in words if word not in line] == [], line
    # What failed; what to try. A wrong setting names itself.
    assert status == USAGE or "; " in line, line
    for secret in (TOKEN, WRONG_TOKEN, PROXY_PASSWORD):
        assert secret not in line


@dataclass(frozen=True)
class Refused:
    """A tunnel that does not come about: what is asked, and how it ends."""

    status: int
    words: tuple[str, ...]
    # For start_proxy; "url" and "port" stand for the relay's and for a free port.
    options: dict[str, Any] = field(default_factory=dict)


REFUSED = {
    "no secret": Refused(
        USAGE, ("--secret-key-file", "HTTP_NETWORK_RELAY_SECRET_KEY"), {"token": None}
    ),
    "secret with a space": Refused(
        USAGE, ("--secret-key-file",), {"token": "two words, as long as a token"}
    ),
    "secret file missing": Refused(
        USAGE,
        ("--secret-key-file", "/nowhere/token", "No such file"),
        {"token": None, "args": ["--secret-key-file", "/nowhere/token"]},
    ),
    "port out of range": Refused(USAGE, ("target_port", "65536"), {"port": 65536}),
    "udp": Refused(USAGE, ("udp", "not supported"), {"protocol": "udp"}),
    "unknown protocol": Refused(USAGE, ("sctp",), {"protocol": "sctp"}),
    "unknown flag": Refused(USAGE, ("--no-such-flag",), {"args": ["--no-such-flag"]}),
    "bad client name": Refused(USAGE, ("target_host_identifier",), {"name": "a:b"}),
    "bad ping interval": Refused(USAGE, ("--ping-interval",), {"args": ["--ping-interval", "0"]}),
    "not a URL": Refused(USAGE, ("--server-url", "https://"), {"args": ["--server_url", "relay"]}),
    "CA file missing": Refused(
        USAGE,
        ("--ca-file", "/nowhere/ca"),
        {"args": ["--server_url", "wss://127.0.0.1:1", "--ca-file", "/nowhere/ca"]},
    ),
    "wrong secret": Refused(
        SECRET, ("127.0.0.1:{relay_port}", "token", "--secret-key-file"), {"token": WRONG_TOKEN}
    ),
    "unknown client": Refused(CLIENT, ("nobody", "name"), {"name": "nobody"}),
    "offline client": Refused(CLIENT, (OFFLINE, "not connected"), {"name": OFFLINE}),
    "refused port": Refused(TARGET, ("127.0.0.1:{free_port} refused", CLIENT_NAME, "service")),
    "name unknown to the client": Refused(
        TARGET, ("no-such-host.invalid", "name"), {"host": "no-such-host.invalid"}
    ),
    "unreachable target": Refused(TARGET, ("255.255.255.255",), {"host": "255.255.255.255"}),
    "server down": Refused(
        SERVER,
        ("refused", "--server-url"),
        {"args": ["--server_url", "ws://127.0.0.1:{free_port}"]},
    ),
    "server's name unknown": Refused(
        SERVER,
        ("no-such-relay.invalid", "--server-url"),
        {"args": ["--server_url", "wss://no-such-relay.invalid"]},
    ),
    "TLS to a server without": Refused(
        SERVER,
        ("TLS with 127.0.0.1:{relay_port} failed", "--server-url"),
        {"args": ["--server_url", "wss://127.0.0.1:{relay_port}"]},
    ),
    "wrong path": Refused(
        SERVER,
        ("127.0.0.1:{relay_port}", "/ws_for_ssh_proxy_command"),
        {"args": ["--server_url", "ws://127.0.0.1:{relay_port}/elsewhere"]},
    ),
    "unusable proxy": Refused(
        USAGE, ("http_proxy", "HTTP CONNECT"), {"env": {"http_proxy": "socks5://127.0.0.1:1"}}
    ),
    "proxy down": Refused(
        SERVER,
        ("HTTP proxy", "refused"),
        {"env": {"HTTP_PROXY": "http://u:" + PROXY_PASSWORD + "@127.0.0.1:{free_port}"}},
    ),
    "proxy down, NO_PROXY for another host": Refused(
        SERVER,
        ("HTTP proxy", "refused"),
        {"env": {"http_proxy": "127.0.0.1:{free_port}", "NO_PROXY": "27.0.0.1,.0.0.1,example"}},
    ),
}


def filled(value: Any, names: Mapping[str, object]) -> Any:
    """`value` with {names} filled in, through lists and dicts."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), value)
    if isinstance(value, dict):
        return {key: filled(each, names) for key, each in value.items()}
    return [filled(each, names) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED.keys())
def test_one_line_and_a_code_when_no_tunnel_comes_about(relay: Relay, refused: Refused) -> None:
    """Each failure has its exit code and one line that says what, where and what to try."""
    nowhere = free_port()
    names = {"free_port": nowhere, "relay_port": relay.server.port}
    with relay.proxy(**{"port": nowhere, **filled(refused.options, names)}) as proxy:
        done = proxy.finish(b"bytes that nobody shall see")
        check_failed(done, refused.status, *(filled(word, names) for word in refused.words))


NGINX_SITE = """
    location /gone/ { return 404; }
    location /moved/ { return 302 https://elsewhere.example/relay; }
    location /fine/ { return 200 "no websocket here"; }
    location /down/ { proxy_pass http://127.0.0.1:1; }
    location / {"""


@pytest.fixture(scope="module")
def nginx(
    relay: Relay, tmp_path_factory: pytest.TempPathFactory, certs: Certs
) -> Iterator[debian.Nginx]:
    """nginx in front of the relay, with some paths that are no relay."""
    folder = tmp_path_factory.mktemp("nginx")
    replace = {"location / {": NGINX_SITE}
    with debian.run_nginx_tls(folder, relay.server.port, *certs.pair, replace=replace) as running:
        yield running


@pytest.mark.debian("nginx", "openssl")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone", ("something before the relay answered 404", "nginx")),
        ("moved", ("redirects to https://elsewhere.example/relay", "not followed")),
        ("fine", ("something before the relay answered 200", "nginx")),
        ("down", ("something before the relay answered 502", "nginx")),
    ],
)
def test_answer_is_named_when_it_is_not_the_relays(
    nginx: debian.Nginx, certs: Certs, path: str, words: tuple[str, ...]
) -> None:
    """Who answered, with what, and at which address; the token goes nowhere else."""
    url = f"{nginx.url}/{path}/ws_for_ssh_proxy_command"
    with start_proxy(url, port=1, args=["--ca-file", str(certs.ca)]) as proxy:
        check_failed(proxy.finish(), SERVER, f"127.0.0.1:{nginx.port}", *words)


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", None])
def test_what_answers_is_not_a_relay_when_it_speaks_no_http(banner: bytes | None) -> None:
    """Another protocol, a silent end, or a reset (None)."""
    with RecordingTarget() as target, start_proxy(f"ws://127.0.0.1:{target.port}", port=1) as proxy:
        conversation = target.conversation()
        if banner is None:
            conversation.reset()
        else:
            conversation.wait(lambda me: b"\r\n\r\n" in me.received)
            conversation.send(banner)
            conversation.close()
        check_failed(proxy.finish(), SERVER, f"127.0.0.1:{target.port}")


def test_busy_is_said_when_no_slot_is_free(tmp_path: Path) -> None:
    """503: exit 6, try again; and as soon as a slot is free, it works."""
    with running_relay(tmp_path, threads=2) as relay, EchoTarget() as target:
        with RawUser(relay.url), relay.proxy(target.port) as proxy:
            check_failed(proxy.finish(), SERVER, "no free slot", "try again")

        def works() -> bool:
            with relay.proxy(target.port) as proxy:
                return proxy.finish(b"hi").stdout == b"hi"

        eventually(works, AT_ONCE_S)


def test_tunnel_lost_is_one_line_when_the_target_resets(relay: Relay) -> None:
    """Exit 1, and stdout has what came before, no more."""
    with RecordingTarget() as target, relay.proxy(target.port) as proxy:
        conversation = target.conversation()
        conversation.send(b"so far")
        assert proxy.receive_exactly(6) == b"so far"
        conversation.reset()
        check_failed(proxy.finish(), LOST, "target", "reset")


def test_nothing_is_said_when_both_directions_ended(relay: Relay) -> None:
    """Exit 0 without a word."""
    with EchoTarget() as target, relay.proxy(target.port) as proxy:
        assert proxy.finish(b"to and fro") == Finished(0, b"to and fro", [])


# Signals, and a stdout that nobody reads.


def is_dialling_target(relay: Relay, stack: ExitStack) -> Pipes:
    """A proxy command whose `open` waits for its answer."""
    mark = relay.server.line_count
    proxy = stack.enter_context(relay.proxy(stack.enter_context(black_hole_port())))
    eventually(lambda: count(lines_since(relay.server, mark), "tunnel (started|opened)"))
    return proxy


def is_dialling_server(relay: Relay, stack: ExitStack) -> Pipes:
    """A proxy command whose upgrade waits for its answer."""
    target = stack.enter_context(RecordingTarget())
    proxy = stack.enter_context(start_proxy(f"ws://127.0.0.1:{target.port}", port=1))
    target.conversation().wait(lambda me: b"\r\n\r\n" in me.received)
    return proxy


def is_idle(relay: Relay, stack: ExitStack) -> Pipes:
    """A proxy command with a tunnel on which nothing happens."""
    target = stack.enter_context(EchoTarget())
    proxy = stack.enter_context(relay.proxy(target.port))
    proxy.send(b"x")
    assert proxy.receive_exactly(1) == b"x"
    return proxy


def is_in_flow(relay: Relay, stack: ExitStack) -> Pipes:
    """A proxy command whose stdout is full, and more is coming."""
    target = stack.enter_context(SourceTarget(1 << 30))
    proxy = stack.enter_context(relay.proxy(target.port))
    assert proxy.receive_exactly(1_000_000)
    return proxy


def is_half_closed(relay: Relay, stack: ExitStack) -> Pipes:
    """A proxy command whose stdin has ended and whose target has not."""
    target = stack.enter_context(RecordingTarget(close_on_eof=False))
    proxy = stack.enter_context(relay.proxy(target.port))
    proxy.close_stdin()
    assert target.conversation().wait_ended() == "eof"
    return proxy


STATES: list[Callable[[Relay, ExitStack], Pipes]] = [
    is_dialling_server,
    is_dialling_target,
    is_idle,
    is_in_flow,
    is_half_closed,
]
NUMBERS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_code_is_128_and_n_when_a_signal_ended_it(
    relay: Relay, state: Callable[[Relay, ExitStack], Pipes], number: signal.Signals
) -> None:
    """At once, without a line on stderr."""
    with ExitStack() as stack:
        proxy = state(relay, stack)
        proxy.signal(number)
        assert proxy.wait(AT_ONCE_S) == 128 + number
        assert proxy.lines == []


@pytest.mark.parametrize("state", [is_idle, is_in_flow, is_half_closed], ids=lambda s: s.__name__)
def test_code_is_141_when_stdout_was_closed(
    relay: Relay, state: Callable[[Relay, ExitStack], Pipes]
) -> None:
    """As for SIGPIPE: the user has gone. Also when there is nothing to write."""
    with ExitStack() as stack:
        proxy = state(relay, stack)
        proxy.close_stdout()
        assert proxy.wait(AT_ONCE_S) == SIGPIPE_STATUS
        assert proxy.lines == []


def test_nothing_is_said_when_ctrl_c_comes_during_the_start(relay: Relay, tmp_path: Path) -> None:
    """No traceback while the imports are still on their way; here, one that waits."""
    (tmp_path / "websocket.py").write_text(
        "import os, signal, threading\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Event().wait(10)\n"
    )
    with relay.proxy(1, env={"PYTHONPATH": str(tmp_path)}) as proxy:
        assert proxy.finish() == Finished(-signal.SIGINT, b"", [])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_streams_do_not_mix_when_a_standard_file_is_closed(relay: Relay, closed: str) -> None:
    """As from /dev/null; a socket in its place must not be taken for stdin or stdout."""
    with RecordingTarget(close_on_eof=False) as target:
        line = f"exec {shlex.join(relay_argv(relay, target.port))} {closed}"
        with Pipes(["sh", "-c", line], env=proxy_env()) as proxy:
            conversation = target.conversation()
            conversation.send(b"down")
            conversation.shutdown_write()
            done = proxy.finish(b"up")
            assert (done.status, done.lines) == (0, [])
            assert done.stdout == (b"" if ">&-" in closed else b"down")
            assert conversation.wait_ended() == "eof"
            assert conversation.received == (b"" if "<&-" in closed else b"up")


# Proxies.


@pytest.mark.debian("tinyproxy")
@pytest.mark.parametrize("user", [None, "me"], ids=["without password", "with password"])
def test_tunnel_works_when_a_connect_proxy_is_on_the_way(
    relay: Relay, tmp_path: Path, user: str | None
) -> None:
    """Through a real proxy by the environment; a wrong password is said in one line."""
    password = PROXY_PASSWORD if user else None
    where = f"CONNECT 127.0.0.1:{relay.server.port}"
    with (
        debian.run_tinyproxy(tmp_path, user=user, password=password) as tinyproxy,
        EchoTarget() as target,
    ):
        env = {"http_proxy": tinyproxy.url}
        with relay.proxy(target.port, env=env) as proxy:
            assert proxy.finish(b"around the corner") == Finished(0, b"around the corner", [])
        assert count(tinyproxy.process.lines, where) == 1
        # NO_PROXY is respected, so the proxy is not asked again.
        with relay.proxy(target.port, env={**env, "no_proxy": "x.example,127.0.0.0/8"}) as proxy:
            assert proxy.finish(b"straight") == Finished(0, b"straight", [])
        assert count(tinyproxy.process.lines, where) == 1
        if user:
            url = f"http://{user}:{PROXY_PASSWORD}x@127.0.0.1:{tinyproxy.port}"
            with relay.proxy(target.port, env={"http_proxy": url}) as proxy:
                done = proxy.finish()
                check_failed(done, SERVER, f"127.0.0.1:{tinyproxy.port}", "answered 40")


@pytest.mark.debian("tinyproxy", "nginx", "openssl")
def test_wss_works_when_a_connect_proxy_is_on_the_way(
    nginx: debian.Nginx, certs: Certs, tmp_path: Path
) -> None:
    """TLS is with the server, not with the proxy; the client goes the same way."""
    args = ["--ca-file", str(certs.ca)]
    with debian.run_tinyproxy(tmp_path) as tinyproxy, EchoTarget() as target:
        env = {"HTTPS_PROXY": f"127.0.0.1:{tinyproxy.port}"}
        secret = CLIENTS[OFFLINE]
        with (
            start_client(nginx.url, name=OFFLINE, secret=secret, args=args, env=env),
            start_proxy(nginx.url, name=OFFLINE, port=target.port, args=args, env=env) as proxy,
        ):
            assert proxy.finish(b"both by the proxy") == Finished(0, b"both by the proxy", [])
        assert count(tinyproxy.process.lines, f"CONNECT 127.0.0.1:{nginx.port}") == 2


# A server that restarts meanwhile.


def test_tunnel_opens_when_the_server_restarts_during_its_open(tmp_path: Path) -> None:
    """An open in flight is asked anew of the new server, with another tunnel_id."""
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, port=port))
        client = stack.enter_context(RawClient(server.url))
        proxy = stack.enter_context(start_proxy(server.url, port=22))
        proxy.send(b"hello")
        first = client.recv_control("open")
        server.terminate()
        assert client.recv_control("going_away")
        assert client.recv_close()[0] == 1012
        server.wait(2.0)
        server = stack.enter_context(start_server(tmp_path, port=port, wait=False))
        # The client is slower to come back than the user.
        server.wait_for_line("reason=client_offline")
        again = stack.enter_context(RawClient(server.url))
        second = again.recv_control("open")
        assert second["tunnel_id"] != first["tunnel_id"]
        assert second["resume_token"] != first["resume_token"]
        channel = second["channel"]
        again.send_opened(channel)
        assert again.recv_on() == (channel, b"hello")
        again.send_on(channel, b"at last")
        assert proxy.receive_exactly(7) == b"at last"
        proxy.signal(signal.SIGHUP)
        assert proxy.wait() == 128 + signal.SIGHUP
        assert proxy.lines == []


# Timeouts of a dial and of an open.


def test_target_timeout_is_said_when_it_never_answers(slow: Slow) -> None:
    """The client gives a dial 10 s, and its reason reaches the user."""
    done = slow.target_is_silent.finish(timeout_s=DIAL_S + 2)
    check_failed(done, TARGET, "did not answer", CLIENT_NAME)


def test_open_timeout_is_said_when_the_client_never_answers(slow: Slow) -> None:
    """Longer than the client's own dial; a client that is stuck costs the user no more."""
    done = slow.client_is_silent.finish(timeout_s=OPEN_S + 2)
    check_failed(done, TARGET, "no answer", OFFLINE)
