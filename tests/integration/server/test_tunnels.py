"""What the server does with a tunnel's messages: forwards, counts, ends."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import CLIENT_SECRET, TOKEN, Server, resident_bytes, start_server
from tests.support.raw import RawClient, RawUser
from tests.support.secrecy import secret_of
from tests.support.waiting import eventually

KIB = 1024
CAP = 1024 * KIB


@dataclass
class Pair:
    """An open tunnel: its two ends, by hand."""

    server: Server
    client: RawClient
    user: RawUser
    channel: int


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with a window of 1 MiB for all tests of this module."""
    env = {"HTTP_NETWORK_RELAY_MAX_WINDOW": str(CAP)}
    credentials = {
        "clients": {"device": CLIENT_SECRET, "off": secret_of("cs-off")},
        "proxy_users": [TOKEN],
    }
    with start_server(
        tmp_path_factory.mktemp("server"), threads=16, env=env, credentials=credentials
    ) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    """A fresh leg of the client: its channels count from 1."""
    with RawClient(server.url) as raw:
        yield raw


@pytest.fixture
def pair(server: Server, client: RawClient) -> Iterator[Pair]:
    """A tunnel that the client has accepted."""
    with RawUser(server.url) as user:
        yield Pair(server, client, user, open_tunnel(client, user))


def open_tunnel(client: RawClient, user: RawUser, **fields: Any) -> int:
    user.send_open(**fields)
    channel: int = client.recv_control("open")["channel"]
    client.send_opened(channel)
    user.recv_control("opened")
    return channel


def ack(delivered: int, limit: int, *, eof: bool = False) -> dict[str, Any]:
    return {"type": "ack", "delivered": delivered, "limit": limit, "eof": eof}


def test_open_reaches_the_client_with_channel_user_and_known_fields_only(
    server: Server, client: RawClient
) -> None:
    """The server writes a new object: what it does not know does not pass."""
    for number in (1, 2):
        with RawUser(server.url) as user:
            user.send_open(host="example.org", port=2222, limit=2**53, surprise={"a": 1}, user="x")
            opened = client.recv_control("open")
            assert opened.pop("user").startswith("token-")
            assert opened == {
                "type": "open",
                "channel": number,
                "client": "device",
                "host": "example.org",
                "port": 2222,
                "protocol": "tcp",
                "tunnel_id": "0" * 31 + "1",
                "resume_token": "0" * 64,
                "limit": CAP,
                "grace_s": 0,
            }
        reset = client.recv_control("reset")
        assert (reset["channel"], reset["code"]) == (number, "user_gone")


def test_bytes_and_ends_pass_both_ways_when_all_is_right(pair: Pair) -> None:
    """Data, acks and both eofs; after both final acks the tunnel is over without a word."""
    client, user, channel = pair.client, pair.user, pair.channel
    user.send_binary(b"up")
    assert client.recv_on() == (channel, b"up")
    client.send_on(channel, b"down!")
    assert user.recv_binary() == b"down!"
    user.send_control({"type": "eof", "count": 2})
    assert client.recv_control("eof") == {"type": "eof", "channel": channel, "count": 2}
    client.send_control({"channel": channel, **ack(2, 300_000, eof=True)})
    assert user.recv_control("ack") == ack(2, 300_000, eof=True)
    user.send_control(ack(5, 2**40))
    assert client.recv_control("ack") == {"channel": channel, **ack(5, 5 + CAP)}
    client.send_control_on(channel, "eof", count=5)
    assert user.recv_control("eof") == {"type": "eof", "count": 5}
    user.send_control(ack(5, 2**40, eof=True))
    assert client.recv_control("ack")["eof"] is True

    pair.server.wait_for_line(r"tunnel closed reason=eof up=2 down=5 .*client=device tunnel=0")
    user.close()
    client.expect_nothing(0.2)


