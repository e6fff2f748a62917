"""Dials: names, staggered addresses, HTTP CONNECT proxies and TLS, under one deadline.

websocket-client's own connect is not used: it has a timeout for each read, tries one
address, sends secrets to where a redirect points, and reads proxy settings loosely.
A deadline is a time of time.monotonic(), made once and passed down.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from client.duplex import wait_ready
from client.errors import DialError, RelayError

# RFC 8305, "Connection Attempt Delay": a dead first address costs this much.
_STAGGER_S = 0.250
# Name lookups cannot be interrupted, so they run in daemon threads; this many at most.
_lookup_slots = threading.BoundedSemaphore(32)
# A proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024


class Endpoint(NamedTuple):
    """Where a server is: what --server-url says."""

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


class Proxy(NamedTuple):
    """An HTTP CONNECT proxy."""

    host: str
    port: int
    authorization: str | None


def parse_server_url(url: str, default_path: str) -> Endpoint:
    """Read ws, wss, http and https URLs; one without a path gets `default_path`."""
    try:
        parts = urlsplit(url)
        port = parts.port
        # What getaddrinfo and TLS will do to it; `.example` and `a..b` fail there.
        _encode_name(parts.hostname or "")
    except ValueError as exc:
        # Not the URL itself: somebody may have put a password into it.
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


# Name lookup and TCP.


def resolve(
    host: str, port: int, deadline: float, is_cancelled: Callable[[], bool] = lambda: False
) -> list[Any]:
    """Return getaddrinfo's answers by turns of family. Raises DialError."""
    if _address(host.strip("[]")) is not None:
        # No lookup: an address must not wait behind names that hang.
        return _by_turns(_look_up(host, port))
    while not _lookup_slots.acquire(timeout=_slice_s(deadline)):
        _go_on(f"the name {host} could not be looked up", deadline, is_cancelled)
    answers: list[Any] = []
    is_done = threading.Event()

    def look_up() -> None:
        try:
            answers.append(_look_up(host, port))
        except (OSError, UnicodeError) as exc:
            answers.append(exc)
        finally:
            _lookup_slots.release()
            is_done.set()

    # Daemon: getaddrinfo has no timeout and nothing can wake it.
    thread = threading.Thread(target=look_up, name=f"lookup:{host}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _lookup_slots.release()
        raise
    while not is_done.wait(_slice_s(deadline)):
        _go_on(f"the name {host} could not be looked up", deadline, is_cancelled)
    (answer,) = answers
    if isinstance(answer, Exception):
        reason = getattr(answer, "strerror", None) or answer
        raise DialError("unknown", f"the name {host} is not known ({reason})") from answer
    return _by_turns(answer)


def _look_up(host: str, port: int) -> list[Any]:
    # An IPv6 literal may come in brackets, as it stands in a URL.
    name = _encode_name(host.strip("[]"))
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)


def _encode_name(name: str) -> bytes:
    """As Python's sockets do; to import the IDNA codec for every name takes a start 1 ms.

    Raises UnicodeError for what is no name.
    """
    labels = name.removesuffix(".").split(".")
    is_plain = name.isascii() and all(0 < len(label) < 64 for label in labels)
    return name.encode("ascii" if is_plain else "idna")


def _slice_s(deadline: float) -> float:
    """Return how long to wait before the next look at the deadline and a cancellation."""
    return max(0.0, min(_STAGGER_S, deadline - time.monotonic()))


def _go_on(failure: str, deadline: float, is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise DialError("cancelled", f"{failure} before the dial was cancelled")
    if time.monotonic() >= deadline:
        raise DialError("timeout", f"{failure} in time")


def _by_turns(infos: list[Any]) -> list[Any]:
    """Alternate the families, first family first (RFC 8305, 4)."""
    families: dict[int, list[Any]] = {}
    for info in infos:
        families.setdefault(info[0], []).append(info)
    turns: list[Any] = []
    while any(families.values()):
        turns += [group.pop(0) for group in families.values() if group]
    return turns


def dial_tcp(
    host: str,
    port: int,
    deadline: float,
    is_cancelled: Callable[[], bool] = lambda: False,
    allows: Callable[[str], bool] = lambda _: True,
) -> socket.socket:
    """Connect to the first address that answers; the socket comes back blocking.

    A new address is tried every 250 ms, or at once when one fails. `is_cancelled` is
    asked as often. `allows` says of each address whether it may be dialled. Raises DialError.
    """
    found = resolve(host, port, deadline, is_cancelled)
    infos = [info for info in found if allows(info[4][0])]
    if found and not infos:
        raise DialError("denied", f"the client does not dial {host}:{port}")
    last: OSError | None = None
    next_at = 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                _go_on(f"{host}:{port} did not answer", deadline, is_cancelled)
                now = time.monotonic()
                pending = len(selector.get_map())
                if not infos and not pending:
                    raise _dial_error(last, host, port)
                if infos and (now >= next_at or not pending):
                    error = _begin(infos.pop(0), selector)
                    last, next_at = error or last, 0.0 if error else now + _STAGGER_S
                    continue
                for key, _ in selector.select(_slice_s(deadline)):
                    sock: socket.socket = key.fileobj  # type: ignore[assignment]
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code == 0:
                        _set_options(sock)
                        return sock
                    sock.close()
                    last, next_at = OSError(code, errno.errorcode.get(code, "?")), 0.0
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]


