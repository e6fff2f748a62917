"""One function a decoder: it gets bytes, and raises where the decoder breaks its word.

A decoder promises three things. Invalid input raises the documented exception and no other. Valid
input can be written and read again. An error is one short printable line without a secret.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Callable
from datetime import date
from typing import Any

from http_network_relay.wire.errors import ConfigError
from server.access.form import parse_credentials
from server.access.json_lines import JsonError, parse_json
from server.addresses import block_of, parse_networks, source_address
from server.config import SETTINGS, TRUSTED_PROXIES, Config
from tests.fuzz.source import Source, control
from tests.support.controls import as_dict, encode, from_dict
from tests.support.programs import load

PACKAGE = load("package")

Decoder = Callable[[bytes], None]

# The controls of each of the four directions, and whether they carry a channel.
_SIDES = (
    ("FROM_USER", False),
    ("FROM_CLIENT", True),
    ("TO_CLIENT", True),
    ("TO_USER", False),
)
_TODAY = date(2026, 1, 31)
# The longest sentence of a program about a peer's or a user's input.
_MAX_SENTENCE_CHARS = 1000


def check_sentence(error: BaseException) -> None:
    """Fail unless the error is one printable line of a bounded length."""
    text = str(error)
    assert text.isprintable(), f"{text!r} is not one printable line"
    assert len(text) <= _MAX_SENTENCE_CHARS, f"{len(text)} characters: {text[:200]!r}"


# The wire.


def _outcome_of_wire(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the result of a decoder, or what its LegError or TunnelError says."""
    try:
        return function(*args, **options)
    except PACKAGE.LegError as exc:
        check_sentence(exc)
        return "leg", str(exc), exc.close_code
    except PACKAGE.TunnelError as exc:
        check_sentence(exc)
        return "tunnel", str(exc), exc.channel, exc.code


def _parse(payload: bytes, side: str, has_channel: bool) -> Any:
    text = PACKAGE.decode_text(payload)
    parsed = PACKAGE.parse_control(text, getattr(PACKAGE, side), has_channel=has_channel)
    return as_dict(parsed, PACKAGE)


def fuzz_controls(data: bytes) -> None:
    """decode_text and parse_control, with raw bytes or with a control that is nearly right."""
    source = Source(data)
    side = source.pick(_SIDES)
    if source.number(2):
        payload = source.rest()
    else:
        kind = source.pick((*sorted(PACKAGE.FIELDS), "newer"))
        payload = control(source, kind, source.number(3), {})
    parsed = _outcome_of_wire(_parse, payload, *side)
    if not isinstance(parsed, dict):
        return
    known = {"type", "channel", "user", *PACKAGE.FIELDS[parsed["type"]]}
    assert set(parsed) <= known, f"unknown fields pass: {set(parsed) - known}"
    fields = {name: parsed[name] for name in parsed if name not in ("type", "channel")}
    assert all(type(value) in (int, str, bool) for value in fields.values())
    encoded = PACKAGE.encode_control(from_dict(parsed, PACKAGE))
    assert len(encoded) <= PACKAGE.MAX_CONTROL_BYTES
    again = _outcome_of_wire(_parse, encoded, *side)
    assert again == parsed, "the control does not read as it was written"


def fuzz_data(data: bytes) -> None:
    """split_channel."""
    found = _outcome_of_wire(PACKAGE.split_channel, data)
    if len(data) < PACKAGE.CHANNEL_BYTES:
        assert found[0] == "leg"
    elif PACKAGE.CHANNEL_BYTES < len(data) <= 65540:
        assert PACKAGE.encode_channel(found) == data[:4]
    else:
        assert found[0] == "tunnel"


# Rules, credentials, addresses, settings.


