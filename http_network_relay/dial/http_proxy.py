"""HTTP CONNECT proxies: which one the environment names, and the way through it."""

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

# A proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024


class Proxy(NamedTuple):
    """An HTTP CONNECT proxy."""

    host: str
    port: int
    authorization: str | None


def proxy_for(endpoint: Endpoint, environ: Mapping[str, str]) -> Proxy | None:
    """Return the HTTP proxy that the environment names for this server, if any."""
    names = ("https_proxy", "HTTPS_PROXY") if endpoint.is_tls else ("http_proxy", "HTTP_PROXY")
    for name in (*names, "all_proxy", "ALL_PROXY"):
        value = environ.get(name, "").strip()
        if value:
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
        # As it stands in the environment, UTF-8 or not.
        authorization = (
            "Basic " + base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode()
        )
    return Proxy(host, port or 80, authorization)


def bypasses_proxy(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names this host, read exactly.

    `example.com` and `.example.com` stand for the name and what is below it, never for
    notexample.com; an address for itself; a network in CIDR form for its addresses;
    `host:port` for that port; `*` for all.
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
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
    elif entry.count(":") == 1:
        name, _, rest = entry.partition(":")
        rest = f":{rest}"
    else:
        return entry, None
    if rest in ("", ":"):
        return name, None
    # What is no port is the port of nobody.
    return name, int(rest[1:]) if re.fullmatch(r":[0-9]{1,5}", rest) else -1


def printable(text: str) -> str:
    """Nothing from the network may move a terminal's cursor or fill it."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def connect_through(
    sock: socket.socket, proxy: Proxy, endpoint: Endpoint, deadline: Deadline
) -> None:
    """Ask the proxy for a way to the server (RFC 9110, 9.3.6)."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [f"CONNECT {host}:{endpoint.port} HTTP/1.1", f"Host: {host}:{endpoint.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    what = f"the HTTP proxy {proxy.host}:{proxy.port}"
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii", "replace")
    head = b""
    try:
        deadline.wait_ready(sock, write=True, what=what)
        sock.send(request)  # Fits into an empty send buffer whole.
        while b"\r\n\r\n" not in head:
            deadline.wait_ready(sock, write=False, what=what)
            # One byte at a time past the end would eat the server's first bytes.
            piece = sock.recv(_head_step(head))
            if not piece or len(head) > _MAX_HEAD_BYTES:
                raise RelayError("proxy_failed", f"{what} ended the connection")
            head += piece
    except OSError as exc:
        raise RelayError("proxy_failed", f"{what} failed: {exc.strerror or exc}") from exc
    status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(status) < 2 or not status[0].startswith("HTTP/1.") or not status[1].startswith("2"):
        said = printable(" ".join(status[1:])) or "something that is not HTTP"
        raise RelayError("proxy_failed", f"{what} answered {said} to CONNECT {host}")


def _head_step(head: bytes) -> int:
    """Return how many bytes can be read without passing the blank line at the end."""
    for have in (3, 2, 1):
        if head.endswith(b"\r\n\r\n"[:have]):
            return 4 - have
    return 4
