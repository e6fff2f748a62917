"""Legs and their messages in one thread: the relay of a server, the tunnels of a client.

The objects are the product's own; what is left out are threads and sockets. Pests say what the
input makes them say, nearly right or wrong, and a good tunnel beside them must not notice.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

from client.forwarder import Forwarder
from client.leg import Leg
from client.tunnel_table import TunnelTable
from http_network_relay.end.state import EndState
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from http_network_relay.wire.controls import (
    FIELDS,
    FROM_CLIENT,
    TO_CLIENT,
    TO_USER,
    Opened,
    encode_channel,
    parse_control,
)
from http_network_relay.wire.errors import LegError, RelayError, TunnelError
from http_network_relay.wire.errors import LegError as ServerLegError
from server.access.credentials import Credentials, Login
from server.config import Config
from server.legs.client_leg import ClientLeg
from server.legs.user_leg import UserLeg
from server.relay import Relay
from tests.fuzz.decoders import Decoder
from tests.fuzz.source import IDS, Source, control
from tests.support.controls import encode
from tests.support.taking import drained

USERS = ("token-good", "token-pest")
_WINDOW = 2**18


def opening(tunnel_id: str, client: str = "good", port: int = 22, **more: Any) -> dict[str, Any]:
    """Return the fields of an `open` that nothing is wrong with."""
    return {
        "client": client,
        "host": "127.0.0.1",
        "port": port,
        "protocol": "tcp",
        "tunnel_id": tunnel_id,
        "resume_token": "0" * 64,
        "limit": _WINDOW,
        "grace_s": 120,
        **more,
    }


class View(NamedTuple):
    """A pest's knowledge of a channel: whether it is open, and the bytes of the other side."""

    is_open: bool = False
    came: int = 0
    eof_came: bool = False


def view_of(leg: Any, channel: int) -> View:
    """Read the product's leg, so that most messages of a pest can be valid."""
    if isinstance(leg, Leg):
        found = leg._channels.get(channel)
        if found is None:
            return View()
        end = found[0].end
        return View(
            end.state is EndState.OPEN and end.is_at(found[1]),
            end.stream.out.sent,
            end.stream.out.eof_sent,
        )
    is_client = isinstance(leg, ClientLeg)
    tunnel = leg.channels.tunnels.get(channel) if is_client else leg.tunnel
    if tunnel is None or tunnel.is_over:
        return View()
    flow = tunnel.up if is_client else tunnel.down
    return View(tunnel.is_opened, flow.forwarded, flow.eof_count is not None)


