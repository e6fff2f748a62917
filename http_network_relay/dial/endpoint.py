"""The server's address: the parsed --server-url."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

from http_network_relay.dial.names import encode_name
from http_network_relay.wire.errors import RelayError


class Endpoint(NamedTuple):
    """A server's address, and the path and query of its WebSocket."""

    is_tls: bool
    host: str
    port: int
    resource: str

    @property
    def url(self) -> str:
        """The WebSocket URL, without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.is_tls else 'ws'}://{host}:{self.port}{self.resource}"

    @property
    def is_loopback(self) -> bool:
        """Whether bytes in clear stay on this machine."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


def parse_server_url(url: str, default_path: str) -> Endpoint:
    """Read a ws, wss, http or https URL; a URL without a path gets `default_path`.

    Raises RelayError.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        # getaddrinfo and TLS encode the name too; `.example` and `a..b` would fail there.
        encode_name(parts.hostname or "")
    except ValueError as exc:
        # The message omits the URL, which may hold a password.
        raise RelayError("usage", "--server-url is not a URL: look at its host and port") from exc
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise RelayError(
            "usage", "--server-url must look like https://relay.example or ws://127.0.0.1:8000"
        )
    if parts.username is not None or parts.fragment:
        raise RelayError(
            "usage", "--server-url must have no user, password or #fragment; secrets have own flags"
        )
    is_tls = scheme == "wss"
    resource = default_path if parts.path in ("", "/") else parts.path
    if parts.query:
        resource += f"?{parts.query}"
    if not resource.isascii() or not resource.isprintable() or " " in resource:
        raise RelayError("usage", "--server-url has characters that must be %-encoded")
    return Endpoint(is_tls, parts.hostname, port or (443 if is_tls else 80), resource)
