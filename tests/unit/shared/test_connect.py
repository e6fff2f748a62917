"""URLs and proxy settings: read exactly, and refused in a sentence."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_network_relay.dial.connect import make_context
from http_network_relay.dial.endpoint import Endpoint, parse_server_url
from http_network_relay.dial.http_proxy import bypasses_proxy, printable, proxy_for
from http_network_relay.dial.names import _by_turns
from http_network_relay.wire.errors import RelayError

PATH = "/ws_for_clients"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ws://127.0.0.1:8000", Endpoint(False, "127.0.0.1", 8000, PATH)),
        ("ws://127.0.0.1:8000/", Endpoint(False, "127.0.0.1", 8000, PATH)),
        ("wss://relay.example", Endpoint(True, "relay.example", 443, PATH)),
        ("ws://relay.example", Endpoint(False, "relay.example", 80, PATH)),
        ("https://relay.example", Endpoint(True, "relay.example", 443, PATH)),
        ("http://relay.example:81", Endpoint(False, "relay.example", 81, PATH)),
        ("HTTPS://Relay.Example", Endpoint(True, "relay.example", 443, PATH)),
        ("https://relay.example/a/b", Endpoint(True, "relay.example", 443, "/a/b")),
        ("https://relay.example/a/", Endpoint(True, "relay.example", 443, "/a/")),
        ("https://relay.example?x=1", Endpoint(True, "relay.example", 443, PATH + "?x=1")),
        ("https://relay.example/p?x=%20", Endpoint(True, "relay.example", 443, "/p?x=%20")),
        ("wss://[::1]:8443", Endpoint(True, "::1", 8443, PATH)),
    ],
)
def test_server_url_is_read(url: str, expected: Endpoint) -> None:
    """ws, wss, http and https; the program's own path where there is none."""
    assert parse_server_url(url, PATH) == expected


@pytest.mark.parametrize(
    "url",
    [
        "", "relay.example", "relay.example:8000", "//relay.example", "ftp://relay.example",
        "ws://", "ws:///path", "ws://:8000", "ws://h:port", "ws://h:99999", "ws://h:-1",
        "ws://[::1", "https://relay.example#x", "https://user@relay.example",
        "https://user:hunter2@relay.example", "https://user:hunter2@relay.example:x",
        "ws://h/ä", "ws://h/a b", "ws://hunter2:x@[", "https://.relay.example",
        "https://a..b", "https://" + "a" * 64 + ".example",
    ],
)  # fmt: skip
def test_server_url_that_cannot_be_meant_is_a_usage_error(url: str) -> None:
    """One sentence that names the flag, and never repeats what may be a password."""
    with pytest.raises(RelayError) as caught:
        parse_server_url(url, PATH)
    assert caught.value.code == "usage"
    assert "--server-url" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60) | st.text(max_size=40).map("ws://".__add__))
def test_any_server_url_is_read_or_a_usage_error(url: str) -> None:
    """A user's mistake is never a traceback."""
    try:
        endpoint = parse_server_url(url, PATH)
    except RelayError:
        return
    assert endpoint.resource.isascii()
    assert " " not in endpoint.resource
    assert 0 < endpoint.port < 65536


@pytest.mark.parametrize(
    ("url", "again", "is_loopback"),
    [
        ("http://localhost", "ws://localhost:80/p", True),
        ("http://a.localhost", "ws://a.localhost:80/p", True),
        ("http://127.8.9.1:1", "ws://127.8.9.1:1/p", True),
        ("https://[::1]", "wss://[::1]:443/p", True),
        ("http://10.0.0.1", "ws://10.0.0.1:80/p", False),
        ("http://notlocalhost", "ws://notlocalhost:80/p", False),
        ("http://localhost.example", "ws://localhost.example:80/p", False),
        ("http://127.0.0.1.example", "ws://127.0.0.1.example:80/p", False),
    ],
)
def test_endpoint_knows_its_url_and_whether_it_is_loopback(
    url: str, again: str, is_loopback: bool
) -> None:
    """The warning about bytes in clear depends on it."""
    endpoint = parse_server_url(url, "/p")
    assert (endpoint.url, endpoint.is_loopback) == (again, is_loopback)