class Pest:
    """Sends messages on one leg: most are valid, some are not."""

    def __init__(self, leg: Any, known: dict[str, Any]) -> None:
        # The product's: a user's or a client's at the server, or the client's own.
        self.leg = leg
        self._known = known
        self._is_user = isinstance(leg, UserLeg)
        self._is_server = isinstance(leg, Leg)
        # Channels that there are, 1 to this one.
        self.channels = 0
        # By channel: stream bytes said, and acked.
        self._said: dict[int, int] = {}
        self._acked: dict[int, int] = {}
        self._answered: set[int] = set()
        self._ended: set[int] = set()

    def say(self, source: Source) -> tuple[int, bytes] | None:
        """Return the opcode and the payload of its next message; None: it waits for an answer."""
        if isinstance(self.leg, ClientLeg):
            self.channels = self.leg.channels.highest
        if not self.channels or (self._is_server and source.is_rare(5)):
            if isinstance(self.leg, ClientLeg):
                return None  # Nobody asks for anything.
            kind = source.pick(("open", "open", "open", "resume"))
            self.channels += 1
            return OP_TEXT, self._control(source, kind, self.channels)
        channel = 1 + source.number(self.channels)
        if source.is_rare(150):
            channel = source.pick((self.channels + 1, 2**32 - 1, 0))
        if source.is_rare(40):
            return OP_TEXT, self._control(source, source.pick(sorted(FIELDS)), channel)
        if isinstance(self.leg, ClientLeg) and channel not in self._answered:
            self._answered.add(channel)
            asked = self.leg.channels.tunnels.get(channel)
            is_resume = asked is not None and asked.is_resume
            kind = "resumed" if is_resume else "opened"
            kind = "refused" if source.is_rare(8) else kind
            return OP_TEXT, self._control(source, kind, channel)
        view = view_of(self.leg, channel)
        if not view.is_open and not source.is_rare(64):
            return None
        has_ended = channel in self._ended and not source.is_rare(40)
        if not has_ended and source.is_rare(2):
            return OP_BINARY, self._data(source, channel)
        kinds = ["ack"] * 12 + ["reset"]
        if not has_ended:
            kinds += ["eof"] * 3
        if self._is_server:
            kinds += ["detached", "going_away"]
        kind = source.pick(kinds)
        if kind == "eof":
            self._ended.add(channel)
        return OP_TEXT, self._control(source, kind, channel, view)

    def _data(self, source: Source, channel: int) -> bytes:
        size = source.pick((1, 1, 100, 100, 4000, 65536))
        if source.is_rare(64):
            size = source.pick((0, 65537))
        self._said[channel] = self._said.get(channel, 0) + size
        head = b"" if self._is_user else encode_channel(channel)
        return head + bytes(size)

    def _control(self, source: Source, kind: str, channel: int, view: View | None = None) -> bytes:
        view = view or View()
        known: dict[str, Any] = {"limit": _WINDOW, "received": 0, "delivered": 0, "attempt": 1}
        known["count"] = self._said.get(channel, 0)
        if kind == "ack":
            delivered = max(self._acked.get(channel, 0), source.pick((view.came, view.came // 2)))
            self._acked[channel] = delivered
            is_last = view.eof_came and delivered == view.came
            known.update(delivered=delivered, limit=delivered + _WINDOW, eof=is_last)
        if kind in ("open", "resume"):
            known.update(self._known, tunnel_id=source.pick(IDS), attempt=1 + source.number(100))
        if source.is_rare(24):
            del known[source.pick(sorted(known))]
        return control(source, kind, 0 if self._is_user else channel, known)


# The server.


class Clock:
    """Replaces a transport: nothing is written, and no leg is silent."""

    heard_at = 2.0**40

    def __init__(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


class ServedLegs:
    """A relay without threads: a good client with a good tunnel, a pest client, pest users."""

    def __init__(self) -> None:
        tokens = {"good": "token-1", "pest": "token-2"}
        credentials = Credentials.plain({"good": "a", "pest": "b"}, tokens.values())
        self.relay = Relay(Config(opens_per_s=0), credentials)
        self.relay._registry.set_capacity(100)
        self.logins: dict[str, Login] = {}
        for name, token in tokens.items():
            login = credentials.login_user(token)
            assert login is not None
            self.logins[name] = login
        self.good = self._client("good", "a")
        self.pest = self._client("pest", "b")
        self.user = self._user("good")
        self.users = [self._user("pest") for _ in range(4)]
        self.user._on_message(encode("open", **opening("f" * 32)).decode())
        self.channel = self.good.channels.highest
        text = encode("opened", self.channel, limit=2**40, grace_s=120)
        self.good._on_message(text.decode())
        list(drained(self.good.frame_sender))
        list(drained(self.user.frame_sender))
        self.moved = 0

    def _client(self, name: str, secret: str) -> ClientLeg:
        login = self.relay.credentials.login_client(name, secret)
        assert login is not None
        slot = self.relay.admit_client(login, "0" * 32, "127.0.0.1")
        self.relay.attach(slot, Clock())  # type: ignore[arg-type]
        assert isinstance(slot.leg, ClientLeg)
        return slot.leg

    def _user(self, name: str) -> UserLeg:
        slot = self.relay.admit_user(self.logins[name], "127.0.0.1", "")
        self.relay.attach(slot, Clock())  # type: ignore[arg-type]
        assert isinstance(slot.leg, UserLeg)
        return slot.leg

    def check_good(self) -> None:
        """Send bytes both ways; no other leg may get any of them."""
        self.moved += 5
        self.user._on_message(b"there")
        self.good._on_message(encode_channel(self.channel) + b"back!")
        up = [
            (f.head, bytes(f.payload)) for f in drained(self.good.frame_sender) if self._is_good(f)
        ]
        down = [(f.opcode, bytes(f.payload)) for f in drained(self.user.frame_sender)]
        assert up == [(encode_channel(self.channel), b"there")], up
        assert down == [(OP_BINARY, b"back!")], down
        for leg, channel in ((self.good, self.channel), (self.user, 0)):
            text = encode("ack", channel, delivered=self.moved, limit=2**40, eof=False)
            leg._on_message(text.decode())
        list(drained(self.user.frame_sender))
        assert self.user.tunnel is not None
        assert not self.user.tunnel.is_over

    def _is_good(self, frame: Any) -> bool:
        """Whether it is of the good tunnel; else it must be a control that a client takes."""
        if frame.opcode == OP_BINARY:
            return bool(frame.head == encode_channel(self.channel))
        if frame.opcode == OP_TEXT:
            parse_control(bytes(frame.payload).decode(), TO_CLIENT, has_channel=True)
        return False


def fuzz_server_legs(data: bytes) -> None:
    """Pest users on a good client's leg and on a pest client's leg."""
    source = Source(data)
    served = ServedLegs()
    known = opening("0" * 32, "pest")
    pests: list[tuple[Any, Pest]] = [(leg, Pest(leg, known)) for leg in served.users]
    # The good client answers no pest: what this one asks for stays half open.
    pests[0] = (served.users[0], Pest(served.users[0], opening("0" * 32)))
    pests.append((served.pest, Pest(served.pest, {})))
    gone: set[int] = set()
    while not source.is_empty:
        number = source.number(len(pests) + 3)
        number = number if number < len(pests) else len(pests) - 1
        leg, pest = pests[number]
        said = pest.say(source)
        if number in gone or said is None:
            continue
        opcode, payload = said
        try:
            text = payload.decode("utf-8", "replace")
            leg._on_message(text if opcode == OP_TEXT else payload)
        except ServerLegError as exc:
            # As Leg.run() does, then.
            assert exc.close_code in (1002, 1007, 1009)
            gone.add(number)
            leg.lost()
        legal = TO_CLIENT if leg is served.pest else TO_USER
        _check_said(leg.frame_sender, legal, has_channel=leg is served.pest)
        if source.is_rare(40):
            gone.add(number)
            leg.lost()
    served.check_good()
    _check_counts(served)
    served.pest.lost()
    assert not served.pest.channels.tunnels, "a tunnel outlives its leg"
    for leg, _ in pests:
        leg.lost()
    assert list(served.good.channels.tunnels) == [served.channel], "a tunnel is left"
    served.check_good()
    for name in ("up_budget", "down_budget"):
        budget = getattr(served.pest.channels, name)
        assert budget.free == 64 * 2**20, "a budget was not given back"


def _check_said(frame_sender: Any, legal: frozenset[str], *, has_channel: bool) -> None:
    """Fail unless each message of the product is valid."""
    for frame in drained(frame_sender):
        if frame.opcode == OP_TEXT:
            parse_control(bytes(frame.payload).decode(), legal, has_channel=has_channel)
        elif frame.opcode == OP_BINARY:
            assert 1 <= len(frame.payload) <= 65536
            assert len(frame.head) == (4 if has_channel else 0)


def _check_counts(served: ServedLegs) -> None:
    for leg in (served.good, served.pest):
        for tunnel in leg.channels.tunnels.values():
            for flow in (tunnel.up, tunnel.down):
                assert 0 <= flow.delivered <= flow.forwarded
                # What a resume claims to have received may lie over its limit: no credit then.
                assert flow.forwarded <= max(flow.limit, flow.begun_at)


# The client.


class _Tunnel(Forwarder):
    """A tunnel whose target answers at once; its threads' work is done by advance()."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.thread = self  # type: ignore[assignment]

    def start(self) -> None:
        """In the place of the thread's: dial, and say so."""
        self.end.on_open(self._opening.limit, min(self._grace_s, self._opening.grace_s))
        self._first_channel.put_first(Opened(self.end.first_limit, self._grace_s))

    def advance(self, source: Source) -> None:
        """Do a step of its reader and one of its writer."""
        end = self.end
        if not self.is_echoing():
            return
        if (size := end.outbound.credit()) and source.is_rare(2):
            end.outbound.send(bytes(min(size, 1 + source.number(3000))))
        elif source.is_rare(8):
            end.outbound.send_eof()
        with end.lock:
            has_news = end.inbound.has_news_locked()
        if has_news:
            chunk = end.inbound.next_chunk()
            if chunk:
                end.inbound.delivered(len(chunk))
            elif chunk == b"":
                end.inbound.delivered_eof()

    def is_echoing(self) -> bool:
        """Whether it is not over; one that is over is taken out of the table once."""
        if not self.end.is_over:
            return True
        if self._sock is None:
            self._sock = self  # type: ignore[assignment]  # Marks it.
            self.end.forget()
            self._on_closed(self)
        return False


class _Transport:
    """Replaces a client's transport: an frame_sender, and no message comes."""

    def __init__(self) -> None:
        self.frame_sender = FrameSender()

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        self.frame_sender.close(Frame(OP_CLOSE, b"", code.to_bytes(2, "big")), flush=flush)


def fuzz_client_legs(data: bytes) -> None:
    """A pest server on one leg of a client; the next leg is a good server's."""
    source = Source(data)
    with mock.patch("client.tunnel_table.Forwarder", _Tunnel):
        _fuzz_client_legs(source)


def _fuzz_client_legs(source: Source) -> None:
    tunnels = TunnelTable(_WINDOW, 120)
    good_leg = Leg(_Transport(), tunnels)  # type: ignore[arg-type]
    # The pest knows the good tunnel's id and user, and not its token.
    fields = opening(IDS[0], resume_token="1" * 64)
    good_leg._on_control(encode("open", 1, **fields, user="anna"))
    good, channel = good_leg._channels[1]
    list(drained(channel.frame_sender))
    known = {**opening("0" * 32), "user": "anna"}
    leg = Leg(_Transport(), tunnels)  # type: ignore[arg-type]
    pest = Pest(leg, known)
    while not source.is_empty:
        said = pest.say(source)
        is_gone = source.is_rare(40)
        try:
            if said is not None:
                _receive(leg, *said)
        except LegError as exc:
            assert exc.close_code in (1002, 1007, 1009)
            is_gone = True
        for tunnel in tunnels.alive():
            if tunnel is not good:
                tunnel.advance(source)  # type: ignore[attr-defined]
        _check_said(leg._connection.frame_sender, FROM_CLIENT, has_channel=True)
        if is_gone:
            # As Leg.serve() does, then; the pest is back on another leg.
            tunnels.detach(leg._channels.values(), RelayError("leg_lost", "lost"))
            leg = Leg(_Transport(), tunnels)  # type: ignore[arg-type]
            pest = Pest(leg, known)
    # Before it is used: a tunnel that was taken away would be waited for without end.
    assert good.end.is_at(channel), "the good tunnel was taken away"
    good_leg._on_data(encode_channel(1) + b"there")
    good.end.outbound.send(b"back!")
    assert good.end.inbound.next_chunk() == b"there"
    assert [bytes(f.payload) for f in drained(channel.frame_sender)] == [b"back!"]
    for tunnel in tunnels.alive():
        kept = tunnel.end.stream
        assert 0 <= kept.into.delivered <= kept.into.received <= kept.into.limit
        assert kept.out.kept_bytes <= kept.out.taken


def _receive(leg: Leg, opcode: int, payload: bytes) -> None:
    """As the leg's own loop does with one message."""
    try:
        if opcode == OP_BINARY:
            leg._on_data(payload)
        else:
            leg._on_control(payload)
    except TunnelError as exc:
        leg._fail_tunnel(exc)


SEEDS: dict[str, list[bytes]] = {
    name: [bytes(range(256)) * 2, bytes(400), bytes(range(255, -1, -1)), b"\5\1\2\3\0" * 90]
    for name in ("server_legs", "client_legs")
}
DECODERS: dict[str, Decoder] = {
    "server_legs": fuzz_server_legs,
    "client_legs": fuzz_client_legs,
}
