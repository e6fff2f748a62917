"""Dials: names, staggered addresses, HTTP CONNECT proxies and TLS, under one deadline.

websocket-client's own connect is not used: its timeout is for one read, a dead first address
fails the dial, a redirect gets the secrets, and NO_PROXY is matched loosely.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from http_network_relay.dial.deadline import STAGGER_S, Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.http_proxy import connect_through, proxy_for
from http_network_relay.dial.names import resolve
from http_network_relay.wire.errors import DialError, RelayError


def dial_tcp(
    host: str,
    port: int,
    deadline: Deadline,
    allows: Callable[[str], bool] = lambda _: True,
) -> socket.socket:
    """Return a blocking socket, connected to the first address that answers.

    Another address is tried every 250 ms, or at once when one fails. `allows` says whether an
    address may be dialled. Raises DialError.
    """
    found = resolve(host, port, deadline)
    infos = [info for info in found if allows(info[4][0])]
    if found and not infos:
        raise DialError("denied", f"the client does not dial {host}:{port}")
    last: OSError | None = None
    next_at = 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                deadline.check(f"{host}:{port} did not answer")
                now = time.monotonic()
                pending = len(selector.get_map())
                if not infos and not pending:
                    raise _dial_error(last, host, port)
                if infos and (now >= next_at or not pending):
                    error = _begin(infos.pop(0), selector)
                    last, next_at = error or last, 0.0 if error else now + STAGGER_S
                    continue
                for key, _ in selector.select(deadline.slice_s()):
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
    """Begin to connect, and register the socket; return the error of a failed beginning."""
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
    # macOS refuses options on a socket that the peer has reset; the first read fails then.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A connection to a host that has vanished ends after about two minutes.
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


def dial_server(
    endpoint: Endpoint,
    context: ssl.SSLContext | None,
    environ: Mapping[str, str],
    deadline: Deadline,
) -> socket.socket:
    """Return a connected, non-blocking socket, after the TLS handshake if the URL asks for TLS.

    Raises RelayError.
    """
    proxy = proxy_for(endpoint, environ)
    host, port = (proxy.host, proxy.port) if proxy else (endpoint.host, endpoint.port)
    what = "the HTTP proxy" if proxy else "the server"
    try:
        sock = dial_tcp(host, port, deadline)
    except DialError as exc:
        code = "proxy_failed" if proxy else "server_unreachable"
        raise RelayError(code, f"cannot reach {what}: {exc}") from exc
    try:
        sock.setblocking(False)
        if proxy:
            connect_through(sock, proxy, endpoint, deadline)
        if endpoint.is_tls:
            sock = _start_tls(sock, endpoint, context or make_context(None), deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def make_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that always verifies; `ca_file` adds a private CA. Raises RelayError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            reason = exc.strerror or "no certificate in it"
            raise RelayError("usage", f"--ca-file {ca_file} cannot be used: {reason}") from exc
    return context


def _start_tls(
    sock: socket.socket, endpoint: Endpoint, context: ssl.SSLContext, deadline: Deadline
) -> ssl.SSLSocket:
    what = f"TLS with {endpoint.host}:{endpoint.port}"
    tls: socket.socket = sock
    try:
        # After a reset, wrap_socket() fails too, but leaves a socket open.
        sock.getpeername()
        tls = context.wrap_socket(
            sock, server_hostname=endpoint.host, do_handshake_on_connect=False
        )
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                deadline.wait_ready(tls, write=False, what=what)
            except ssl.SSLWantWriteError:
                deadline.wait_ready(tls, write=True, what=what)
            else:
                return tls
    except ssl.SSLCertVerificationError as exc:
        tls.close()
        raise RelayError(
            "tls_failed",
            f"the certificate of {endpoint.host} is not trusted ({exc.verify_message});"
            " a private CA is added with --ca-file",
        ) from exc
    # ValueError: a name that no certificate can have.
    except (OSError, ValueError) as exc:
        tls.close()
        reason = getattr(exc, "strerror", None) or exc
        raise RelayError("tls_failed", f"{what} failed: {reason}; check --server-url") from exc
    except BaseException:
        tls.close()
        raise
