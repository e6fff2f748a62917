"""Dials over real sockets: staggered addresses, one deadline, proxies, TLS."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from http_network_relay.dial import connect as dial
from http_network_relay.dial import names
from http_network_relay.dial.connect import dial_server, dial_tcp, make_context
from http_network_relay.dial.deadline import Deadline
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.names import resolve
from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.wire.errors import DialError, RelayError
from tests.support.certs import Certs
from tests.support.client.by_hand import HandServer, Visitor, hand_server, stay
from tests.support.ports import free_port
from tests.support.targets import EchoTarget, black_hole_port
from tests.support.waiting import eventually


def info(port: int, address: str = "127.0.0.1") -> Any:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every name lookup answers."""
    infos: list[Any] = []
    monkeypatch.setattr(dial, "resolve", lambda *_: list(infos))
    return infos


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result or the exception, and how long it took."""
    begun = time.monotonic()
    try:
        result: Any = call()
    except (DialError, RelayError) as exc:
        result = exc
    return result, time.monotonic() - begun


# Staggered addresses.


def test_dead_first_address_costs_a_quarter_second(addresses: list[Any]) -> None:
    """An IPv6 without a way out is the common case."""
    with black_hole_port() as hole, EchoTarget() as target:
        addresses += [info(hole), info(target.port)]
        sock, seconds = timed(lambda: dial_tcp("name", 1, Deadline(5.0)))
        with sock:
            assert sock.getpeername()[1] == target.port
    assert 0.24 <= seconds < 0.48


def test_two_dead_addresses_cost_half_a_second(addresses: list[Any]) -> None:
    """One more step each; all go on in parallel."""
    with black_hole_port() as hole, EchoTarget() as target:
        addresses += [info(hole), info(hole), info(target.port)]
        sock, seconds = timed(lambda: dial_tcp("name", 1, Deadline(5.0)))
        sock.close()
    assert 0.49 <= seconds < 0.74


def test_refused_first_address_costs_nothing(addresses: list[Any]) -> None:
    """The next is tried at once."""
    with EchoTarget() as target:
        # So many that the usual quarter second for each would be seen.
        addresses += [*[info(free_port())] * 8, info(target.port)]
        sock, seconds = timed(lambda: dial_tcp("name", 1, Deadline(5.0)))
        sock.close()
    assert seconds < 0.1


def test_address_that_cannot_even_be_begun_costs_nothing(addresses: list[Any]) -> None:
    """No route: connect() itself fails, while an earlier attempt is still under way."""
    no_family = (999, socket.SOCK_STREAM, 0, "", ("::1", 1))
    with black_hole_port() as hole, EchoTarget() as target:
        # So many that the usual quarter second for each would be seen.
        bad = [no_family] * 8
        addresses += [*bad, info(hole), *bad, info(target.port)]
        sock, seconds = timed(lambda: dial_tcp("name", 1, Deadline(5.0)))
        sock.close()
    assert 0.24 <= seconds < 0.48


def test_first_that_answers_wins_and_the_others_are_closed(addresses: list[Any]) -> None:
    """No descriptor is left, whichever way the dial ends."""
    with black_hole_port() as hole, EchoTarget() as target:
        addresses += [info(hole), info(target.port), info(hole)]
        before = len(os.listdir("/proc/self/fd"))
        dial_tcp("name", 1, Deadline(5.0)).close()
        addresses[:] = [info(hole), info(hole)]
        with pytest.raises(DialError):
            dial_tcp("name", 1, Deadline(0.3))
        # The target's thread closes its end a moment later.
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_socket_comes_back_ready_for_a_stream(addresses: list[Any]) -> None:
    """Blocking, without Nagle, with keepalive."""
    with EchoTarget() as target:
        addresses += [info(target.port)]
        with dial_tcp("name", 1, Deadline(5.0)) as sock:
            assert sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


# How a dial ends.


def test_deadline_holds_when_nothing_answers(addresses: list[Any]) -> None:
    """A dial of silence ends when it was said, as a timeout."""
    with black_hole_port() as hole:
        addresses += [info(hole), info(hole)]
        error, seconds = timed(lambda: dial_tcp("name", 9, Deadline(0.35)))
    assert (error.kind, str(error)) == ("timeout", "name:9 did not answer in time")
    assert 0.34 <= seconds < 0.8


def test_cancellation_is_seen_in_0_3_seconds(addresses: list[Any]) -> None:
    """A user who went away does not keep a dial."""
    with black_hole_port() as hole:
        addresses += [info(hole)]
        cancelled_at = time.monotonic() + 0.1
        error, seconds = timed(
            lambda: dial_tcp("name", 1, Deadline(5.0, lambda: time.monotonic() >= cancelled_at))
        )
    assert error.kind == "cancelled"
    assert seconds < 0.7


def test_cancellation_before_the_first_address_dials_nobody(addresses: list[Any]) -> None:
    """Not one SYN."""
    with EchoTarget() as target:
        addresses += [info(target.port)]
        error, _ = timed(lambda: dial_tcp("name", 1, Deadline(5.0, lambda: True)))
        assert error.kind == "cancelled"
        assert not target.conversations


def test_refused_port_is_told_as_refused() -> None:
    """The last error counts."""
    port = free_port()
    error, seconds = timed(lambda: dial_tcp("127.0.0.1", port, Deadline(5.0)))
    assert (error.kind, str(error)) == ("refused", f"127.0.0.1:{port} refused the connection")
    assert seconds < 0.2


def test_name_without_addresses_is_unreachable(addresses: list[Any]) -> None:
    """An empty answer is one."""
    error, _ = timed(lambda: dial_tcp("name", 1, Deadline(5.0)))
    assert error.kind == "unreachable"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.ENETUNREACH, "unreachable"),
        (errno.ETIMEDOUT, "timeout"),
        (errno.ECONNREFUSED, "refused"),
    ],
)
def test_kernels_reason_becomes_a_kind(
    addresses: list[Any], monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    """Each with a sentence that names the target."""
    addresses += [info(1)]

    def fail(*_: Any) -> Any:
        return OSError(number, os.strerror(number))

    monkeypatch.setattr(dial, "_begin", fail)
    error, _ = timed(lambda: dial_tcp("name", 7, Deadline(5.0)))
    assert error.kind == kind
    assert "name:7" in str(error)


# Name lookups.


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")]
)
def test_unknown_name_is_told_as_unknown(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """The resolver's reason stands in the sentence."""

    def look_up(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    error, _ = timed(lambda: dial_tcp("nobody.example", 1, Deadline(5.0)))
    assert error.kind == "unknown"
    assert "nobody.example" in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]", "localhost"])
