"""The sides of the comparison: plain TCP, the stock hop, and a checkout of the relay."""

import secrets
import socket
import sys
import time
from pathlib import Path

import websocket

from benchmarks.processes import HERE, environment, start_program
from benchmarks.side import DEADLINE_S, IdleOrder, Road, Side, Tunnel
from tests.support.processes import CLIENT_NAME, CLIENT_SECRET, TOKEN, Proc
from tests.support.raw import CLIENT_PATH, SUBPROTOCOL, RawUser


class Plain(Side):
    """A TCP connection from the driver to the target."""

    name = "plain"

    def __init__(self, road: Road | None, ports: list[int]) -> None:
        super().__init__(road)
        self._ports = ports

    def start(self) -> None:
        # Target's port -> the port to dial: the link's port, or the target's without a link.
        self._nearer = dict(zip(self._ports, self.start_link(*self._ports), strict=True))

    def argv(self, port: int) -> list[str]:
        return [sys.executable, str(HERE / "pipe.py"), str(self._nearer[port])]

    def flow_args(self, port: int) -> list[str]:
        return ["tcp", f"127.0.0.1:{self._nearer[port]}"]

    def tunnel(self, port: int) -> Tunnel:
        sock = socket.create_connection(("127.0.0.1", self._nearer[port]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = sock.detach()
        return Tunnel(fd, fd, None)

    def open_once(self, port: int) -> float:
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)):
            return time.monotonic() - begun

    def idle_server(self) -> tuple[int, IdleOrder]:
        process, (port,) = start_program("target.py")
        self.stack.enter_context(process)
        return process.pid, {"port": port, "request": "echo\n", "login": "", "answer": "ok"}


class Stock(Side):
    """The hop of the stock libraries in stock.py."""

    name = "stock"

    def start(self) -> None:
        scheme, port = self.front(self.start_server(HERE, "stock:app"))
        self.url = f"{scheme}://127.0.0.1:{self.start_link(port)[0]}"

    def argv(self, port: int) -> list[str]:
        ca_file = [str(self.ca_file)] if self.ca_file else []
        return [sys.executable, str(HERE / "stock.py"), f"{self.url}/tcp/{port}", *ca_file]

    def open_once(self, port: int) -> float:
        ws = websocket.create_connection(f"{self.url}/tcp/{port}", timeout=DEADLINE_S)
        begun = time.monotonic()
        ws.send_binary(b"echo\n")
        ws.recv()
        seconds = time.monotonic() - begun
        ws.close()
        return seconds

    def idle_server(self) -> tuple[int, IdleOrder]:
        assert self.server is not None
        return self.server.pid, upgrade(self.url, "/idle", "", "")


class Tree(Side):
    """A checkout of the relay: the server, the client, the proxy command."""

    def __init__(
        self, name: str, root: Path, road: Road | None = None, threads: int = 64, clients: int = 0
    ) -> None:
        super().__init__(road, threads)
        self.name, self.root = name, root
        self.clients = clients  # number of idle clients in the credentials

    def start(self) -> None:
        scheme, port = self.front(self.start_server(self.root, "wsgi:app"))
        # Only the client dials through the link: a device behind a slow line.
        self.url = f"{scheme}://127.0.0.1:{port}"
        client_url = f"{scheme}://127.0.0.1:{self.start_link(port)[0]}"
        argv = [sys.executable, "-m", "client", "--server-url", client_url]
        argv += ["--client-name", CLIENT_NAME, *self.ca_args()]
        env = environment(self.root, HTTP_NETWORK_RELAY_CLIENT_SECRET=CLIENT_SECRET)
        self.client = self.stack.enter_context(Proc(argv, env=env, cwd=self.root))
        self.client.wait_for_line("registered", 20.0)

    def ca_args(self) -> list[str]:
        return ["--ca-file", str(self.ca_file)] if self.ca_file else []

    def argv(self, port: int) -> list[str]:
        script = str(self.root / "ssh_proxy_command.py")
        target = [CLIENT_NAME, "127.0.0.1", str(port), "tcp"]
        return [sys.executable, script, *target, "--server-url", self.url, *self.ca_args()]

    def env(self) -> dict[str, str]:
        return environment(self.root, HTTP_NETWORK_RELAY_SECRET_KEY=TOKEN)

    def credentials(self) -> object:
        clients = {CLIENT_NAME: CLIENT_SECRET}
        clients |= {f"idle-{number}": CLIENT_SECRET for number in range(self.clients)}
        return {"clients": clients, "proxy_users": [TOKEN]}

    def open_once(self, port: int) -> float:
        with RawUser(self.url) as user:
            begun = time.monotonic()
            user.send_open(port=port, tunnel_id=secrets.token_hex(16))
            user.recv_control("opened")
            return time.monotonic() - begun

    def idle_server(self) -> tuple[int, IdleOrder]:
        assert self.server is not None
        headers = (
            "Authorization: Basic {login}\r\n"
            "HTTP-Network-Relay-Instance: {n}\r\n"
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n"
        )
        return self.server.pid, upgrade(
            self.url, CLIENT_PATH, headers, f"idle-{{n}}:{CLIENT_SECRET}"
        )


def upgrade(url: str, path: str, headers: str, login: str) -> IdleOrder:
    """Return the order for idle WebSockets."""
    address = url.partition("://")[2]
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
    port = int(address.partition(":")[2])
    return {"port": port, "request": request, "login": login, "answer": "HTTP/1.1 101"}