# NO_PROXY.


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("example.com", "example.com"),
        ("a.example.com", "example.com"),
        ("example.com", ".example.com"),
        ("a.b.example.com", ".example.com"),
        ("EXAMPLE.com", "Example.COM"),
        ("example.com.", "example.com"),
        ("example.com", "example.com."),
        ("example.com", "other, example.com ,x"),
        ("example.com", "example.com:443"),
        ("anything", "*"),
        ("anything", "a, *"),
        ("anything", "*:443"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.99/24"),
        ("10.1.2.3", "10.1.2.3:443"),
        ("::1", "::1"),
        ("::1", "[::1]"),
        ("::1", "[::1]:443"),
        ("fe80::5", "fe80::/10"),
        ("2001:db8::1", "2001:0db8:0::0001"),
    ],
)
def test_host_in_no_proxy_is_dialled_directly(host: str, no_proxy: str) -> None:
    """Names and what is below them, addresses, networks, ports, `*`."""
    assert bypasses_proxy(host, 443, no_proxy)


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("notexample.com", "example.com"),
        ("notexample.com", ".example.com"),
        ("example.com", "a.example.com"),
        ("example.com.evil", "example.com"),
        ("example.com", ""),
        ("example.com", ",, ,"),
        ("example.com", "."),
        ("example.com", "example.com:80"),
        ("example.com", "example.com:44"),
        ("example.com", "example.com:port"),
        ("example.com", "example.com:²"),
        ("anything", "*:80"),
        ("10.1.2.3", "11.0.0.0/8"),
        ("10.1.2.3", "10.1.2.30"),
        ("10.1.2.3", "2.3"),
        ("10.1.2.3", ".3"),
        ("10.1.2.3", "10.1.2.3:80"),
        ("10.1.2.3", "::/0"),
        ("::1", "::2"),
        ("::1", "[::1]:80"),
        ("::1", "0.0.0.0/0"),
        ("::1", "1"),
        ("10.example.com", "10.0.0.0/8"),
    ],
)
def test_host_not_in_no_proxy_goes_through_the_proxy(host: str, no_proxy: str) -> None:
    """Exactly: a name that only ends alike is another name."""
    assert not bypasses_proxy(host, 443, no_proxy)


@given(st.text(max_size=30), st.integers(1, 65535), st.text(max_size=60))
def test_no_proxy_of_any_text_is_read(host: str, port: int, no_proxy: str) -> None:
    """Nonsense in it matches or does not; it never raises."""
    assert bypasses_proxy(host, port, no_proxy) in (True, False)


# Proxies.

SECURE = Endpoint(True, "relay.example", 443, PATH)
CLEAR = Endpoint(False, "relay.example", 80, PATH)


