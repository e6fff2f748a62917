"""Real processes: the server, the client and the proxy command, each started as a user would.

Each is a `Proc`. A thread collects its output, and the end of its `with` block ends and reaps the
whole process group, whatever state the process is in.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http.client
import json
import os
import re
import select
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.support.ports import free_port
from tests.support.secrecy import audit_logs, check_no_secret, note_credentials, note_secrets
from tests.support.waiting import eventually

P = TypeVar("P", bound="Proc")

ROOT = Path(__file__).resolve().parents[2]
CHECKING_TLS_FOLDER = Path(__file__).resolve().parent / "checking_tls"

# As long and random as real ones; tests search for them in logs and in `ps`.
CLIENT_NAME = "device"
CLIENT_SECRET = "cs-hT7wq0ZkV3yB9uXn5rLmD2fGs8jPaEoKc"
TOKEN = "pu-Qe4vR1xWm7bN0zYt6sHk9dCg3fJlUiAo"
CREDENTIALS: dict[str, Any] = {"clients": {CLIENT_NAME: CLIENT_SECRET}, "proxy_users": [TOKEN]}

# For the client and the proxy command: a tunnel ends at once when its leg is lost.
NO_RESUME = {"HTTP_NETWORK_RELAY_RESUME_TIMEOUT": "0"}

# Python, Flask and gunicorn take 0.5 s to start on an idle machine; more on a busy one.
_START_TIMEOUT_S = 20.0
_LINES_KEPT = 10_000

# The processes of this test, for the report of a failure; tests/conftest.py empties the list.
started: list[Proc] = []


def child_environment(
    extra: Mapping[str, str] | None = None, *, checking_tls_file: Path | None = None
) -> dict[str, str]:
    """Return this process's environment without variables that change the relay's programs.

    With `checking_tls_file`, a process ends with code 99 and a line in that file when two threads
    are inside one TLS object at once.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HTTP_NETWORK_RELAY_")
        and not name.lower().endswith("_proxy")
        and name not in ("GUNICORN_CMD_ARGS", "PORT", "WEB_CONCURRENCY")
    }
    path = [str(ROOT)]
    if checking_tls_file is not None:
        path.insert(0, str(CHECKING_TLS_FOLDER))
        env["RELAY_TLS_CHECK_FILE"] = str(checking_tls_file)
    env["PYTHONPATH"] = os.pathsep.join(path)
    env["PYTHONUNBUFFERED"] = "1"
    env.update(extra or {})
    return env


