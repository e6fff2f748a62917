"""Peers that send single messages of the wire as a test asks, valid or not.

All calls block; frames are websocket-client's. A peer answers pings alone, and only inside `recv`.
One thread may send while another receives, except over TLS.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import websocket
from websocket import ABNF

from tests.support.processes import CLIENT_NAME, CLIENT_SECRET, TOKEN
from tests.support.secrecy import note_secrets

R = TypeVar("R", bound="RawPeer")

SUBPROTOCOL = "http-network-relay.v1"
CLIENT_PATH = "/ws_for_clients"
USER_PATH = "/ws_for_ssh_proxy_command"
INSTANCE = "00112233445566778899aabbccddeeff"
# On the request of a user leg that comes to resume this tunnel.
TUNNEL_HEADER = "HTTP-Network-Relay-Tunnel"

Message = (
    tuple[Literal["text"], dict[str, Any]]
    | tuple[Literal["binary"], bytes]
    | tuple[Literal["close"], int, str]
)

# Limit of steps that take no time, such as a frame's rest or the upgrade.
_IO_TIMEOUT_S = 10.0
# RFC 6455, 7.1.5: the code of a connection that ended without a close frame.
ABNORMAL = 1006


def user_headers(token: str = TOKEN) -> dict[str, str]:
    note_secrets(token)
    return {"Authorization": f"Bearer {token}"}


def client_headers(
    name: str = CLIENT_NAME, secret: str = CLIENT_SECRET, instance: str = INSTANCE
) -> dict[str, str]:
    note_secrets(secret)
    basic = base64.b64encode(f"{name}:{secret}".encode()).decode()
    return {"Authorization": f"Basic {basic}", "HTTP-Network-Relay-Instance": instance}


def connect(
    url: str, *, ca_file: str | None = None, timeout_s: float = _IO_TIMEOUT_S
) -> socket.socket:
    """A TCP or TLS connection to the host of `url`, past every proxy setting."""
    parts = urlsplit(url)
    is_tls = parts.scheme in ("wss", "https")
    assert parts.hostname is not None
    port = parts.port or (443 if is_tls else 80)
    sock = socket.create_connection((parts.hostname, port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not is_tls:
        return sock
    context = ssl.create_default_context(cafile=ca_file)
    try:
        return context.wrap_socket(sock, server_hostname=parts.hostname)
    except BaseException:
        sock.close()
        raise


class RawPeer:
    """One WebSocket into the server. Raises websocket.WebSocketException if it is refused."""

    def __init__(
        self,
        url: str,
        path: str,
        headers: Mapping[str, str],
        *,
        subprotocols: list[str] | None = None,
        ca_file: str | None = None,
        answers_pings: bool = True,
    ) -> None:
        self.answers_pings = answers_pings
        self.pings_seen = 0
        self.pongs_seen = 0
        self._rest = b""
        self._rest_opcode = ABNF.OPCODE_CONT
        self.sock = connect(url, ca_file=ca_file)
        try:
            self.ws = websocket.WebSocket(enable_multithread=True)
            self.ws.settimeout(_IO_TIMEOUT_S)
            self.ws.connect(  # type: ignore[no-untyped-call]  # partly without annotations
                url.rstrip("/") + path,
                socket=self.sock,
                header=dict(headers),
                subprotocols=[SUBPROTOCOL] if subprotocols is None else subprotocols,
                redirect_limit=0,
                suppress_origin=True,
            )
        except BaseException:
            self.sock.close()
            raise

    @property
    def subprotocol(self) -> str | None:
        """What the server chose."""
        chosen: str | None = self.ws.getsubprotocol()
        return chosen

    def send_control(self, control: Mapping[str, Any]) -> None:
        """One text message with `control` as JSON."""
        self.send_text(json.dumps(control))

    def send_text(self, text: str | bytes) -> None:
        """One text message, JSON or not, UTF-8 or not."""
        data = text.encode() if isinstance(text, str) else text
        self.send_raw_frame(ABNF.OPCODE_TEXT, data)

    def send_binary(self, data: bytes) -> None:
        self.send_raw_frame(ABNF.OPCODE_BINARY, data)

    def send_raw_frame(
        self,
        opcode: int,
        payload: bytes = b"",
        *,
        fin: bool = True,
        rsv: int = 0,
        mask: bool = True,
    ) -> None:
        """One frame, well-formed or not; `rsv` is the three reserved bits as a number."""
        self.send_bytes(encode_frame(opcode, payload, fin=fin, rsv=rsv, mask=mask))

    def send_bytes(self, data: bytes) -> None:
        """Send raw bytes, such as half a frame. No other thread may send meanwhile."""
        self.sock.sendall(data)

    def ping(self, payload: bytes = b"") -> None:
        self.send_raw_frame(ABNF.OPCODE_PING, payload)

    def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until the server has acted on all earlier messages; no message may come meanwhile.

        The server reads a leg in order, so its pong proves that.
        """
        pongs = self.pongs_seen
        self.ping()
        deadline = time.monotonic() + timeout_s
        while self.pongs_seen == pongs:
            self._wait_readable(deadline)
            frame = self.ws.recv_frame()  # type: ignore[no-untyped-call]  # as above
            assert frame.opcode == ABNF.OPCODE_PONG, f"unexpected {frame}"
            self.pongs_seen += 1

    def recv(self, timeout_s: float = 5.0) -> Message:
        """The next message: ("text", object), ("binary", bytes) or ("close", code, reason).

        Answers pings on the way. An end without a close frame is ("close", 1006, "eof" or
        "reset"). Raises TimeoutError when nothing came.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._wait_readable(deadline)
            try:
                frame = self.ws.recv_frame()  # type: ignore[no-untyped-call]  # as above
            except websocket.WebSocketConnectionClosedException:
                return ("close", ABNORMAL, "eof")
            except (OSError, websocket.WebSocketTimeoutException):
                return ("close", ABNORMAL, "reset")
            data: bytes = frame.data
            if frame.opcode == ABNF.OPCODE_PING:
                self.pings_seen += 1
                if self.answers_pings:
                    self.send_raw_frame(ABNF.OPCODE_PONG, data)
            elif frame.opcode == ABNF.OPCODE_PONG:
                self.pongs_seen += 1
            elif frame.opcode == ABNF.OPCODE_CLOSE:
                code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 1005
                return ("close", code, data[2:].decode())
            else:
                if frame.opcode != ABNF.OPCODE_CONT:
                    self._rest_opcode = frame.opcode
                self._rest += data
                if frame.fin:
                    whole, self._rest = self._rest, b""
                    if self._rest_opcode == ABNF.OPCODE_TEXT:
                        return ("text", json.loads(whole))
                    return ("binary", whole)

    def recv_control(self, kind: str | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
        """The next message, which must be a control, of type `kind` if given."""
        message = self.recv(timeout_s)
        assert message[0] == "text", f"expected a control, got {message!r}"
        assert kind is None or message[1]["type"] == kind, f"expected {kind}, got {message[1]}"
        return message[1]

    def recv_binary(self, timeout_s: float = 5.0) -> bytes:
        """The next message, which must be binary."""
        message = self.recv(timeout_s)
        assert message[0] == "binary", f"expected bytes, got {message!r}"
        return message[1]

    def recv_close(self, timeout_s: float = 5.0) -> tuple[int, str]:
        """The code and reason of the close, past any other message before it."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.recv(deadline - time.monotonic())
            if message[0] == "close":
                return message[1], message[2]

    def expect_nothing(self, for_s: float) -> None:
        """Raise AssertionError if a message comes within `for_s`."""
        try:
            message = self.recv(for_s)
        except TimeoutError:
            return
        raise AssertionError(f"unexpected {message!r}")

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame and end the connection. Idempotent."""
        if self.sock.fileno() != -1:
            with contextlib.suppress(OSError):
                self.send_raw_frame(ABNF.OPCODE_CLOSE, code.to_bytes(2, "big") + reason.encode())
            self.drop()

    def drop(self) -> None:
        """End the connection without a close frame."""
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown(), which takes the TLS object away from another thread.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        self.sock.close()

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_readable(self, deadline: float) -> None:
        # poll() does not see bytes that TLS has decrypted already.
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("no message")


class RawUser(RawPeer):
    """A user leg: one tunnel. `resumes` is the tunnel that its request names."""

    def __init__(
        self,
        url: str,
        token: str = TOKEN,
        *,
        resumes: str | None = None,
        headers: Mapping[str, str] | None = None,
        ca_file: str | None = None,
        answers_pings: bool = True,
    ) -> None:
        super().__init__(
            url,
            USER_PATH,
            {
                **user_headers(token),
                **({} if resumes is None else {TUNNEL_HEADER: resumes}),
                **(headers or {}),
            },
            ca_file=ca_file,
            answers_pings=answers_pings,
        )

    def send_open(
        self,
        *,
        client: str = CLIENT_NAME,
        host: str = "127.0.0.1",
        port: int = 22,
        tunnel_id: str = "0" * 31 + "1",
        limit: int = 262_144,
        **fields: Any,
    ) -> None:
        """`open` with every field of the protocol; `fields` replace or add."""
        self.send_control(
            {
                "type": "open",
                "client": client,
                "host": host,
                "port": port,
                "protocol": "tcp",
                "tunnel_id": tunnel_id,
                "resume_token": "0" * 64,
                "limit": limit,
                "grace_s": 0,
                **fields,
            }
        )

    def send_resume(
        self, *, attempt: int = 1, received: int = 0, delivered: int = 0, **fields: Any
    ) -> None:
        """`resume` with every field of the protocol; `fields` as for `send_open`."""
        counts = {"attempt": attempt, "received": received, "delivered": delivered}
        self.send_open(**{"type": "resume", **counts, **fields})


class RawClient(RawPeer):
    """A client leg: a binary message has its channel in 4 bytes, a control in `channel`."""

    def __init__(
        self,
        url: str,
        name: str = CLIENT_NAME,
        secret: str = CLIENT_SECRET,
        *,
        instance: str = INSTANCE,
        headers: Mapping[str, str] | None = None,
        ca_file: str | None = None,
        answers_pings: bool = True,
    ) -> None:
        super().__init__(
            url,
            CLIENT_PATH,
            {**client_headers(name, secret, instance), **(headers or {})},
            ca_file=ca_file,
            answers_pings=answers_pings,
        )

    def send_on(self, channel: int, data: bytes) -> None:
        """Stream bytes on a channel."""
        self.send_binary(channel.to_bytes(4, "big") + data)

    def send_control_on(self, channel: int, kind: str, **fields: Any) -> None:
        """A control of type `kind` on a channel."""
        self.send_control({"type": kind, "channel": channel, **fields})

    def send_opened(self, channel: int, *, limit: int = 262_144, grace_s: int = 0) -> None:
        self.send_control_on(channel, "opened", limit=limit, grace_s=grace_s)

    def send_resumed(
        self, channel: int, *, received: int = 0, delivered: int = 0, limit: int = 262_144
    ) -> None:
        counts = {"received": received, "delivered": delivered, "limit": limit}
        self.send_control_on(channel, "resumed", **counts)

    def recv_on(self, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """The next message, which must be binary, as (channel, bytes)."""
        data = self.recv_binary(timeout_s)
        assert len(data) >= 4, f"no channel in {data!r}"
        return int.from_bytes(data[:4], "big"), data[4:]


def encode_frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True
) -> bytes:
    """A WebSocket frame of any shape (RFC 6455, 5.2), its mask all zeros."""
    head = bytearray([(fin << 7) | (rsv << 4) | opcode])
    mask_bit = mask << 7
    if len(payload) < 126:
        head.append(mask_bit | len(payload))
    elif len(payload) < 65536:
        head += bytes([mask_bit | 126]) + len(payload).to_bytes(2, "big")
    else:
        head += bytes([mask_bit | 127]) + len(payload).to_bytes(8, "big")
    return bytes(head) + (bytes(4) if mask else b"") + payload


@dataclass(frozen=True)
class Handshake:
    """The answer to an upgrade request; header names in lower case, `body` empty after a 101."""

    status: int
    status_line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def upgrade_request(url: str, headers: Mapping[str, str]) -> bytes:
    """The request head of a WebSocket upgrade; `headers` replace and add, "" removes."""
    parts = urlsplit(url)
    all_headers = {
        "Host": parts.netloc,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": SUBPROTOCOL,
        **headers,
    }
    lines = [f"GET {parts.path or '/'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in all_headers.items() if value]
    return "\r\n".join([*lines, "", ""]).encode()


def handshake_status(
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float = 5.0,
    ca_file: str | None = None,
) -> Handshake:
    """Ask for an upgrade at `url` (with its path) through a plain socket; return the answer.

    The connection is ended afterwards, also an accepted one. OSError when there is no answer.
    """
    with contextlib.closing(connect(url, ca_file=ca_file, timeout_s=timeout_s)) as sock:
        sock.sendall(upgrade_request(url, headers or {}))
        return read_handshake(sock)


def read_handshake(sock: socket.socket) -> Handshake:
    """Read one HTTP answer's head from `sock`, and its body unless it is a 101."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(4096)
        if not more:
            raise ConnectionError(f"the connection ended after {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    status = int(status_line.split(" ", 2)[1])
    if status == 101:
        return Handshake(status, status_line, headers, b"")
    wanted = int(headers.get("content-length", 1 << 30))
    while len(body) < wanted:
        more = sock.recv(4096)
        if not more:
            break
        body += more
    return Handshake(status, status_line, headers, body)
