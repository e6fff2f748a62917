"""Real ssh, scp, rsync and git through all three programs, to a real sshd."""

import hashlib
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import debian
from tests.support.debian import Sshd
from tests.support.flows import (
    AT_ONCE_S,
    Mark,
    relay_argv,
    run,
    side_by_side,
)
from tests.support.ports import free_port
from tests.support.processes import (
    Pipes,
    Proc,
    Relay,
    can_connect,
    proxy_env,
    running_relay,
)
from tests.support.ssh import SHELL_S, Terminal, check_short_sessions, ssh_argv
from tests.support.targets import (
    AnswerAfterEofTarget,
    EchoTarget,
    RecordingTarget,
    pseudo_random_bytes,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.debian("openssh-client", "openssh-server")

FILE_BYTES = 20 * 1024 * 1024
SESSIONS_AT_ONCE = 20
SHORT_SESSIONS = 50


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real sshd."""
    # bash reads ~/.bashrc in sshd's sessions, which may be slow or talk, unless it believes
    # that it runs inside another shell.
    config = "SetEnv SHLVL=1"
    with debian.run_sshd(tmp_path_factory.mktemp("sshd"), config=config) as running:
        yield running


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A server with room for all sessions of a test, and one client."""
    with running_relay(tmp_path_factory.mktemp("relay"), threads=32) as running:
        yield running


def test_login_runs_a_command_when_through_the_relay(relay: Relay, sshd: Sshd) -> None:
    """stdin, stdout, stderr and the exit status pass, as without a relay."""
    data = pseudo_random_bytes(100_000, "login")
    done = run(ssh_argv(relay, sshd, "cat; echo on stderr >&2; exit 7"), data=data)
    assert (done.returncode, done.stderr) == (7, b"on stderr\n")
    assert done.stdout == data


def test_files_are_equal_when_copied_both_ways_by_scp(
    relay: Relay, sshd: Sshd, tmp_path: Path
) -> None:
    """20 MB up and 20 MB down at the same time, equal SHA-256."""
    upload = pseudo_random_bytes(FILE_BYTES, "up")
    download = pseudo_random_bytes(FILE_BYTES, "down")
    (tmp_path / "upload").write_bytes(upload)
    (tmp_path / "download").write_bytes(download)
    proxy = debian.proxy_command(relay_argv(relay, sshd.port))
    scp = [debian.program("scp"), "-q", *sshd.options, "-o", f"ProxyCommand={proxy}"]
    far = f"{sshd.user}@device:{tmp_path}"

    done = side_by_side(
        [
            lambda: run([*scp, str(tmp_path / "upload"), f"{far}/uploaded"]),
            lambda: run([*scp, f"{far}/download", str(tmp_path / "downloaded")]),
        ]
    )
    assert [each.stderr for each in done] == [b"", b""]
    assert [each.returncode for each in done] == [0, 0]
    for name, sent in (("uploaded", upload), ("downloaded", download)):
        came = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert came == hashlib.sha256(sent).hexdigest(), name


@pytest.mark.debian("rsync")
def test_rsync_makes_folders_equal_when_some_files_changed(
    relay: Relay, sshd: Sshd, tmp_path: Path
) -> None:
    """A first copy, then a second one that sends only what changed."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "deep" / "er").mkdir(parents=True)
    for number in range(40):
        name = source / ("deep/er" if number % 2 else ".") / f"file-{number}"
        name.write_bytes(pseudo_random_bytes(number * 5000, number))
    argv = [debian.program("rsync"), "-a", "--delete", "--checksum", "--stats"]
    argv += ["-e", sshd.transport(relay_argv(relay, sshd.port))]
    argv += [f"{source}/", f"{sshd.user}@device:{copy}/"]

    def files(folder: Path) -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    first = run(argv)
    assert (first.returncode, first.stderr) == (0, b"")
    assert files(copy) == files(source)
    (source / "file-2").unlink()
    (source / "deep" / "er" / "file-39").write_bytes(b"changed")
    second = run(argv)
    assert (second.returncode, second.stderr) == (0, b"")
    assert files(copy) == files(source)
    assert b"Number of regular files transferred: 1\n" in second.stdout


@pytest.mark.debian("git")
def test_git_clones_and_pushes_when_over_ssh(relay: Relay, sshd: Sshd, tmp_path: Path) -> None:
    """What was pushed is in the far repository, and what was there is in the clone."""
    env = proxy_env(
        env={
            "GIT_SSH_COMMAND": sshd.transport(relay_argv(relay, sshd.port)),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_NAME": "A Tester" for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": "tester@device.test" for who in ("AUTHOR", "COMMITTER")},
        }
    )

    def git(*args: str, folder: Path = tmp_path) -> str:
        done = run([debian.program("git"), *args], cwd=folder, env=env)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    far, seed, clone = tmp_path / "far.git", tmp_path / "seed", tmp_path / "clone"
    git("init", "-q", "-b", "main", str(seed))
    (seed / "data").write_bytes(pseudo_random_bytes(1_000_000, "git"))
    git("add", ".", folder=seed)
    git("commit", "-q", "-m", "First", folder=seed)
    git("clone", "-q", "--bare", str(seed), str(far))

    git("clone", "-q", f"ssh://{sshd.user}@device{far}", str(clone))
    assert (clone / "data").read_bytes() == (seed / "data").read_bytes()
    (clone / "more").write_bytes(pseudo_random_bytes(500_000, "more"))
    git("add", ".", folder=clone)
    git("commit", "-q", "-m", "Second", folder=clone)
    git("push", "-q", "origin", "main", folder=clone)
    assert git("log", "--format=%s", "main", folder=far) == "Second\nFirst"
    git("fsck", "--strict", folder=far)


def test_forwarded_port_echoes_when_ssh_listens(relay: Relay, sshd: Sshd) -> None:
    """`ssh -N -L`: several connections at once, each half-closed and answered to the end."""
    with EchoTarget() as target:
        port = free_port()
        forward = f"127.0.0.1:{port}:127.0.0.1:{target.port}"
        options = ("-N", "-o", "ExitOnForwardFailure=yes", "-L", forward)
        mark = Mark.now(relay)
        with Proc(ssh_argv(relay, sshd, options=options), env=proxy_env()) as ssh:
            eventually(lambda: can_connect(port), SHELL_S, message=ssh.text)

            def echo(seed: int) -> bool:
                data = pseudo_random_bytes(1_000_000, seed)
                with socket.create_connection(("127.0.0.1", port), timeout=SHELL_S) as sock:
                    sender = threading.Thread(
                        target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))
                    )
                    sender.start()
                    received = bytearray()
                    while more := sock.recv(1 << 16):
                        received += more
                    sender.join()
                return received == data

            assert side_by_side([lambda seed=seed: echo(seed) for seed in range(4)]) == [True] * 4
            ssh.terminate()
            ssh.wait()
        mark.wait_all_closed(1)


def test_keys_appear_once_when_typed_into_a_terminal(relay: Relay, sshd: Sshd) -> None:
    """`ssh -tt`: each key is echoed exactly once, Ctrl-C interrupts, the status comes back."""
    shell = "exec env PS1='go> ' TERM=dumb ENV= sh -i"
    argv = ssh_argv(relay, sshd, shell, options=("-tt",))
    with Terminal(argv, proxy_env()) as terminal:
        terminal.wait_for(b"go> ")
        terminal.screen = b""
        typed = b""
        # One process prints and waits: the Ctrl-C cannot come before there is one to end.
        for key in b"sh -c 'echo $((6*7)) ; exec sleep 60'":
            typed += bytes([key])
            terminal.type(bytes([key]))
            terminal.wait_for(typed)
            assert terminal.screen == typed
        terminal.type(b"\r")
        terminal.wait_for(b"\r\n42\r\n")
        terminal.type(b"\x03")
        terminal.wait_for(b"^C\r\ngo> ")
        terminal.type(b"exit 5\r")
        terminal.wait_for(b"go> exit 5\r\n")
        assert terminal.popen.wait(SHELL_S) == 5


def test_sessions_do_not_mix_when_twenty_run_at_once(relay: Relay, sshd: Sshd) -> None:
    """Each gets its own bytes back and its own exit status."""

    def session(number: int) -> None:
        data = pseudo_random_bytes(200_000, f"session {number}")
        done = run(ssh_argv(relay, sshd, f"cat; exit {number}"), data=data)
        assert (done.returncode, done.stderr) == (number, b"")
        assert done.stdout == data, f"session {number} got other bytes"

    mark = Mark.now(relay)
    side_by_side([lambda n=n: session(n) for n in range(SESSIONS_AT_ONCE)])
    mark.wait_all_closed(SESSIONS_AT_ONCE)


def test_no_tunnel_is_left_when_fifty_short_sessions_ended(relay: Relay, sshd: Sshd) -> None:
    """50 times `ssh host true`: all is given back within a second of the last one's end."""
    check_short_sessions(relay, sshd, SHORT_SESSIONS)


def test_answer_comes_whole_when_the_pipe_is_half_closed(relay: Relay) -> None:
    """printf 'b\\na\\n' | ssh_proxy_command.py ..., to a target that answers after EOF."""
    with AnswerAfterEofTarget() as target:
        line = f"printf 'b\\na\\n' | exec {shlex.join(relay_argv(relay, target.port))}"
        done = run(["sh", "-c", line])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"a\nb\n", b"")
        assert target.conversation().ended == "eof"