def _outcome(error: type[Exception], function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Return the result, or None and the sentence of `error`; other exceptions pass through."""
    try:
        return function(*args), ""
    except error as exc:
        check_sentence(exc)
        return None, str(exc)


def fuzz_rules(data: bytes) -> None:
    """canonical_host, TargetRule.parse and AccessRule.parse, and the answers of the rules."""
    source = Source(data)
    host_text, port = source.text(source.number(64)), source.number(65536)
    text = source.text(400)
    host, _ = _outcome(PACKAGE.RuleError, PACKAGE.canonical_host, host_text)
    if host is not None:
        assert PACKAGE.canonical_host(str(host)) == host, "canonical is not stable"
    for name in ("TargetRule", "AccessRule"):
        kind = getattr(PACKAGE, name)
        rule, _ = _outcome(PACKAGE.RuleError, kind.parse, text)
        if rule is None:
            continue
        assert rule.text == text
        target = rule if name == "TargetRule" else rule.target
        assert 1 <= target.lowest_port <= target.highest_port <= 65535
        assert kind.parse(rule.text) == rule
        asked = (host_text, port) if name == "TargetRule" else ("lab-1", host_text, port)
        is_match = rule.matches(*asked)
        assert not (is_match and host is None), "what is no host matches"
        if rule.is_everything and host is not None and port and name == "TargetRule":
            assert is_match


def _plain_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=float)
    except (ValueError, RecursionError):
        return None


def fuzz_credentials(data: bytes) -> None:
    """The credentials file: the JSON with its lines, and the logins that it allows."""
    try:
        node = parse_json(data)
    except JsonError as exc:
        check_sentence(exc)
        assert 1 <= exc.line <= data.count(b"\n") + 1
    else:
        assert repr(node.plain()) == repr(_plain_json(data))
    try:
        credentials = parse_credentials("FILE", data, today=_TODAY)
    except ConfigError as exc:
        check_sentence(exc)
        assert str(exc).startswith("FILE: line ")
        _check_no_secret(exc, data)
        return
    said = _plain_json(data)
    for name, entry in said["clients"].items():
        assert credentials.has_client(name)
        secrets = entry["secrets"] if isinstance(entry, dict) else [entry]
        for secret in secrets:
            if not secret.startswith("sha256:") and "expires" not in entry:
                assert credentials.check_client(name, secret), "its own secret is refused"
        assert not credentials.check_client(name, "wrong")
    users = said["proxy_users"]
    names = users if isinstance(users, dict) else map(credentials.check_user, users)
    for user in names:
        for host in ("127.0.0.1", "::1", "a.lan", "", "127.1"):
            credentials.may_open(str(user), "lab-1", host, 22)


def _check_no_secret(error: ConfigError, data: bytes) -> None:
    """Find no secret of the seeds in a message: each secret begins with this word."""
    assert "hush" not in str(error), f"a secret in {error}"


def fuzz_addresses(data: bytes) -> None:
    """X-Forwarded-For, --trusted-proxies, and the block that an address is counted under."""
    source = Source(data)
    peer: str | None = source.text(source.number(50)) or None
    trusted_text = source.text(source.number(100))
    forwarded = source.text(400)
    networks, _ = _outcome(ValueError, parse_networks, trusted_text)
    trusted = networks if networks is not None else parse_networks("127.0.0.0/8,::1,unix")
    found = source_address(peer, forwarded, trusted)
    if found not in (peer, "unix"):
        assert str(ipaddress.ip_address(found)) == found, "neither the peer nor an address"
    block = block_of(found)
    assert block_of(found) == block
    # The server believes trusted peers only.
    nobody = parse_networks("")
    assert source_address(peer, forwarded, nobody) == source_address(peer, "", nobody)


def fuzz_settings(data: bytes) -> None:
    """URLs, proxies, no_proxy and numbers, of the client and of the proxy command."""
    source = Source(data)
    url, proxy = source.text(source.number(200)), source.text(source.number(100))
    no_proxy, value = source.text(source.number(100)), source.text(source.number(40))
    endpoint, _ = _outcome(PACKAGE.RelayError, PACKAGE.parse_server_url, url, "/path")
    if endpoint is not None:
        assert endpoint.is_loopback in (True, False)
        again = PACKAGE.parse_server_url(endpoint.url, "/path")
        assert again == endpoint, f"{endpoint.url} reads as {again}"
        assert endpoint.url.isascii() or not endpoint.host.isascii()
        name = "https_proxy" if endpoint.is_tls else "http_proxy"
        with contextlib.suppress(PACKAGE.RelayError):
            PACKAGE.proxy_for(endpoint, {name: proxy, "no_proxy": no_proxy})
    PACKAGE.bypasses_proxy(url[:60], 443, no_proxy)
    for name in ("PING_INTERVAL", "MAX_WINDOW", "RESUME_TIMEOUT"):
        row = getattr(PACKAGE, name)
        _outcome(PACKAGE.RelayError, row.number, {row.variable: value})
    words = [word for word in (no_proxy, proxy, value, url) if not word.startswith("-")]
    environ = {"HTTP_NETWORK_RELAY_SECRET_KEY": value, "HTTP_NETWORK_RELAY_SERVER_URL": "ws://h"}
    _outcome(PACKAGE.RelayError, PACKAGE.read_settings, words, environ)
    for limit in SETTINGS.values():
        config = Config.from_env({limit.variable: value, TRUSTED_PROXIES.variable: no_proxy})
        _outcome(ConfigError, config.validate)


# The first inputs of each decoder in a guided run; all are valid or nearly valid.
SEEDS: dict[str, list[bytes]] = {
    "controls": [
        b"\0\1" + encode("ack", delivered=7, limit=9, eof=True),
        b"\1\1" + encode("opened", 1, limit=9, grace_s=120),
        b"\2\1" + encode("going_away", spread_ms=10),
        b"\2\1"
        + encode(
            "resume",
            3,
            client="lab-1",
            host="10.0.0.1",
            port=22,
            protocol="tcp",
            user="anna",
            tunnel_id="0" * 32,
            resume_token="0" * 64,
            limit=2**18,
            grace_s=120,
            attempt=1,
            received=0,
            delivered=0,
        ),
        b"\3\1" + encode("refused", code="busy", message="later \u00e9"),
        b"\0\0",
        # Inputs that once raised an undocumented exception.
        b'\0\1{"type":"ack","delivered":1.0,"limit":2.5,"eof":true}',
        b"\0\1" + b"[" * 4000,
    ],
    "data": [b"\0\0\0\1data", b"\0\0", b"\xff" * 4],
    "rules": [
        b"\x09127.0.0.1\0\x16lab-*:127.0.0.1:22",
        b"\x05a.lan\0\x16*.lan:8000-8010",
        b"\x03::1\0\x16*:[fd00::/8]:*",
        b"\x3f" + b"a." * 31 + b"b\0\x16*:*:65536",
        b"\x01a\0\x16a:22-70000",
        b"\x0410.1\0\x1610.0.0.0/8:*",
    ],
    "credentials": [
        b'{"clients": {"lab-1": "hush-1"}, "proxy_users": ["hush-2"]}',
        b'{"clients": {"lab-1": {"secrets": ["hush-1", "sha256:' + b"0" * 64 + b'"],\n'
        b'"expires": "2026-12-31"}},\n"proxy_users": {"anna": {"secrets": ["hush-2"],'
        b'"allow": ["lab-1:127.0.0.1:22", "*:[::1]:*"], "expires": "2026-12-31"}}}',
        b'\xef\xbb\xbf{"clients": {}, "clients": {}, "proxy_users": []}',
        b"[" * 2000,
        b'{"clients": {"' + b"x" * 3000 + b'": "hush-1"}, "proxy_users": []}',
        b'{"clients": 1e999, "proxy_users": NaN}',
    ],
    "addresses": [
        b"\x09127.0.0.1\x0b10.0.0.0/8,1.2.3.4, 10.1.1.1",
        b"\x03::1\x04unix\x00::ffff:1.2.3.4,fe80::1%eth0",
        b"\0\x04unix1.1.1.1",
        b"\x03::1\x03::11.1.1.1, 2001:DB8:0::1",
    ],
    "settings": [
        b"\x15https://relay.example\x0chttp://p:3128\x09.a,b:1,::10.5",
        b"\x13ws://127.0.0.1:80/x\x03p:1\x01*262144",
        b"\x0bwss://[::1]\x11http://u:\xe4@p:3128\x00" + b"1",
        b"\x0bwss://[::1]\x13http://u:p%40@[::1]\x0b10.0.0.0/8,120",
    ],
}
DECODERS: dict[str, Decoder] = {
    "controls": fuzz_controls,
    "data": fuzz_data,
    "rules": fuzz_rules,
    "credentials": fuzz_credentials,
    "addresses": fuzz_addresses,
    "settings": fuzz_settings,
}