REFUSED_AT_ONCE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown client": ({"client": "nobody"}, "client_unknown"),
    "absent client": ({"client": "off"}, "client_offline"),
    "port 0": ({"port": 0}, "protocol_error"),
    "port a string": ({"port": "22"}, "protocol_error"),
    "host with a space": ({"host": "a b"}, "protocol_error"),
    "host huge": ({"host": "a" * 256}, "protocol_error"),
    "limit negative": ({"limit": -1}, "protocol_error"),
    "limit too large": ({"limit": 2**53 + 1}, "protocol_error"),
    "limit a float": ({"limit": 1.5}, "protocol_error"),
    "tunnel_id short": ({"tunnel_id": "12"}, "protocol_error"),
    "token missing": ({"resume_token": None}, "protocol_error"),
    "a resume of an unknown client": (
        {"type": "resume", "attempt": 1, "received": 0, "delivered": 0, "client": "nobody"},
        "client_unknown",
    ),
    "a resume without its counts": ({"type": "resume", "attempt": 1}, "protocol_error"),
    "an ack first": ({"type": "ack"}, "protocol_error"),
    "from the other side": ({"type": "opened"}, "protocol_error"),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_first_message_is_refused_when_it_is_wrong(
    server: Server, client: RawClient, case: str
) -> None:
    """`refused` with a code, close 1000, and the client hears nothing of it."""
    fields, code = REFUSED_AT_ONCE[case]
    with RawUser(server.url) as user:
        user.send_open(**fields)
        assert user.recv_control("refused")["code"] == code
        assert user.recv_close(1) == (1000, "")
    client.expect_nothing(0.05)


def test_data_before_open_is_refused(server: Server) -> None:
    """A user leg begins with `open`, whatever else comes."""
    with RawUser(server.url) as user:
        user.send_binary(b"SSH-2.0-")
        assert user.recv_control("refused")["code"] == "protocol_error"
        assert user.recv_close(1)[0] == 1000


def test_refusal_of_the_client_reaches_the_user(server: Server, client: RawClient) -> None:
    """With its code and message; then the server closes with 1000."""
    with RawUser(server.url) as user:
        user.send_open()
        channel = client.recv_control("open")["channel"]
        client.send_control_on(channel, "refused", code="target_refused", message="port 22: no")
        assert user.recv_control() == {
            "type": "refused",
            "code": "target_refused",
            "message": "port 22: no",
        }
        assert user.recv_close(1)[0] == 1000


Act = Callable[[Pair], None]


def _from_user(**control: Any) -> Act:
    return lambda pair: pair.user.send_control(control)


def _from_client(kind: str, **fields: Any) -> Act:
    return lambda pair: pair.client.send_control_on(pair.channel, kind, **fields)


def _user_after_eof(pair: Pair) -> None:
    pair.user.send_control({"type": "eof", "count": 0})
    assert pair.client.recv_control("eof")["count"] == 0
    pair.user.send_binary(b"x")


def _client_overrun(pair: Pair) -> None:
    for _ in range(4):
        pair.client.send_on(pair.channel, bytes(64 * KIB))
    for _ in range(4):
        pair.user.recv_binary()
    pair.client.send_on(pair.channel, b"x")


def _user_overrun(pair: Pair) -> None:
    for _ in range(4):
        pair.user.send_binary(bytes(64 * KIB))
    for _ in range(4):
        assert len(pair.client.recv_on()[1]) == 64 * KIB
    pair.user.send_binary(b"x")