@pytest.mark.parametrize(
    ("endpoint", "environ", "expected"),
    [
        (SECURE, {}, None),
        (SECURE, {"https_proxy": "http://p:3128"}, ("p", 3128, None)),
        (SECURE, {"HTTPS_PROXY": "p:3128"}, ("p", 3128, None)),
        (SECURE, {"https_proxy": "p"}, ("p", 80, None)),
        (SECURE, {"https_proxy": "http://p:3128/"}, ("p", 3128, None)),
        (SECURE, {"https_proxy": " http://p:1 "}, ("p", 1, None)),
        (SECURE, {"https_proxy": "[::1]:3128"}, ("::1", 3128, None)),
        (SECURE, {"http_proxy": "p:1"}, None),
        (SECURE, {"all_proxy": "p:1"}, ("p", 1, None)),
        (SECURE, {"ALL_PROXY": "p:1"}, ("p", 1, None)),
        (SECURE, {"https_proxy": "a:1", "HTTPS_PROXY": "b:2"}, ("a", 1, None)),
        (SECURE, {"https_proxy": "a:1", "all_proxy": "b:2"}, ("a", 1, None)),
        (SECURE, {"https_proxy": "", "all_proxy": "b:2"}, ("b", 2, None)),
        (CLEAR, {"http_proxy": "p:1"}, ("p", 1, None)),
        (CLEAR, {"HTTP_PROXY": "p:1"}, ("p", 1, None)),
        (CLEAR, {"https_proxy": "p:1"}, None),
        (SECURE, {"https_proxy": "p:1", "no_proxy": "relay.example"}, None),
        (SECURE, {"https_proxy": "p:1", "NO_PROXY": ".example"}, None),
        (SECURE, {"https_proxy": "p:1", "no_proxy": "lay.example"}, ("p", 1, None)),
        (SECURE, {"https_proxy": "p:1", "no_proxy": "relay.example:444"}, ("p", 1, None)),
        (SECURE, {"https_proxy": "socks5://p:1", "no_proxy": "*"}, None),
    ],
)
def test_proxy_is_the_one_that_the_environment_names(
    endpoint: Endpoint, environ: dict[str, str], expected: Any
) -> None:
    """By the URL's scheme, lower case first, then all_proxy; NO_PROXY goes before."""
    assert proxy_for(endpoint, environ) == expected


def test_proxys_user_and_password_become_a_header() -> None:
    """They are percent-decoded first."""
    proxy = proxy_for(SECURE, {"https_proxy": "http://us%40r:p%3Aw@p:3128"})
    assert proxy is not None
    assert proxy.authorization == "Basic " + base64.b64encode(b"us@r:p:w").decode()


def test_proxys_password_that_is_not_utf8_goes_as_it_stands() -> None:
    """The environment is bytes; Python shows those of another encoding as lone surrogates."""
    proxy = proxy_for(SECURE, {"https_proxy": os.fsdecode(b"http://user:p\xe4ss@p:3128")})
    assert proxy is not None
    assert proxy.authorization == "Basic " + base64.b64encode(b"user:p\xe4ss").decode()


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "value",
    [
        "https://p:3128", "socks://p:1080", "socks5h://p:1080", "socks4://hunter2:pw@p", "http://",
        "http://p:port", "http://p:99999", "http://hunter2:pw@p:x", "http://[::1", "://p",
    ],
)  # fmt: skip
def test_proxy_that_cannot_be_used_is_an_error_that_names_its_variable(
    name: str, value: str
) -> None:
    """Never ignored: a direct connection may be what the network's owner forbids."""
    with pytest.raises(RelayError) as caught:
        proxy_for(SECURE, {name: value})
    assert caught.value.code == "usage"
    assert str(caught.value).startswith(f"{name} is not a usable proxy")
    assert "hunter2" not in str(caught.value)


# Addresses.


def info(family: int, address: str) -> Any:
    return (family, socket.SOCK_STREAM, 6, "", (address, 1))


def test_families_take_turns_the_first_ones_first() -> None:
    """RFC 8305: a family that is dead as a whole costs one turn each."""
    six, four = socket.AF_INET6, socket.AF_INET
    infos = [info(six, "a"), info(six, "b"), info(six, "c"), info(four, "d")]
    assert [each[4][0] for each in _by_turns(infos)] == ["a", "d", "b", "c"]


# TLS settings.


def test_context_verifies_always() -> None:
    """There is no way to turn it off."""
    context = make_context(None)
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"


@pytest.mark.parametrize("content", [None, b"", b"no certificate\n", b"\xff\x00"])
def test_ca_file_that_cannot_be_used_is_a_usage_error(
    tmp_path: Path, content: bytes | None
) -> None:
    """Missing, empty or something else: one sentence with the flag and the file."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RelayError) as caught:
        make_context(str(path))
    assert caught.value.code == "usage"
    assert f"--ca-file {path}" in str(caught.value)


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31mb", "a\u202eb", "x" * 10_000])
def test_foreign_words_are_made_printable(text: str) -> None:
    """What a proxy or a server says stands in one line."""
    assert printable(text).isprintable()
    assert len(printable(text)) <= 300