class Proc:
    """A process whose output is collected as lines. A context manager.

    Without `pipes`, stdin is empty and stdout is collected along with stderr. With it, stdin
    and stdout belong to the test (see `Pipes`) and only stderr is collected.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = ROOT,
        pipes: bool = False,
    ) -> None:
        self.argv = list(argv)
        self._env = env
        # Guards the reading of the output and the next four; notified at every line.
        self._changed = threading.Condition()
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self._rest = b""
        self._line_count = 0
        self._output_ended = False
        self._closed = False
        self.popen: subprocess.Popen[bytes] = subprocess.Popen(
            self.argv,
            env=child_environment() if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if pipes else subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # a group of its own, so that close() can end all of it
        )
        output = self.popen.stderr if pipes else self.popen.stdout
        assert output is not None
        self._output_fd = output.fileno()
        os.set_blocking(self._output_fd, False)
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._collect, name=f"proc:{self.pid}")
        self._thread.start()
        started.append(self)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return self.popen.poll()

    @property
    def is_running(self) -> bool:
        return self.returncode is None

    @property
    def lines(self) -> list[str]:
        """Return the lines written so far, without line ends; the last 10,000.

        The pipe is read first, so every line that precedes an observed effect is here.
        """
        with self._changed:
            self._read_locked()
            return list(self._lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def line_count(self) -> int:
        """Return how many lines were written so far: a mark for `wait_for_line(after=...)`."""
        with self._changed:
            self._read_locked()
            return self._line_count

    def wait_for_line(self, regex: str, timeout_s: float = 10.0, *, after: int = 0) -> str:
        """Return the first line, from number `after` on, in which `regex` is found.

        Raises AssertionError with the output when no such line comes, or the process ends first.
        """
        pattern = re.compile(regex)
        deadline = time.monotonic() + timeout_s
        seen = after
        with self._changed:
            while True:
                first_kept = self._line_count - len(self._lines)
                for line in list(self._lines)[max(0, seen - first_kept) :]:
                    if pattern.search(line):
                        return line
                seen = max(seen, self._line_count)
                if self._output_ended:
                    why = "the process ended"
                    break
                wait_s = deadline - time.monotonic()
                if wait_s <= 0:
                    why = f"{timeout_s} s passed"
                    break
                self._changed.wait(wait_s)
        raise AssertionError(f"{why} without a line matching {regex!r}:\n{self.text}")

    def wait(self, timeout_s: float = 10.0) -> int:
        """Wait for the end and return the exit status; raise AssertionError after `timeout_s`."""
        try:
            status = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout_s} s: {shlex.join(self.argv)}\n{self.text}"
            ) from None
        # So that `lines` is complete; a grandchild may keep the pipe open for longer.
        with self._changed:
            self._changed.wait_for(lambda: self._output_ended, 1.0)
        return status

    def signal(self, number: int) -> None:
        """Send a signal to the process alone; do nothing when the process has ended."""
        self.popen.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group, so that no worker outlives its master."""
        self._signal_group(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP to the whole group: alive, without reading or writing."""
        self._signal_group(signal.SIGSTOP)

    def cont(self) -> None:
        """Undo `stop()`."""
        self._signal_group(signal.SIGCONT)

    def close(self) -> None:
        """End the group, reap, and join the thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._signal_group(signal.SIGKILL)
        self.popen.wait()
        os.write(self._wake_writer, b"x")
        self._thread.join()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        check_no_secret(repr(self), self.text)
        for path in audit_logs(self._env):
            check_no_secret(f"{path} of {self!r}", path.read_bytes())

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shlex.join(self.argv)} status={self.returncode}>"

    def _signal_group(self, number: int) -> None:
        # The group can outlive its leader, so this must not ask whether the leader runs. Once
        # the group is empty its number may be given away, but only after the leader is reaped
        # and the numbers went all the way round.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _collect(self) -> None:
        """The thread: collect lines until the pipe has no writer, or until close() is called."""
        poll = select.poll()
        poll.register(self._output_fd, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        ended = False
        while not ended:
            closing = any(fd == self._wake_reader for fd, _ in poll.poll())
            with self._changed:
                self._read_locked()
                if closing:
                    self._end_output_locked()
                ended = self._output_ended

    def _read_locked(self) -> None:
        """Read the pipe until it is empty. The thread and every caller that looks at lines read."""
        while not self._output_ended:
            try:
                data = os.read(self._output_fd, 65536)
            except BlockingIOError:
                return
            if data:
                *whole, self._rest = (self._rest + data).split(b"\n")
                self._add_locked(whole)
            else:
                self._end_output_locked()

    def _end_output_locked(self) -> None:
        if not self._output_ended:
            self._output_ended = True
            self._add_locked([self._rest] if self._rest else [])

    def _add_locked(self, lines: list[bytes]) -> None:
        self._lines.extend(line.decode(errors="replace") for line in lines)
        self._line_count += len(lines)
        self._changed.notify_all()


@dataclass(frozen=True)
class Finished:
    """How a process with pipes ended."""

    status: int
    stdout: bytes
    lines: list[str]


class Pipes(Proc):
    """A process whose stdin and stdout belong to the test; each use has a deadline.

    One thread may send while another receives.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = ROOT,
    ) -> None:
        super().__init__(argv, env=env, cwd=cwd, pipes=True)
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.stdin = self.popen.stdin
        self.stdout = self.popen.stdout
        # Our ends only: the process has the pipes' other ends.
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)

    def send(self, data: bytes, timeout_s: float = 10.0) -> None:
        """Write all of `data` to its stdin; BrokenPipeError when it reads no more."""
        view = memoryview(data)
        deadline = time.monotonic() + timeout_s
        while view:
            self._wait(self.stdin.fileno(), select.POLLOUT, deadline, "take its stdin")
            view = view[os.write(self.stdin.fileno(), view[:65536]) :]

    def send_some(self, data: bytes, stuck_after_s: float = 0.5) -> int:
        """Write until all is taken or nothing is for `stuck_after_s`; return the count taken."""
        taken = 0
        with contextlib.suppress(AssertionError):
            while taken < len(data):
                chunk = data[taken : taken + 65536]
                deadline = time.monotonic() + stuck_after_s
                self._wait(self.stdin.fileno(), select.POLLOUT, deadline, "take its stdin")
                taken += os.write(self.stdin.fileno(), chunk)
        return taken

    def close_stdin(self) -> None:
        """EOF on its stdin."""
        self.stdin.close()

    def close_stdout(self) -> None:
        """Close the reading end of its stdout: the next write fails with EPIPE."""
        self.stdout.close()

    def receive(self, size: int = 65536, timeout_s: float = 10.0) -> bytes:
        """Return the next bytes of its stdout, at most `size`; b"" at the end."""
        deadline = time.monotonic() + timeout_s
        self._wait(self.stdout.fileno(), select.POLLIN, deadline, "write to stdout")
        return os.read(self.stdout.fileno(), size)

    def receive_exactly(self, size: int, timeout_s: float = 10.0) -> bytes:
        """Return exactly `size` bytes; raise AssertionError when stdout ends before that."""
        data = bytearray()
        deadline = time.monotonic() + timeout_s
        while len(data) < size:
            more = self.receive(size - len(data), deadline - time.monotonic())
            if not more:
                raise AssertionError(
                    f"{self!r}: end after {len(data)} of {size} bytes:\n{self.text}"
                )
            data += more
        return bytes(data)

    def receive_all(self, timeout_s: float = 10.0) -> bytes:
        """Return all bytes to the end of its stdout."""
        data = bytearray()
        deadline = time.monotonic() + timeout_s
        while more := self.receive(1 << 20, deadline - time.monotonic()):
            data += more
        return bytes(data)

    def finish(self, data: bytes = b"", timeout_s: float = 10.0) -> Finished:
        """Send `data` and EOF, read stdout to its end, and wait: `printf data | command`.

        Sends and receives in turns, so that neither side can block the other.
        """
        deadline = time.monotonic() + timeout_s
        received = bytearray()
        view = memoryview(data)
        writing = not self.stdin.closed
        while True:
            poll = select.poll()
            poll.register(self.stdout.fileno(), select.POLLIN)
            if writing and not view:
                self.close_stdin()
                writing = False
            if writing:
                poll.register(self.stdin.fileno(), select.POLLOUT)
            ready = dict(poll.poll(max(0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise AssertionError(f"{self!r} did not finish in {timeout_s} s:\n{self.text}")
            if writing and self.stdin.fileno() in ready:
                try:
                    view = view[os.write(self.stdin.fileno(), view[:65536]) :]
                except BrokenPipeError:
                    view = view[len(view) :]
            if self.stdout.fileno() in ready:
                more = os.read(self.stdout.fileno(), 1 << 20)
                if not more:
                    break
                received += more
        if writing:
            self.close_stdin()
        status = self.wait(max(0.1, deadline - time.monotonic()))
        return Finished(status, bytes(received), self.lines)

    def _wait(self, fd: int, event: int, deadline: float, what: str) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise AssertionError(f"{self!r} did not {what} in time:\n{self.text}")


class Server(Proc):
    """A running `gunicorn wsgi:app`."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        port: int,
        has_tls: bool,
        credentials_file: Path,
    ) -> None:
        self.port = port
        self.has_tls = has_tls
        self.credentials_file = credentials_file
        super().__init__(argv, env=env)

    @property
    def url(self) -> str:
        """ws:// or wss://, without a path."""
        return f"{'wss' if self.has_tls else 'ws'}://127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        return f"{'https' if self.has_tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def worker_pid(self) -> int:
        """Wait until gunicorn has exactly one worker, and return its process id."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")

        def only_child() -> int | None:
            pids = children.read_text().split()
            return int(pids[0]) if len(pids) == 1 else None

        pid = eventually(only_child, message="no single worker")
        assert pid is not None
        return pid

    def health(self, timeout_s: float = 5.0) -> int:
        """GET /healthz on a new connection; the HTTP status. OSError when there is no answer."""
        connection: http.client.HTTPConnection
        if self.has_tls:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # the question is whether it is alive
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            with connection.getresponse() as response:
                response.read()
                return response.status

    def wait_healthy(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Wait until /healthz answers 200; AssertionError with the log if it ends instead."""

        def is_healthy() -> bool:
            if not self.is_running:
                return True
            try:
                return self.health() == 200
            except (OSError, http.client.HTTPException):
                return False

        eventually(is_healthy, timeout_s, message=f"the server did not answer:\n{self.text}")
        if not self.is_running:
            status = self.wait()
            raise AssertionError(f"the server ended with status {status}:\n{self.text}")


def write_credentials(folder: Path, credentials: object = CREDENTIALS) -> Path:
    """Write `folder`/credentials.json with mode 0600; a str is written as it is."""
    path = folder / "credentials.json"
    text = credentials if isinstance(credentials, str) else json.dumps(credentials)
    note_credentials(credentials)
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def start_server(
    folder: Path,
    *,
    threads: int = 16,
    credentials: object = CREDENTIALS,
    port: int | None = None,
    ping_interval_s: float | None = None,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    tls: tuple[Path, Path] | None = None,
    checking_tls_file: Path | None = None,
    wait: bool = True,
) -> Server:
    """Start `gunicorn --threads N wsgi:app` on a free port and wait for /healthz.

    `folder` takes the credentials. `tls` is (certificate, key) for gunicorn itself.
    """
    port = port or free_port()
    credentials_file = write_credentials(folder, credentials)
    own = {"HTTP_NETWORK_RELAY_CREDENTIALS_FILE": str(credentials_file)}
    if ping_interval_s is not None:
        own["HTTP_NETWORK_RELAY_PING_INTERVAL"] = str(ping_interval_s)
    argv = [sys.executable, "-m", "gunicorn", "--threads", str(threads)]
    argv += ["--bind", f"127.0.0.1:{port}", *args]
    if tls is not None:
        argv += ["--certfile", str(tls[0]), "--keyfile", str(tls[1])]
    server = Server(
        [*argv, "wsgi:app"],
        env=child_environment({**own, **(env or {})}, checking_tls_file=checking_tls_file),
        port=port,
        has_tls=tls is not None,
        credentials_file=credentials_file,
    )
    if wait:
        _or_close(server, server.wait_healthy)
    return server


def start_client(
    server_url: str,
    *,
    name: str = CLIENT_NAME,
    secret: str = CLIENT_SECRET,
    ping_interval_s: float | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    checking_tls_file: Path | None = None,
    wait: bool = True,
) -> Proc:
    """Start `python -m client` and wait until it says that it registered."""
    note_secrets(secret)
    own = {"HTTP_NETWORK_RELAY_CLIENT_SECRET": secret}
    if ping_interval_s is not None:
        own["HTTP_NETWORK_RELAY_PING_INTERVAL"] = str(ping_interval_s)
    argv = [sys.executable, "-m", "client", "--server_url", server_url, "--client-name", name]
    client = Proc(
        [*argv, *args],
        env=child_environment({**own, **(env or {})}, checking_tls_file=checking_tls_file),
    )
    if wait:
        _or_close(client, lambda: client.wait_for_line("registered", _START_TIMEOUT_S))
    return client


def proxy_argv(
    server_url: str,
    *,
    name: str = CLIENT_NAME,
    host: str = "127.0.0.1",
    port: int | str,
    protocol: str | None = "tcp",
    args: Sequence[str] = (),
    script: Path | None = None,
    python: str = sys.executable,
) -> list[str]:
    """The proxy command's argument list; the token comes by environment (`proxy_env`).

    `port` may be "%p" and `host` "%h", for an ssh ProxyCommand.
    """
    argv = [python, str(script or ROOT / "ssh_proxy_command.py"), name, host, str(port)]
    argv += [protocol] if protocol is not None else []
    return [*argv, "--server_url", server_url, *args]


def proxy_env(
    *,
    token: str | None = TOKEN,
    ping_interval_s: float | None = None,
    env: Mapping[str, str] | None = None,
    checking_tls_file: Path | None = None,
) -> dict[str, str]:
    """Return the proxy command's environment; also ssh's, since ssh passes it on."""
    note_secrets(token)
    own = {} if token is None else {"HTTP_NETWORK_RELAY_SECRET_KEY": token}
    if ping_interval_s is not None:
        own["HTTP_NETWORK_RELAY_PING_INTERVAL"] = str(ping_interval_s)
    return child_environment({**own, **(env or {})}, checking_tls_file=checking_tls_file)


def start_proxy(
    server_url: str,
    *,
    name: str = CLIENT_NAME,
    host: str = "127.0.0.1",
    port: int,
    protocol: str | None = "tcp",
    token: str | None = TOKEN,
    ping_interval_s: float | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    checking_tls_file: Path | None = None,
) -> Pipes:
    """Start the proxy command to `host`:`port` at client `name`. Does not wait for anything."""
    argv = proxy_argv(server_url, name=name, host=host, port=port, protocol=protocol, args=args)
    return Pipes(
        argv,
        env=proxy_env(
            token=token,
            ping_interval_s=ping_interval_s,
            env=env,
            checking_tls_file=checking_tls_file,
        ),
    )


@dataclass
class Relay:
    """A server with one client, and the means to start proxy commands through them."""

    server: Server
    client: Proc
    folder: Path

    @property
    def url(self) -> str:
        return self.server.url

    def proxy(self, port: int, **options: Any) -> Pipes:
        """`start_proxy` to 127.0.0.1:`port` at this relay's client."""
        return start_proxy(self.url, port=port, **options)


@contextmanager
def running_relay(
    folder: Path, *, client: Mapping[str, Any] | None = None, **server: Any
) -> Iterator[Relay]:
    """A server (options as `start_server`) with one client (`client`: as `start_client`)."""
    with (
        start_server(folder, **server) as server_process,
        start_client(server_process.url, **(client or {})) as client_process,
    ):
        yield Relay(server_process, client_process, folder)


def open_sockets(pid: int) -> int:
    """How many sockets process `pid` holds: 0 left means that nothing leaked."""
    count = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(entry.path).startswith("socket:")
    return count


def thread_count(pid: int) -> int:
    """How many threads process `pid` has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_bytes(pid: int) -> int:
    """The resident set of process `pid`."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def command_line(pid: int) -> str:
    """Return the command line of process `pid` as `ps` shows it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def can_connect(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether the port accepts connections now."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_listening(process: Proc, port: int, timeout_s: float = _START_TIMEOUT_S) -> None:
    """Wait until `process` accepts on `port`; closes it and raises AssertionError if not."""
    is_up = functools.partial(can_connect, port)
    _or_close(
        process,
        lambda: eventually(
            lambda: is_up() or not process.is_running,
            timeout_s,
            message=f"{process!r} does not listen",
        ),
    )
    if not process.is_running:
        process.close()
        raise AssertionError(f"{process!r} ended:\n{process.text}")


def _or_close(process: Proc, ready: Callable[[], object]) -> None:
    """Run `ready`; close the process when `ready` fails."""
    try:
        ready()
    except BaseException:
        process.close()
        raise