# What breaks one tunnel's rules.
TUNNEL_ERRORS: dict[str, Act] = {
    "user: second open": lambda pair: pair.user.send_open(),
    "user: resume on a tunnel": lambda pair: pair.user.send_open(
        type="resume", attempt=1, received=0, delivered=0
    ),
    "user: control of the other side": _from_user(type="opened", limit=1, grace_s=0),
    "user: window overrun": _user_overrun,
    "user: empty data": lambda pair: pair.user.send_binary(b""),
    "user: data of 64 KiB + 1": lambda pair: pair.user.send_binary(bytes(64 * KIB + 1)),
    "user: data after eof": _user_after_eof,
    "user: eof of other bytes": _from_user(type="eof", count=1),
    "user: ack beyond sent": _from_user(**ack(1, 300_000)),
    "user: limit falls": _from_user(**ack(0, 1000)),
    "user: eof acked too early": _from_user(**ack(0, 300_000, eof=True)),
    "user: count negative": _from_user(type="eof", count=-1),
    "user: count huge": _from_user(type="eof", count=2**53 + 1),
    "user: count a boolean": _from_user(type="eof", count=True),
    "user: field missing": _from_user(type="ack", delivered=0, limit=300_000),
    "client: second opened": _from_client("opened", limit=300_000, grace_s=0),
    "client: refused after opened": _from_client("refused", code="busy", message=""),
    "client: resumed": _from_client("resumed", received=0, delivered=0, limit=300_000),
    "client: control of the other side": _from_client("open"),
    "client: window overrun": _client_overrun,
    "client: empty data": lambda pair: pair.client.send_on(pair.channel, b""),
    "client: ack beyond sent": _from_client("ack", delivered=1, limit=300_000, eof=False),
    "client: limit falls": _from_client("ack", delivered=0, limit=1, eof=False),
    "client: eof of other bytes": _from_client("eof", count=7),
    "client: field missing": _from_client("eof"),
}


@pytest.mark.parametrize("case", TUNNEL_ERRORS)
def test_tunnel_is_reset_at_both_ends_when_a_rule_is_broken(pair: Pair, case: str) -> None:
    """`protocol_error` to both, the user's leg closes, the client's leg and its others go on."""
    with RawUser(pair.server.url) as other:
        channel = open_tunnel(pair.client, other)

        TUNNEL_ERRORS[case](pair)

        reset = pair.client.recv_control("reset")
        assert (reset["channel"], reset["code"]) == (pair.channel, "protocol_error")
        assert pair.user.recv_control("reset")["code"] == "protocol_error"
        assert pair.user.recv_close(1)[0] == 1000

        # What still comes for the ended channel is a normal race.
        pair.client.send_on(pair.channel, b"late")
        pair.client.send_control_on(pair.channel, "eof", count=4)
        pair.client.send_on(channel, b"fine")
        assert other.recv_binary() == b"fine"
        other.send_binary(b"fine too")
        assert pair.client.recv_on() == (channel, b"fine too")


@pytest.mark.parametrize("kind", ["data", "eof", "ack", "resumed"])
def test_client_is_reset_when_it_speaks_before_opened(
    server: Server, client: RawClient, kind: str
) -> None:
    """Before `opened` a client may only accept or refuse; the user then reads a refusal."""
    with RawUser(server.url) as user:
        user.send_open()
        channel = client.recv_control("open")["channel"]
        fields: dict[str, Any] = {"count": 0, "delivered": 0, "limit": 9, "eof": False}
        if kind == "data":
            client.send_on(channel, b"x")
        else:
            client.send_control_on(channel, kind, received=0, **fields)
        assert client.recv_control("reset")["code"] == "protocol_error"
        assert user.recv_control("refused")["code"] == "protocol_error"


def test_user_is_refused_when_it_sends_before_opened(server: Server, client: RawClient) -> None:
    """Bytes for a target that has not accepted are an error of the tunnel."""
    with RawUser(server.url) as user:
        user.send_open()
        client.recv_control("open")
        user.send_binary(b"x")
        assert client.recv_control("reset")["code"] == "protocol_error"
        assert user.recv_control("refused")["code"] == "protocol_error"