def _begin(info: Any, selector: selectors.BaseSelector) -> OSError | None:
    """Start a connect; return why it could not even start."""
    family, kind, protocol, _, address = info
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        return exc
    sock.setblocking(False)
    try:
        sock.connect(address)
    except (BlockingIOError, InterruptedError):
        pass
    except OSError as exc:
        sock.close()
        return exc
    selector.register(sock, selectors.EVENT_WRITE)
    return None


def _set_options(sock: socket.socket) -> None:
    sock.setblocking(True)
    # macOS refuses options on a socket that the peer has reset already; its first use tells.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that vanished without a word ends its connection after about two minutes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _dial_error(error: OSError | None, host: str, port: int) -> DialError:
    code = error.errno if error is not None else None
    if code in (errno.ECONNREFUSED, getattr(errno, "WSAECONNREFUSED", -1)):
        return DialError("refused", f"{host}:{port} refused the connection")
    if code == errno.ETIMEDOUT:
        return DialError("timeout", f"{host}:{port} did not answer in time")
    reason = errno.errorcode.get(code, str(code)) if code else "no address"
    return DialError("unreachable", f"{host}:{port} cannot be reached ({reason})")


# Proxies from the environment.


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
    address = _address(host)
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


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


# The way to a server.


def dial_server(
    endpoint: Endpoint,
    context: ssl.SSLContext | None,
    environ: Mapping[str, str],
    deadline: float,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> socket.socket:
    """Return a connected, non-blocking socket, TLS done if the URL says so."""
    proxy = proxy_for(endpoint, environ)
    host, port = (proxy.host, proxy.port) if proxy else (endpoint.host, endpoint.port)
    what = "the HTTP proxy" if proxy else "the server"
    try:
        sock = dial_tcp(host, port, deadline, is_cancelled)
    except DialError as exc:
        code = "proxy_failed" if proxy else "server_unreachable"
        raise RelayError(code, f"cannot reach {what}: {exc}") from exc
    try:
        sock.setblocking(False)
        if proxy:
            _connect_through(sock, proxy, endpoint, deadline, is_cancelled)
        if endpoint.is_tls:
            context = context or make_context(None)
            sock = _start_tls(sock, endpoint, context, deadline, is_cancelled)
    except BaseException:
        sock.close()
        raise
    return sock


def make_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that verifies, always; `ca_file` adds a private CA."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            reason = exc.strerror or "no certificate in it"
            raise RelayError("usage", f"--ca-file {ca_file} cannot be used: {reason}") from exc
    return context


def source_address(peer: Any) -> str | None:
    """Return the address from which this machine reaches `peer` now; None: not at all.

    `peer` is as of getpeername(). No packet is sent and nothing waits: the kernel looks
    into its routes.
    """
    family = socket.AF_INET if len(peer) == 2 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def wait_until(
    sock: socket.socket,
    deadline: float,
    is_cancelled: Callable[[], bool] = lambda: False,
    *,
    write: bool,
    what: str,
) -> None:
    """Wait for the socket until the deadline; raises RelayError when it has passed."""
    while not wait_ready(sock, write=write, timeout_s=_slice_s(deadline)):
        if is_cancelled():
            raise RelayError("server_unreachable", f"the dial of {what} was cancelled")
        if time.monotonic() >= deadline:
            raise RelayError("server_unreachable", f"{what} did not answer in time")


def printable(text: str) -> str:
    """Nothing from the network may move a terminal's cursor or fill it."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _connect_through(
    sock: socket.socket,
    proxy: Proxy,
    endpoint: Endpoint,
    deadline: float,
    is_cancelled: Callable[[], bool],
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
        wait_until(sock, deadline, is_cancelled, write=True, what=what)
        sock.send(request)  # Fits into an empty send buffer whole.
        while b"\r\n\r\n" not in head:
            wait_until(sock, deadline, is_cancelled, write=False, what=what)
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


def _start_tls(
    sock: socket.socket,
    endpoint: Endpoint,
    context: ssl.SSLContext,
    deadline: float,
    is_cancelled: Callable[[], bool],
) -> ssl.SSLSocket:
    what = f"TLS with {endpoint.host}:{endpoint.port}"
    tls: socket.socket = sock
    try:
        sock.getpeername()  # Wrapping fails too if the peer has reset it, but leaves its mess.
        tls = context.wrap_socket(
            sock, server_hostname=endpoint.host, do_handshake_on_connect=False
        )
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                wait_until(tls, deadline, is_cancelled, write=False, what=what)
            except ssl.SSLWantWriteError:
                wait_until(tls, deadline, is_cancelled, write=True, what=what)
            else:
                return tls
    except ssl.SSLCertVerificationError as exc:
        tls.close()
        raise RelayError(
            "tls_failed",
            f"the certificate of {endpoint.host} is not trusted ({exc.verify_message});"
            " a private CA is added with --ca-file",
        ) from exc
    except (OSError, ValueError) as exc:  # ValueError: a name that cannot be in a certificate.
        tls.close()
        reason = getattr(exc, "strerror", None) or exc
        raise RelayError("tls_failed", f"{what} failed: {reason}; check --server-url") from exc
    except BaseException:
        tls.close()
        raise
