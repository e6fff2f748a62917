"""Programs of Debian packages: which are installed, and real ones that tests start.

Each runs in a folder of its own, without root. The system's own sshd, nginx and tinyproxy are
not touched.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import ROOT, Proc, child_environment, wait_listening

# The programs of each package; the Makefile's DEBIAN_PACKAGES installs the packages.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "git": ("git",),
    "iproute2": ("ss",),
    "netcat-openbsd": ("nc",),
    "nginx": ("nginx",),
    "openssh-client": ("ssh", "scp", "sftp", "ssh-keygen"),
    "openssh-server": ("sshd",),
    "openssl": ("openssl",),
    "procps": ("ps",),
    "rsync": ("rsync",),
    "tinyproxy": ("tinyproxy",),
}
PYTHON_WEBSOCKET = Path("/usr/lib/python3/dist-packages/websocket/__init__.py")

# On Debian a user's PATH lacks the folder of sshd and nginx.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """The absolute path of a program; FileNotFoundError if it is not installed."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed; run `make setup-debian`")
    return path


def is_installed(package: str) -> bool:
    """Return whether a package of PROGRAMS, or python3-websocket, is installed."""
    if package == "python3-websocket":
        return PYTHON_WEBSOCKET.exists()
    return all(shutil.which(name, path=_PATH) for name in PROGRAMS[package])


def missing_packages(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if not is_installed(package)]


@dataclass
class Sshd:
    """A real sshd of the current user on a port of its own, with a key that may log in."""

    process: Proc
    port: int
    key: Path
    user: str
    options: list[str]  # for ssh, scp (-o and -i only) and GIT_SSH_COMMAND

    @property
    def log(self) -> str:
        return self.process.text

    def ssh_argv(
        self, proxy: Sequence[str], *command: str, options: Sequence[str] = (), host: str = "device"
    ) -> list[str]:
        """`ssh` through the ProxyCommand `proxy` (an argument list), running `command`."""
        proxy_option = ["-o", f"ProxyCommand={proxy_command(proxy)}"]
        ssh = [program("ssh"), *self.options, *proxy_option, *options]
        return [*ssh, f"{self.user}@{host}", *command]

    def transport(self, proxy: Sequence[str]) -> str:
        """The ssh command line without a host, for `rsync -e` and GIT_SSH_COMMAND."""
        proxy_option = ["-o", f"ProxyCommand={proxy_command(proxy)}"]
        return shlex.join([program("ssh"), *self.options, *proxy_option])


def proxy_command(argv: Sequence[str]) -> str:
    """An argument list as the value of ssh's ProxyCommand: a shell line, with %% for %.

    The tokens %h, %p, %r and %n, alone as an argument, stay for ssh to fill in.
    """
    tokens = ("%h", "%p", "%r", "%n")
    # ssh puts `exec` before the line, so ssh's signals reach the program and not a shell.
    return " ".join(arg if arg in tokens else shlex.quote(arg).replace("%", "%%") for arg in argv)


@contextmanager
def run_sshd(folder: Path, *, config: str = "") -> Iterator[Sshd]:
    """A real sshd with its own host key, user key and configuration (`config` goes first)."""
    folder.mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        _run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
    if os.geteuid() == 0:
        # Where sshd of root keeps its privilege separation; Debian makes it at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    config_file = folder / "sshd_config"
    config_file.write_text(
        f"{config}\n"
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/user_key.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "Subsystem sftp internal-sftp\nLogLevel VERBOSE\nUseDNS no\nPrintMotd no\n"
        "MaxStartups 500\nMaxSessions 100\n"
    )
    known_hosts = folder / "known_hosts"
    known_hosts.write_text("relay-test " + (folder / "host_key.pub").read_text())
    options = ["-F", "/dev/null", "-i", str(folder / "user_key")]
    for option in (
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        f"UserKnownHostsFile={known_hosts}",
        "GlobalKnownHostsFile=/dev/null",
        "HostKeyAlias=relay-test",
        "LogLevel=ERROR",
    ):
        options += ["-o", option]
    # sshd starts itself again for each connection, and requires an absolute path.
    with Proc([program("sshd"), "-D", "-e", "-f", str(config_file)]) as process:
        # Do not connect to find out: the log must show the test's connections alone.
        process.wait_for_line("^Server listening on")
        user = getpass.getuser()
        yield Sshd(process, port, folder / "user_key", user, options)


@dataclass
class Nginx:
    """A real nginx that ends TLS in front of a relay, with the project's own example."""

    process: Proc
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"wss://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Its error log."""
        return self.process.text


@contextmanager
def run_nginx_tls(
    folder: Path,
    upstream_port: int,
    cert: Path,
    key: Path,
    *,
    replace: dict[str, str] | None = None,
) -> Iterator[Nginx]:
    """nginx with deploy/nginx.conf in its http block, made to fit this machine.

    `replace` changes more of the example's text, such as {"60s": "1s"}.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "/etc/ssl/relay.example/fullchain.pem": str(cert),
        "/etc/ssl/relay.example/privkey.pem": str(key),
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{upstream_port};",
        **(replace or {}),
    }.items():
        assert old in site, f"deploy/nginx.conf has no {old!r} any more"
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    # As root, its workers would become a user who may not enter the test's folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temp_paths = "".join(f"    {name}_temp_path {folder}/{name};\n" for name in names)
    (folder / "nginx.conf").write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr;\n"
        "events { worker_connections 8192; }\n"
        f"http {{\n    access_log {folder}/access.log;\n{temp_paths}"
        f"    include {folder}/site.conf;\n}}\n"
    )
    argv = [program("nginx"), "-p", str(folder), "-c", f"{folder}/nginx.conf", "-e", "stderr"]
    with Proc(argv) as process:
        wait_listening(process, port)
        yield Nginx(process, port, folder)


@dataclass
class Tinyproxy:
    """A real HTTP CONNECT proxy."""

    process: Proc
    port: int
    user: str | None
    password: str | None

    @property
    def url(self) -> str:
        """Return the URL for HTTPS_PROXY, with user and password if the proxy requires them."""
        login = f"{self.user}:{self.password}@" if self.user else ""
        return f"http://{login}127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.process.text


@contextmanager
def run_tinyproxy(
    folder: Path, *, user: str | None = None, password: str | None = None
) -> Iterator[Tinyproxy]:
    """A tinyproxy that allows CONNECT to every port; with `user`, it requires a password."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    config_file = folder / "tinyproxy.conf"
    login = f"BasicAuth {user} {password}\n" if user else ""
    config_file.write_text(
        f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 600\nMaxClients 100\n"
        f"LogLevel Connect\n{login}"
    )
    with Proc([program("tinyproxy"), "-d", "-c", str(config_file)]) as process:
        wait_listening(process, port)
        yield Tinyproxy(process, port, user, password)


def _run(argv: list[str]) -> None:
    result = subprocess.run(argv, env=child_environment(), capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: {result.stderr}")