# What breaks a leg's rules -> its close code.
LEG_ERRORS: dict[str, tuple[Callable[[RawUser | RawClient], None], int]] = {
    "not JSON": (lambda leg: leg.send_text("{"), 1002),
    "JSON but no object": (lambda leg: leg.send_text("[]"), 1002),
    "deep JSON": (lambda leg: leg.send_text("[" * 4000), 1002),
    "no type": (lambda leg: leg.send_text("{}"), 1002),
    "unknown type": (lambda leg: leg.send_control({"type": "hello", "channel": 1}), 1002),
    "type a number": (lambda leg: leg.send_control({"type": 5, "channel": 1}), 1002),
    "huge control": (lambda leg: leg.send_text(json.dumps({"type": "x" * 4096})), 1009),
    "huge message": (lambda leg: leg.send_binary(bytes(64 * KIB + 5)), 1009),
    "giant frame": (lambda leg: leg.send_bytes(b"\x82\xff" + b"\0\0\0\1\0\0\0\0" + bytes(90_000)),
                    1009),
    "not UTF-8": (lambda leg: leg.send_text(b"\xff\xfe"), 1007),
    "no mask": (lambda leg: leg.send_raw_frame(2, b"x", mask=False), 1002),
    "reserved bit": (lambda leg: leg.send_raw_frame(2, b"x", rsv=4), 1002),
    "reserved opcode": (lambda leg: leg.send_raw_frame(3, b"x"), 1002),
    "fragmented ping": (lambda leg: leg.send_raw_frame(9, b"x", fin=False), 1002),
    "huge ping": (lambda leg: leg.send_raw_frame(9, bytes(126)), 1002),
    "rest without begin": (lambda leg: leg.send_raw_frame(0, b"x"), 1002),
}  # fmt: skip
CLIENT_LEG_ERRORS: dict[str, tuple[Callable[[RawUser | RawClient], None], int]] = {
    **LEG_ERRORS,
    "short binary": (lambda leg: leg.send_binary(b"\0\0\1"), 1002),
    "channel never assigned": (lambda leg: leg.send_binary(b"\0\0\0\2x"), 1002),
    "channel 0": (lambda leg: leg.send_binary(b"\0\0\0\0x"), 1002),
    "control for no channel": (lambda leg: leg.send_control({"type": "eof", "count": 0}), 1002),
    "control for channel 2": (
        lambda leg: leg.send_control({"type": "eof", "count": 0, "channel": 2}),
        1002,
    ),
    "going_away from a client": (
        lambda leg: leg.send_control({"type": "going_away", "spread_ms": 1}),
        1002,
    ),
}


@pytest.mark.parametrize("case", LEG_ERRORS)
def test_user_leg_ends_alone_when_its_rules_are_broken(pair: Pair, case: str) -> None:
    """Its close code says why; the client's leg lives and hears `detached`."""
    act, close_code = LEG_ERRORS[case]
    act(pair.user)
    assert pair.user.recv_close(1)[0] == close_code
    assert pair.client.recv_control("detached")["code"] == "user_lost"
    with RawUser(pair.server.url) as other:
        open_tunnel(pair.client, other)


@pytest.mark.parametrize("case", CLIENT_LEG_ERRORS)
def test_client_leg_ends_with_its_tunnels_when_its_rules_are_broken(pair: Pair, case: str) -> None:
    """Its close code says why; its users hear `detached`, then close 1012."""
    act, close_code = CLIENT_LEG_ERRORS[case]
    act(pair.client)
    assert pair.client.recv_close(1)[0] == close_code
    assert pair.user.recv_control("detached")["code"] == "client_lost"
    assert pair.user.recv_close(1)[0] == 1012


def test_message_in_fragments_is_one_message(pair: Pair) -> None:
    """Fragments are put together, up to the size of a message, also around a ping."""
    pair.user.send_raw_frame(2, b"abc", fin=False)
    pair.user.ping()
    pair.user.send_raw_frame(0, b"", fin=False)
    pair.user.send_raw_frame(0, b"def")
    assert pair.client.recv_on() == (pair.channel, b"abcdef")
    pair.user.expect_nothing(0.05)
    assert pair.user.pongs_seen == 1

    pair.user.send_raw_frame(2, bytes(40_000), fin=False)
    pair.user.send_raw_frame(0, bytes(40_000), fin=False)
    assert pair.user.recv_close(1)[0] == 1009


