"""HTTP CONNECT proxies: which proxy the environment names, and the way through it."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.names import parse_address
from http_network_relay.wire.errors import RelayError

# The head of a proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024


class Proxy(NamedTuple):
    """An HTTP CONNECT proxy."""

    host: str
    port: int
    authorization: str | None


def proxy_for(endpoint: Endpoint, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy for this server. Raises RelayError for one that cannot be used."""
    names = ("https_proxy", "HTTPS_PROXY") if endpoint.is_tls else ("http_proxy", "HTTP_PROXY")
    for name in (*names, "all_proxy", "ALL_PROXY"):
        if value := environ.get(name, "").strip():
            break
    else:
        return None
    no_proxy = environ.get("no_proxy", "") or environ.get("NO_PROXY", "")
    if bypasses_proxy(endpoint.host, endpoint.port, no_proxy):
        return None
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or parts.scheme != "http":
        raise RelayError(
            "usage", f"{name} is not a usable proxy: only http://HOST:PORT is (HTTP CONNECT)"
        )
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        # The environment's own bytes, which need not be UTF-8.
        encoded = base64.b64encode(pair.encode("utf-8", "surrogateescape"))
        authorization = f"Basic {encoded.decode()}"
    return Proxy(host, port or 80, authorization)


def bypasses_proxy(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names this host.

    `example.com` and `.example.com` mean the name and its subdomains, never notexample.com.
    An address means itself, a network in CIDR form its addresses, `host:port` one port,
    `*` every host.
    """
    host = host.lower().rstrip(".")
    address = parse_address(host)
    for raw in no_proxy.lower().split(","):
        entry, entry_port = _split_port(raw.strip())
        if not entry or entry_port not in (None, port):
            continue
        if entry == "*":
            return True
        if address is not None:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry, strict=False):
                    return True
            continue
        suffix = entry.strip(".")
        if suffix and (host == suffix or host.endswith(f".{suffix}")):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int | None]:
    """Split `host:port` and `[v6]:port`; an IPv6 literal alone has no port."""
    found = re.fullmatch(r"\[([^]]*)]?(.*)|([^:]*)(:[^:]*)", entry)
    if found is None:
        return entry, None
    name, port = found[1] or found[3] or "", found[2] or found[4] or ":"
    if port == ":":
        return name, None
    # -1 is no server's port: a malformed entry matches nothing.
    return name, int(port[1:]) if re.fullmatch(r":[0-9]{1,5}", port) else -1


def printable(text: str) -> str:
    """Return at most 300 characters of a peer's text, none of which moves a cursor."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def connect_through(
    sock: socket.socket, proxy: Proxy, endpoint: Endpoint, deadline: Deadline
) -> None:
    """Ask the proxy for a way to the server (RFC 9110, 9.3.6). Raises RelayError."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [f"CONNECT {host}:{endpoint.port} HTTP/1.1", f"Host: {host}:{endpoint.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    what = f"the HTTP proxy {proxy.host}:{proxy.port}"
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii", "replace")
    head = b""
    try:
        deadline.wait_ready(sock, write=True, what=what)
        sock.send(request)  # An empty send buffer takes the whole request.
        while not head.endswith(b"\r\n\r\n"):
            deadline.wait_ready(sock, write=False, what=what)
            # One byte at a time: the server's own bytes follow the head.
            piece = sock.recv(1)
            if not piece or len(head) > _MAX_HEAD_BYTES:
                raise RelayError("proxy_failed", f"{what} ended the connection")
            head += piece
    except OSError as exc:
        raise RelayError("proxy_failed", f"{what} failed: {exc.strerror or exc}") from exc
    status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(status) < 2 or not status[0].startswith("HTTP/1.") or not status[1].startswith("2"):
        said = printable(" ".join(status[1:])) or "something that is not HTTP"
        raise RelayError("proxy_failed", f"{what} answered {said} to CONNECT {host}")