def test_address_may_stand_in_brackets(host: str) -> None:
    """As it stands in a URL."""
    with EchoTarget() as target:
        dial_tcp(host, target.port, Deadline(5.0)).close()


@pytest.fixture
def stuck_lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """getaddrinfo stays away until the event is set; two lookups may run at once."""
    let_go = threading.Event()

    def look_up(*_: Any, **__: Any) -> Any:
        assert let_go.wait(10.0)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(names, "_lookup_slots", threading.BoundedSemaphore(2))
    yield let_go
    let_go.set()
    eventually(lambda: not lookups())  # They give the slots of this semaphore back.


def lookups() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lookup:")]


def test_stuck_lookup_ends_by_the_deadline(stuck_lookups: threading.Event) -> None:
    """Nothing can wake getaddrinfo, so it is left to its thread."""
    error, seconds = timed(lambda: resolve("slow.example", 1, Deadline(0.3)))
    assert error.kind == "timeout"
    assert "slow.example" in str(error)
    assert 0.29 <= seconds < 0.8


def test_stuck_lookups_are_bounded(stuck_lookups: threading.Event) -> None:
    """A broken resolver does not collect threads, and a free slot is used again."""
    errors = [timed(lambda: resolve("slow.example", 1, Deadline(0.02)))[0] for _ in range(5)]
    assert [error.kind for error in errors] == ["timeout"] * 5
    assert len(lookups()) == 2
    stuck_lookups.set()
    eventually(lambda: not lookups())
    assert resolve("quick.example", 1, Deadline(5.0)) == []


@pytest.mark.parametrize("free_slots", [2, 0])
def test_stuck_lookup_is_cancelled_in_0_3_seconds(
    stuck_lookups: threading.Event, free_slots: int
) -> None:
    """Whether the lookup is under way or waits for a slot of its own."""
    for _ in range(2 - free_slots):
        timed(lambda: resolve("slow.example", 1, Deadline(0.01)))
    cancelled_at = time.monotonic() + 0.05
    error, seconds = timed(
        lambda: resolve("slow.example", 1, Deadline(5.0, lambda: time.monotonic() >= cancelled_at))
    )
    assert error.kind == "cancelled"
    assert seconds < 0.7


# HTTP CONNECT.


def through(proxy: HandServer, deadline_s: float = 5.0, *, is_tls: bool = False) -> Any:
    name = "https_proxy" if is_tls else "http_proxy"
    environ = {name: f"http://us%65r:pass@127.0.0.1:{proxy.port}"}
    endpoint = Endpoint(is_tls, "relay.example", 443 if is_tls else 80, "/p")
    return timed(lambda: dial_server(endpoint, None, environ, Deadline(deadline_s)))