def test_memory_stays_flat_when_the_corpus_comes_again_and_again(pair: Pair) -> None:
    """Bad users beside a live tunnel of the same client: it does not notice."""
    pid = pair.server.worker_pid
    sizes = []
    for _ in range(6):
        for act, _code in LEG_ERRORS.values():
            with RawUser(pair.server.url) as bad:
                act(bad)
                assert bad.recv_close(1)[0] in (1000, 1002, 1007, 1009)
        pair.user.send_binary(b"still here")
        assert pair.client.recv_on()[1] == b"still here"
        sizes.append(resident_bytes(pid))
    assert sizes[-1] - sizes[1] < 4 * 1024 * KIB


# Ends.


def test_reset_of_the_user_comes_behind_its_bytes(pair: Pair) -> None:
    """`user_gone` takes its turn: what the user wrote before it still arrives."""
    for _ in range(4):
        pair.user.send_binary(bytes(60 * KIB))
    pair.user.send_control({"type": "reset", "code": "user_gone", "message": "SIGHUP"})
    pair.user.close()
    for _ in range(4):
        assert len(pair.client.recv_on()[1]) == 60 * KIB
    reset = pair.client.recv_control("reset")
    assert reset["code"] == "user_gone"
    pair.client.expect_nothing(0.1)


def test_reset_of_the_client_comes_behind_its_bytes_when_the_target_ended_it(pair: Pair) -> None:
    """`target_reset` takes its turn; then the server closes the user's leg with 1000."""
    for _ in range(4):
        pair.client.send_on(pair.channel, bytes(60 * KIB))
    pair.client.send_control_on(pair.channel, "reset", code="target_reset", message="RST")
    for _ in range(4):
        assert len(pair.user.recv_binary()) == 60 * KIB
    assert pair.user.recv_control("reset")["code"] == "target_reset"
    assert pair.user.recv_close(1)[0] == 1000


@pytest.mark.parametrize("how", ["drop", "close"])
def test_client_hears_detached_when_the_user_is_lost(pair: Pair, how: str) -> None:
    """Whether with a close frame or without: before a reset it is a loss."""
    getattr(pair.user, how)()
    detached = pair.client.recv_control("detached", 1)
    assert detached == {"type": "detached", "channel": pair.channel, "code": "user_lost"}
    pair.server.wait_for_line("tunnel closed reason=user_lost")


def test_user_hears_client_offline_when_the_client_is_lost_before_opened(
    server: Server, client: RawClient
) -> None:
    """Nothing was begun, so it is a refusal."""
    with RawUser(server.url) as user:
        user.send_open()
        client.recv_control("open")
        client.drop()
        assert user.recv_control("refused", 1)["code"] == "client_offline"
        assert user.recv_close(1)[0] == 1000


@pytest.mark.parametrize("instance", ["00112233445566778899aabbccddeeff", "f" * 32])
def test_user_hears_client_replaced_when_the_client_comes_again(pair: Pair, instance: str) -> None:
    """Rule 6: the newcomer wins at once, and serves the next tunnel."""
    with RawClient(pair.server.url, instance=instance) as new, RawUser(pair.server.url) as user:
        same = instance == "00112233445566778899aabbccddeeff"
        assert pair.client.recv_close(1)[0] == (4408 if same else 4409)
        assert pair.user.recv_control("detached", 1)["code"] == "client_replaced"
        assert pair.user.recv_close(1)[0] == 1012
        # The loser's end leaves the winner alone.
        pair.client.drop()
        eventually(lambda: "leg down reason=replaced" in pair.server.text)
        open_tunnel(new, user)
        if not same:
            pair.server.wait_for_line("WARNING client replaced by another instance client=device")


def test_newcomer_gets_a_window_when_others_hold_large_ones(tmp_path: Path) -> None:
    """A quarter of a client's 64 MiB is for those who come late, whatever the first ones hold."""
    with start_server(tmp_path, threads=16) as server, RawClient(server.url) as client:
        users = [RawUser(server.url) for _ in range(15)]
        try:
            limits = []
            for user in users:
                user.send_open(limit=2**53)
                limits.append(client.recv_control("open")["limit"])
            assert limits[0] == 4096 * KIB
            assert limits[-1] == 256 * KIB
            assert sum(limits) <= 64 * 1024 * KIB
        finally:
            for user in users:
                user.close()
