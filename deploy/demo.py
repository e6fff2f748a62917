"""`make run`: a server and one client, `demo`, on this machine, and an ssh line to try them.

Writes `credentials.json` with random secrets if there is none, and the two secrets into files
under `.run`, so that none stands on a command line. Runs until Ctrl-C, SIGTERM or a child's
end, then stops both children. Threads: one per child copies its output to ours.
"""

import argparse
import contextlib
import getpass
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
CREDENTIALS_FILE = ROOT / "credentials.json"
RUN_FOLDER = ROOT / ".run"
CLIENT_SECRET_FILE = RUN_FOLDER / "demo-client.secret"
TOKEN_FILE = RUN_FOLDER / "proxy-user.token"
CLIENT_NAME = "demo"

# A Raspberry Pi takes 5 s to start Python, Flask and gunicorn.
START_TIMEOUT_S = 30.0
# Server and client end within 2 s of SIGTERM.
STOP_TIMEOUT_S = 5.0
# Interval between two looks at the children; no event tells of a child's end.
LOOK_S = 0.1


class DemoError(Exception):
    """The reason why the demo cannot run, in one line."""


class Child:
    """A server or client; a thread copies its output and notices one line."""

    def __init__(self, role: str, argv: list[str], *, ready_word: str | None = None) -> None:
        self.role = role
        self.ready = threading.Event()
        self._ready_word = ready_word
        # The client must not look for a proxy on the way to this machine.
        no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env={**os.environ, "NO_PROXY": no_proxy, "no_proxy": no_proxy},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C reaches us alone, so that both are stopped in order.
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._copy, name=f"copy:{role}")
        self._thread.start()

    def ended_with(self) -> str | None:
        """Return how the child ended, in words; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if it takes too long; joins the thread."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._thread.join()

    def _copy(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                sys.stderr.write(f"{self.role}: {line}")
                if self._ready_word is not None and self._ready_word in line:
                    self.ready.set()


class Demo:
    """The two children, and the event that asks both to stop."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.stopping = threading.Event()

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping.set()

    def run(self, port: int, ssh_port: int) -> None:
        """Start both, print the line, and wait. Raises DemoError when one ends by itself."""
        write_secret_files(load_or_create_credentials())
        check_port_is_free(port)
        url = f"http://127.0.0.1:{port}"
        server = ["-m", "server", "--host", "127.0.0.1", "--port", str(port)]
        self.start(Child("server", [*server, "--credentials-file", str(CREDENTIALS_FILE)]))
        self.wait_for(lambda: answers_health(url), "the server did not answer")
        if not self.stopping.is_set():
            client = ["-m", "client", "--server_url", url, "--client-name", CLIENT_NAME]
            client += ["--client-secret-file", str(CLIENT_SECRET_FILE)]
            child = Child("client", client, ready_word="registered")
            self.start(child)
            self.wait_for(child.ready.is_set, "the client did not register")
        if not self.stopping.is_set():
            print(instructions(url, ssh_port), flush=True)
        while not self.stopping.wait(LOOK_S):
            self.check_children()

    def start(self, child: Child) -> None:
        self.children.append(child)

    def wait_for(self, is_ready: Callable[[], bool], problem: str) -> None:
        """Wait until it is ready or we are to stop; DemoError when a child ends or time is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
            if self.stopping.wait(LOOK_S):
                return
            self.check_children()
            if time.monotonic() > deadline:
                raise DemoError(f"{problem} within {START_TIMEOUT_S:.0f} s")

    def check_children(self) -> None:
        for child in self.children:
            how = child.ended_with()
            if how is not None:
                raise DemoError(f"the {child.role} {how}; its own lines above say why")

    def stop(self) -> None:
        """Stop the client first, so that it does not see its server end and try again."""
        for child in reversed(self.children):
            child.stop()


def load_or_create_credentials() -> tuple[str, str]:
    """Return the demo client's secret and the first proxy user's token."""
    if not CREDENTIALS_FILE.exists():
        fresh = {
            "clients": {CLIENT_NAME: secrets.token_urlsafe(32)},
            "proxy_users": [secrets.token_urlsafe(32)],
        }
        write_private(CREDENTIALS_FILE, json.dumps(fresh, indent=2) + "\n")
        print(f"demo: wrote {CREDENTIALS_FILE} with random secrets", flush=True)
    try:
        credentials = json.loads(CREDENTIALS_FILE.read_text())
        secret, token = credentials["clients"][CLIENT_NAME], credentials["proxy_users"][0]
    except OSError as exc:
        raise DemoError(f"cannot read {CREDENTIALS_FILE}: {exc.strerror}") from exc
    except (ValueError, LookupError, TypeError) as exc:
        # No `exc` in the text: a JSON error may quote a secret.
        raise DemoError(
            f"{CREDENTIALS_FILE} needs a client named {CLIENT_NAME!r} and a proxy user; "
            "add them, or move the file away to have one made"
        ) from exc
    if not isinstance(secret, str) or not isinstance(token, str):
        raise DemoError(f"{CREDENTIALS_FILE}: the secrets have to be strings")
    return secret, token


def write_secret_files(secret_and_token: tuple[str, str]) -> None:
    """Put the two secrets where the client and the proxy command read them."""
    RUN_FOLDER.mkdir(mode=0o700, exist_ok=True)
    for path, secret in zip((CLIENT_SECRET_FILE, TOKEN_FILE), secret_and_token, strict=True):
        path.unlink(missing_ok=True)
        write_private(path, secret + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, from its first moment on."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def check_port_is_free(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            raise DemoError(
                f"cannot listen on port {port} ({exc.strerror}); try make run PORT={port + 1000}"
            ) from exc


def answers_health(url: str) -> bool:
    # Past any proxy of the environment: it is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def instructions(url: str, ssh_port: int) -> str:
    """Return the line to paste into another terminal."""
    proxy = [sys.executable, str(ROOT / "ssh_proxy_command.py"), CLIENT_NAME, "127.0.0.1"]
    proxy += [str(ssh_port), "tcp", "--server_url", url, "--secret-key-file", str(TOKEN_FILE)]
    # ssh reads % as the start of one of its own tokens.
    option = "ProxyCommand=" + shlex.join(proxy).replace("%", "%%")
    line = shlex.join(["ssh", "-o", option, f"{getpass.getuser()}@{CLIENT_NAME}"])
    text = f"\nThe relay runs. In another terminal:\n\n  {line}\n\nCtrl-C here ends it."
    with socket.socket() as sock:
        sock.settimeout(1)
        if sock.connect_ex(("127.0.0.1", ssh_port)) != 0:
            text += (
                f"\n\nNote: nothing listens on port {ssh_port} here, so ssh has no target."
                "\nStart an SSH server (Debian: apt install openssh-server), or name its port:"
                "\nmake run SSH_PORT=2222"
            )
    return text + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="of the server (%(default)s)")
    parser.add_argument("--ssh-port", type=int, default=22, help="of this machine's sshd")
    args = parser.parse_args()
    demo = Demo()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, demo.on_signal)
    try:
        demo.run(args.port, args.ssh_port)
    except DemoError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    finally:
        demo.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