def test_connect_asks_for_the_way_and_eats_nothing_of_the_server() -> None:
    """Bytes in the very segment of the 200 are the server's."""
    server_bytes = b"SSH-2.0-server\r\n\r\nmore"

    def proxy(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.sock.sendall(b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\n" + server_bytes)
        visitor.wait_gone()

    with hand_server(proxy) as server:
        sock, _ = through(server)
        with sock:
            sock.settimeout(5.0)
            received = b""
            while len(received) < len(server_bytes):
                received += sock.recv(100)
        head = server.visitor().head.decode()
    assert received == server_bytes
    lines = head.split("\r\n")
    assert lines[0] == "CONNECT relay.example:80 HTTP/1.1"
    assert "Host: relay.example:80" in lines
    assert "Proxy-Authorization: Basic dXNlcjpwYXNz" in lines
    assert not any(line.startswith("Authorization") for line in lines)


@pytest.mark.parametrize(
    "status", ["HTTP/1.0 200 Connection established", "HTTP/1.1 204", "HTTP/1.1 200"]
)
def test_any_2xx_is_a_way(status: str) -> None:
    """RFC 9110, 9.3.6."""

    def proxy(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.sock.sendall(status.encode() + b"\r\n\r\n")
        visitor.wait_gone()

    with hand_server(proxy) as server:
        sock, _ = through(server)
        sock.close()


def test_answer_that_trickles_is_read_byte_by_byte() -> None:
    """However it is cut."""

    def proxy(visitor: Visitor) -> None:
        visitor.read_head()
        for byte in b"HTTP/1.1 200 OK\r\nX: \r\r\n\r\r\nserver":
            visitor.sock.sendall(bytes([byte]))
        visitor.sock.sendall(b"\r\n\r\nreal")
        visitor.wait_gone()

    with hand_server(proxy) as server:
        sock, _ = through(server)
        with sock:
            sock.settimeout(5.0)
            assert sock.recv(4) in (b"real", b"r", b"re", b"rea")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 Proxy Authentication"),
        (b"HTTP/1.1 403 No\x1b[2J\r\n\r\n", "403 No?[2J"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "something that is not HTTP"),
        (b"\x16\x03\x01 200 x\r\n\r\n", "200 x"),
        (b"HTTP/1.1\r\n\r\n", "something that is not HTTP"),
        (b"\r\n\r\n", "something that is not HTTP"),
        (b"", "ended the connection"),
        (b"HTTP/1.1 200 OK\r\n", "ended the connection"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "ended the connection"),
    ],
)
def test_proxy_that_gives_no_way_is_told_by_its_own_words(answer: bytes, said: str) -> None:
    """One printable sentence that names the proxy, and no secret."""

    def proxy(visitor: Visitor) -> None:
        visitor.read_head()
        visitor.sock.sendall(answer)
        if len(answer) < 10_000:
            visitor.sock.shutdown(socket.SHUT_WR)
        visitor.wait_gone()

    with hand_server(proxy) as server:
        error, seconds = through(server)
        assert f"127.0.0.1:{server.port}" in str(error)
    assert error.code == "proxy_failed"
    assert said in str(error)
    assert str(error).isprintable()
    assert "pass" not in str(error)
    assert seconds < 1.0


def test_proxy_that_is_silent_ends_by_the_deadline() -> None:
    """One deadline for the whole way, not one a read."""

    def proxy(visitor: Visitor) -> None:
        visitor.read_head()
        stopped = threading.Event()
        with contextlib.suppress(OSError):
            while not stopped.wait(0.02):
                visitor.sock.sendall(b"H")

    with hand_server(stay) as silent, hand_server(proxy) as trickling:
        for server in (silent, trickling):
            error, seconds = through(server, 0.3)
            assert "did not answer in time" in str(error)
            assert 0.28 <= seconds < 0.8


def test_proxy_that_is_not_there_is_told_as_the_proxy() -> None:
    """The user looks at the right place."""
    environ = {"all_proxy": f"127.0.0.1:{free_port()}"}
    endpoint = Endpoint(True, "relay.example", 443, "/p")
    error, _ = timed(lambda: dial_server(endpoint, None, environ, Deadline(5.0)))
    assert error.code == "proxy_failed"
    assert "cannot reach the HTTP proxy" in str(error)


# TLS.


def tls_server(certs: Certs, *, wrong_host: bool = False) -> Callable[[socket.socket], Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if wrong_host:
        context.load_cert_chain(certs.wrong_host_cert, certs.wrong_host_key)
    else:
        context.load_cert_chain(certs.cert, certs.key)
    return lambda sock: context.wrap_socket(sock, server_side=True)


def dial_tls(server: HandServer, ca_file: str | None, deadline_s: float = 5.0) -> Any:
    context = make_context(ca_file)
    endpoint = Endpoint(True, "127.0.0.1", server.port, "/p")
    return timed(lambda: dial_server(endpoint, context, {}, Deadline(deadline_s)))


@pytest.mark.debian("openssl")
def test_certificate_of_a_given_authority_is_trusted(certs: Certs) -> None:
    """--ca-file adds a private CA; the socket comes back non-blocking, its handshake done."""
    with hand_server(stay, tls_server(certs)) as server:
        sock, _ = dial_tls(server, str(certs.ca))
        with sock:
            assert isinstance(sock, ssl.SSLSocket)
            assert not sock.getblocking()
            assert sock.version() == "TLSv1.3"


@pytest.mark.debian("openssl")
def test_untrusted_certificate_is_refused_with_the_flag_that_helps(certs: Certs) -> None:
    """Verification is never off."""
    with hand_server(stay, tls_server(certs)) as server:
        error, _ = dial_tls(server, None)
    assert error.code == "tls_failed"
    assert "is not trusted" in str(error)
    assert "--ca-file" in str(error)


@pytest.mark.debian("openssl")
def test_certificate_for_another_name_is_refused(certs: Certs) -> None:
    """A trusted authority is not enough."""
    with hand_server(stay, tls_server(certs, wrong_host=True)) as server:
        error, _ = dial_tls(server, str(certs.ca))
    assert error.code == "tls_failed"
    assert "127.0.0.1" in str(error)


def test_handshake_that_stalls_ends_by_the_deadline() -> None:
    """Connected, and then silence."""
    with hand_server(stay) as server:
        error, seconds = dial_tls(server, None, 0.3)
    assert "did not answer in time" in str(error)
    assert 0.28 <= seconds < 0.8


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\0\2\2\x28", b""]
)
def test_server_without_tls_is_told_so(answer: bytes) -> None:
    """https:// to a plain port, an alert, an end."""

    def serve(visitor: Visitor) -> None:
        visitor.sock.recv(1000)
        visitor.sock.sendall(answer)

    with hand_server(serve) as server:
        error, _ = dial_tls(server, None)
    assert error.code == "tls_failed"
    assert str(error).isprintable()


def test_connection_that_was_reset_before_tls_is_an_error_of_ours() -> None:
    """A balancer without a backend does that; an OSError would end an unattended client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        eventually(lambda: wait_ready(sock, write=False, timeout_s=0.0))
        sock.setblocking(False)
        endpoint = Endpoint(True, "127.0.0.1", 1, "/")
        with pytest.raises(RelayError) as caught:
            dial._start_tls(sock, endpoint, make_context(None), Deadline(5.0))
        sock.close()
    assert caught.value.code == "tls_failed"


@pytest.mark.parametrize("stage", ["proxy", "tls"])
def test_every_stage_is_cancelled_in_0_3_seconds(stage: str) -> None:
    """A client that is stopped does not wait 20 s for a server that says nothing."""
    # Before the measured part: to read the system's CAs takes long on a busy machine.
    context = make_context(None)
    with hand_server(stay) as server:
        cancelled_at = time.monotonic() + 0.05
        environ = {"all_proxy": f"127.0.0.1:{server.port}"} if stage == "proxy" else {}
        endpoint = Endpoint(stage == "tls", "127.0.0.1", server.port, "/p")
        error, seconds = timed(
            lambda: dial_server(
                endpoint, context, environ, Deadline(5.0, lambda: time.monotonic() >= cancelled_at)
            )
        )
    assert isinstance(error, RelayError)
    assert "cancelled" in str(error)
    assert seconds < 0.7


def test_address_is_dialled_while_every_lookup_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one tunnel that hang keep neither another's address nor the server away."""
    slots = threading.BoundedSemaphore(1)
    slots.acquire()
    monkeypatch.setattr("http_network_relay.dial.names._lookup_slots", slots)
    with EchoTarget() as target:
        sock = dial_tcp("127.0.0.1", target.port, Deadline(5.0))
        sock.close()
    with pytest.raises(DialError) as error:
        dial_tcp("localhost", 1, Deadline(0.1))
    assert error.value.kind == "timeout"


@pytest.mark.parametrize(
    "name",
    ["", ".", "a", "a.", "a..", "a..b", ".b", "_x.y", "a b", "::1", "x" * 63, "x" * 64, "ü.de"],
)
def test_names_are_encoded_as_python_does(name: str) -> None:
    """With its codec or without."""

    def outcome(encode: Callable[[], bytes]) -> object:
        try:
            return encode()
        except UnicodeError as exc:
            return type(exc)

    assert outcome(lambda: names.encode_name(name)) == outcome(lambda: name.encode("idna"))