def test_upload_goes_on_when_the_target_ended_first(relay: Relay) -> None:
    """stdout ends at once, though stdin is open; what is sent then still arrives."""
    rest = pseudo_random_bytes(2_000_000, "rest")
    with RecordingTarget() as target, relay.proxy(target.port) as proxy:
        conversation = target.conversation()
        proxy.send(b"first")
        conversation.wait_received(5)
        conversation.send(b"bye")
        conversation.shutdown_write()
        assert proxy.receive_all(AT_ONCE_S) == b"bye"
        proxy.send(rest)
        conversation.wait_received(5 + len(rest))
        assert conversation.received == b"first" + rest
        assert proxy.is_running
        proxy.close_stdin()
        assert proxy.wait(AT_ONCE_S) == 0
        assert conversation.wait_ended() == "eof"
        assert proxy.lines == []


def test_ssh_ends_by_itself_when_the_target_closes_first(relay: Relay, sshd: Sshd) -> None:
    """A killed sshd session ends ssh at once, with nobody touching its stdin."""
    argv = ssh_argv(relay, sshd, "echo $PPID; cat")
    with Pipes(argv, env=proxy_env()) as ssh:
        # Its parent is the connection's own sshd process.
        session = int(ssh.receive(timeout_s=SHELL_S))
        os.kill(session, signal.SIGKILL)
        assert ssh.wait(AT_ONCE_S) == 255
