"""A tunnel between two legs that are outboxes only: what is queued where, and the ends."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.leg.send_queue import Frame
from http_network_relay.wire.codes import CloseCode
from http_network_relay.wire.errors import Refused, TunnelError
from server.tunnels.observer import TunnelObserver
from server.tunnels.tunnel import Tunnel
from tests.support.controls import from_dict
from tests.support.server.fake_legs import (
    CAP,
    MIB,
    OPEN,
    RESUME,
    RESUMED,
    FakeClientLeg,
    FakeUserLeg,
    taken,
)


class Pair:
    """A tunnel, opened or not, with its legs' outboxes emptied."""

    def __init__(
        self,
        *,
        is_opened: bool = True,
        client: FakeClientLeg | None = None,
        first: dict[str, Any] = OPEN,
    ) -> None:
        self.client = client or FakeClientLeg()
        self.user = FakeUserLeg()
        self.tunnel = Tunnel(self.client, self.user, from_dict(first), "token-x", "*")
        with self.client.channels.lock:
            self.first = self.tunnel.assign_locked(CAP)
        if is_opened:
            opened = {"type": "opened", "limit": 300_000, "grace_s": 0}
            self.tunnel.on_client_control(from_dict(dict(RESUMED) if first is RESUME else opened))
            taken(self.user.frame_sender)

    @property
    def to_user(self) -> list[Any]:
        return taken(self.user.frame_sender)

    @property
    def to_client(self) -> list[Any]:
        return taken(self.client.frame_sender)

    def is_gone(self) -> bool:
        channels = self.client.channels
        budgets = channels.up_budget.free, channels.down_budget.free
        return not channels.tunnels and budgets == (64 * MIB, 64 * MIB)


def test_open_is_a_new_object_when_it_is_passed_on() -> None:
    """With channel and user, and the limit as far as the cap allows."""
    client, control = FakeClientLeg(), {**OPEN, "limit": 2**53}
    tunnel = Tunnel(client, FakeUserLeg(), from_dict(control), "token-x", "*")
    with client.channels.lock:
        frame = tunnel.assign_locked(CAP)
    assert json.loads(frame.payload) == {**control, "limit": CAP, "channel": 1, "user": "token-x"}


def test_open_is_refused_busy_when_the_budget_is_used_up() -> None:
    """Room for 256 of the smallest window; the next one waits for one of them to end."""
    client = FakeClientLeg()
    pairs = [Pair(is_opened=False, client=client) for _ in range(256)]

    with pytest.raises(Refused) as caught:
        Pair(is_opened=False, client=client)
    assert caught.value.code == "busy"

    pairs[7].tunnel.user_lost()
    # Channels are numbered on, never used again.
    assert Pair(is_opened=False, client=client).tunnel.channel == 257


def test_open_is_refused_when_the_clients_leg_is_closed() -> None:
    """A leg that is on its way out takes no tunnel."""
    client = FakeClientLeg()
    client.channels.is_closed = True
    with pytest.raises(Refused) as caught:
        Pair(client=client)
    assert caught.value.code == "client_offline"


def test_data_has_the_channel_before_it_when_it_goes_to_the_client() -> None:
    """And none when it comes from there."""
    pair = Pair()
    pair.tunnel.on_user_data(b"up")
    pair.tunnel.on_client_data(memoryview(b"down"))
    assert pair.to_client == [b"\0\0\0\1up"]
    assert pair.to_user == [b"down"]


def reset(code: str) -> dict[str, Any]:
    return {"type": "reset", "code": code, "message": "m"}


End = Callable[[Pair], None]
NOTHING: list[Any] = []
DETACHED_CLIENT = {"type": "detached", "channel": 1, "code": "user_lost"}
# What ends it, before or after `opened`: what the client reads, what the user reads, how the
# user's leg is closed, and the reason in the log (docs/protocol.md, "Ends").
ENDS: dict[str, tuple[bool, End, list[Any], list[Any], list[Any], str]] = {
    "user lost": (
        *(True, lambda pair: pair.tunnel.user_lost()),
        *([DETACHED_CLIENT], NOTHING, [], "user_lost"),
    ),
    "user lost before opened": (
        *(False, lambda pair: pair.tunnel.user_lost()),
        *(
            [{**reset("user_gone"), "channel": 1, "message": "the proxy user's link was lost"}],
            *(NOTHING, [], "user_gone"),
        ),
    ),
    "client lost": (
        *(True, lambda pair: pair.tunnel.client_lost("client_lost"), NOTHING),
        [{"type": "detached", "code": "client_lost"}],
        *([(CloseCode.RESTART, "client_lost")], "client_lost"),
    ),
    "client lost before opened": (
        *(False, lambda pair: pair.tunnel.client_lost("client_lost"), NOTHING),
        [{"type": "refused", "code": "client_offline", "message": "the client's link was lost"}],
        *([(CloseCode.NORMAL, "client_offline")], "client_lost"),
    ),
    "client replaced": (
        *(True, lambda pair: pair.tunnel.client_lost("client_replaced"), NOTHING),
        [{"type": "detached", "code": "client_replaced"}],
        *([(CloseCode.RESTART, "client_replaced")], "client_replaced"),
    ),
    "server restart before opened": (
        *(False, lambda pair: pair.tunnel.client_lost("server_restart"), NOTHING),
        [
            {
                "type": "refused",
                "code": "server_restart",
                "message": "the relay restarts; try again",
            }
        ],
        *([(CloseCode.NORMAL, "server_restart")], "server_restart"),
    ),
    "user gone": (
        *(True, lambda pair: pair.tunnel.on_user_control(from_dict(reset("user_gone")))),
        *([{**reset("user_gone"), "channel": 1}], NOTHING, [], "user_gone"),
    ),
    "user gone before opened": (
        *(False, lambda pair: pair.tunnel.on_user_control(from_dict(reset("user_gone")))),
        *([{**reset("user_gone"), "channel": 1}], NOTHING, [], "user_gone"),
    ),
    "target reset": (
        *(
            True,
            lambda pair: pair.tunnel.on_client_control(from_dict(reset("target_reset"))),
            NOTHING,
        ),
        [reset("target_reset")],
        *([(CloseCode.NORMAL, "target_reset")], "target_reset"),
    ),
    "client stopped before opened": (
        *(
            False,
            lambda pair: pair.tunnel.on_client_control(from_dict(reset("client_stopped"))),
            NOTHING,
        ),
        [{**reset("client_stopped"), "type": "refused"}],
        *([(CloseCode.NORMAL, "client_stopped")], "client_stopped"),
    ),
    "refused": (
        *(
            False,
            lambda pair: pair.tunnel.on_client_control(
                from_dict({**reset("busy"), "type": "refused"})
            ),
        ),
        *(NOTHING, [{**reset("busy"), "type": "refused"}]),
        *([(CloseCode.NORMAL, "busy")], "busy"),
    ),
    "a broken rule": (
        *(True, lambda pair: pair.tunnel.fail(TunnelError("why"))),
        [{"type": "reset", "channel": 1, "code": "protocol_error", "message": "why"}],
        [{"type": "reset", "code": "protocol_error", "message": "why"}],
        *([(CloseCode.NORMAL, "protocol_error")], "protocol_error"),
    ),
    "a broken rule before opened": (
        *(False, lambda pair: pair.tunnel.fail(TunnelError("why"))),
        [{"type": "reset", "channel": 1, "code": "protocol_error", "message": "why"}],
        [{"type": "refused", "code": "protocol_error", "message": "why"}],
        *([(CloseCode.NORMAL, "protocol_error")], "protocol_error"),
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_tunnel_ends_once_and_tells_both_when_it_ends(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One reason, one log line, all budget back; whatever comes later changes nothing."""
    is_opened, end, to_client, to_user, closes, reason = ENDS[case]
    pair = Pair(is_opened=is_opened)
    with caplog.at_level(logging.INFO):
        end(pair)
        assert pair.to_client == to_client
        assert pair.to_user == to_user
        assert pair.user.ends == closes
        assert pair.is_gone()

        pair.tunnel.user_lost()
        pair.tunnel.client_lost("client_lost")
        pair.tunnel.fail(TunnelError("again"))
        pair.tunnel.on_user_data(b"late")
        pair.tunnel.on_client_data(memoryview(b"late"))
        pair.tunnel.on_user_control(from_dict(reset("user_gone")))
        pair.tunnel.on_client_control(from_dict({"type": "eof", "count": 9}))
    assert pair.to_client == pair.to_user == NOTHING
    assert pair.user.ends == closes
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"tunnel closed reason={reason} up=0 down=0 secs=0.")
    assert lines[0].endswith(" client=gw tunnel=abababab user=token-x")


def test_tunnel_is_finished_when_both_final_acks_have_passed() -> None:
    """Then the loss of a leg is nobody's business any more."""
    pair = Pair()
    pair.tunnel.on_user_control(from_dict({"type": "eof", "count": 0}))
    pair.tunnel.on_client_control(from_dict({"type": "eof", "count": 0}))
    final = {"type": "ack", "delivered": 0, "limit": 300_000, "eof": True}
    pair.tunnel.on_client_control(from_dict(final))
    assert not pair.tunnel.is_over
    pair.tunnel.on_user_control(from_dict(final))

    assert pair.tunnel.is_over
    assert pair.is_gone()
    assert pair.user.expects_close == 1
    assert sorted(m["type"] for m in pair.to_client) == ["ack", "eof"]
    assert sorted(m["type"] for m in pair.to_user) == ["ack", "eof"]
    pair.tunnel.user_lost()
    pair.tunnel.client_lost("client_lost")
    assert pair.to_client == pair.to_user == NOTHING


def test_unsent_open_is_taken_back_when_the_user_goes_first() -> None:
    """A client that reads slowly never hears of a tunnel that is over already."""
    client, user = FakeClientLeg(), FakeUserLeg()
    tunnel = Tunnel(client, user, from_dict(dict(OPEN)), "token-x", "*")
    with client.channels.lock:
        frame = tunnel.assign_locked(CAP)
    client.frame_sender.put_first(tunnel.channel, frame, cancellable=True)
    tunnel.user_lost()
    assert taken(client.frame_sender) == NOTHING


def test_reset_deletes_what_waits_except_for_the_ends_that_take_their_turn() -> None:
    """`user_gone` comes behind the bytes; any other reset overtakes them."""
    for code, expected in (("user_gone", [b"\0\0\0\1bytes", "reset"]), ("other", ["reset"])):
        pair = Pair()
        pair.tunnel.on_user_data(b"bytes")
        pair.tunnel.on_user_control(from_dict(reset(code)))
        got = [m["type"] if isinstance(m, dict) else m for m in pair.to_client]
        assert got == expected


# Resumed.


def ack(delivered: int, *, eof: bool = False) -> dict[str, Any]:
    return {"type": "ack", "delivered": delivered, "limit": 2**53, "eof": eof}


def test_resume_is_passed_on_whole_when_it_is_assigned() -> None:
    """All fields of it, channel and user, and the limit as far as the cap allows."""
    pair = Pair(is_opened=False, first={**RESUME, "limit": 2**53})
    assert json.loads(pair.first.payload) == {
        **{**RESUME, "limit": 4000 + CAP},
        **{"channel": 1, "user": "token-x"},
    }


def test_resumed_is_the_users_first_message_when_the_client_accepts() -> None:
    """With the counts of the client's end, and a limit that is lowered as for `opened`."""
    pair = Pair(is_opened=False, first=RESUME)
    pair.tunnel.on_client_control(from_dict({**RESUMED, "channel": 1, "limit": 2**53}))
    assert pair.to_user == [{**RESUMED, "limit": 600 + CAP}]


def test_counts_go_on_where_the_ends_stand_when_a_tunnel_is_resumed() -> None:
    """Down from the `resume`, up from the `resumed`; eof and its ack pass on the new channel."""
    pair = Pair(first=RESUME)
    pair.tunnel.on_client_data(memoryview(b"d" * 1000))
    pair.tunnel.on_user_data(b"u" * 300)
    pair.tunnel.on_user_control(from_dict(ack(6000)))
    pair.tunnel.on_client_control(from_dict(ack(1000)))
    pair.tunnel.on_user_control(from_dict({"type": "eof", "count": 1000}))
    pair.tunnel.on_client_control(from_dict({"type": "eof", "count": 6000}))
    pair.tunnel.on_user_control(from_dict(ack(6000, eof=True)))
    pair.tunnel.on_client_control(from_dict(ack(1000, eof=True)))
    assert pair.is_gone()
    assert pair.user.expects_close == 1


BEYOND: dict[str, End] = {
    "the client sends beyond the limit": lambda pair: [
        pair.tunnel.on_client_data(memoryview(bytes(65536))) for _ in range(5)
    ][-1],
    "the user sends beyond the limit": lambda pair: [
        pair.tunnel.on_user_data(bytes(65536)) for _ in range(5)
    ][-1],
    "the user acks less than it said": lambda pair: pair.tunnel.on_user_control(
        from_dict(ack(3999))
    ),
    "the user acks more than it has": lambda pair: pair.tunnel.on_user_control(
        from_dict(ack(5001))
    ),
    "the client acks less than it said": lambda pair: pair.tunnel.on_client_control(
        from_dict(ack(599))
    ),
    "the client acks more than it has": lambda pair: pair.tunnel.on_client_control(
        from_dict(ack(701))
    ),
    "the user's eof is not at its end": lambda pair: pair.tunnel.on_user_control(
        from_dict({"type": "eof", "count": 699})
    ),
    "an eof of the old channel is acked": lambda pair: pair.tunnel.on_client_control(
        from_dict(ack(700, eof=True))
    ),
    "resumed comes twice": lambda pair: pair.tunnel.on_client_control(from_dict(dict(RESUMED))),
}


@pytest.mark.parametrize("case", BEYOND)
def test_resumed_tunnel_breaks_a_rule_when(case: str) -> None:
    """The counts of a resume bind both ends as those of an open do."""
    pair = Pair(first=RESUME)
    with pytest.raises(TunnelError):
        BEYOND[case](pair)


def test_resume_takes_nothing_when_its_counts_cannot_be_true() -> None:
    """No channel, and no budget."""
    client = FakeClientLeg()
    with pytest.raises(TunnelError):
        Pair(client=client, first={**RESUME, "delivered": 5001})
    assert client.channels.highest == 0
    assert client.channels.up_budget.free == client.channels.down_budget.free == 64 * MIB


def test_resumed_is_an_error_when_its_counts_cannot_be_true() -> None:
    """The user is refused; the client's tunnel is detached, not ended."""
    pair = Pair(is_opened=False, first=RESUME)
    with pytest.raises(TunnelError) as caught:
        pair.tunnel.on_client_control(from_dict({**RESUMED, "delivered": 701}))
    pair.tunnel.fail(caught.value)
    assert pair.to_client == [DETACHED_CLIENT]
    assert [message["type"] for message in pair.to_user] == ["refused"]


@pytest.mark.parametrize(
    ("first", "answer"),
    [(OPEN, RESUMED), (RESUME, {"type": "opened", "limit": 700, "grace_s": 0})],
)
def test_answer_is_an_error_when_it_answers_the_other_request(
    first: dict[str, Any], answer: dict[str, Any]
) -> None:
    """`opened` answers `open`, and `resumed` answers `resume`."""
    pair = Pair(is_opened=False, first=first)
    with pytest.raises(TunnelError):
        pair.tunnel.on_client_control(from_dict(answer))


# What ends a `resume` before its answer -> what the user reads, and the reason in the log.
EARLY: dict[str, tuple[End, list[Any], str]] = {
    "user lost": (lambda pair: pair.tunnel.user_lost(), NOTHING, "user_lost"),
    "a broken rule": (
        lambda pair: pair.tunnel.fail(TunnelError("why")),
        [{"type": "refused", "code": "protocol_error", "message": "why"}],
        "protocol_error",
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_tunnel_is_detached_at_the_client_when_a_resume_ends_before_its_answer(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its token was not checked yet: whoever sent it must not be able to end the tunnel."""
    end, to_user, reason = EARLY[case]
    pair = Pair(is_opened=False, first=RESUME)
    with caplog.at_level(logging.INFO):
        end(pair)
    assert pair.to_client == [DETACHED_CLIENT]
    assert pair.to_user == to_user
    assert pair.is_gone()
    assert [r.getMessage().split()[2] for r in caplog.records] == [f"reason={reason}"]


def test_users_reset_is_passed_on_when_its_resume_has_no_answer_yet() -> None:
    """A client that refuses the resume drops it; one that accepts it has checked the token."""
    pair = Pair(is_opened=False, first=RESUME)
    pair.tunnel.on_user_control(from_dict(reset("user_gone")))
    assert pair.to_client == [{**reset("user_gone"), "channel": 1}]
    assert pair.to_user == NOTHING
    assert pair.is_gone()


@pytest.mark.parametrize("case", EARLY)
def test_nothing_is_sent_when_a_resume_ends_unsent(case: str) -> None:
    """It is taken back, and so the client never hears of it."""
    pair = Pair(is_opened=False, first=RESUME)
    pair.client.frame_sender.put_first(1, pair.first, cancellable=True)
    EARLY[case][0](pair)
    assert pair.to_client == NOTHING


def test_client_lost_refuses_the_user_when_a_resume_is_unanswered() -> None:
    """As for an `open`: it may try again."""
    pair = Pair(is_opened=False, first=RESUME)
    pair.tunnel.client_lost("client_lost")
    assert [message["code"] for message in pair.to_user] == ["client_offline"]
    assert pair.to_client == NOTHING


def test_reset_reaches_the_client_when_a_resumed_tunnel_ends() -> None:
    """After `resumed` the user's end is as good as the one that opened it."""
    pair = Pair(first=RESUME)
    pair.tunnel.on_user_control(from_dict(reset("user_gone")))
    assert pair.to_client == [{**reset("user_gone"), "channel": 1}]


def test_old_leg_is_shut_when_its_tunnel_is_resumed_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`reset superseded` overtakes what waits there; what waits for the client is dropped."""
    pair = Pair()
    pair.tunnel.on_user_data(b"late")
    pair.tunnel.on_client_data(memoryview(b"late"))
    with caplog.at_level(logging.INFO):
        pair.tunnel.on_client_control(from_dict(reset("superseded")))
    assert pair.to_user == [reset("superseded")]
    assert pair.to_client == NOTHING
    assert pair.user.ends == [(CloseCode.NORMAL, "superseded")]
    assert caplog.records[-1].getMessage().startswith("tunnel closed reason=superseded ")


def test_attempt_is_logged_and_no_token_when_a_tunnel_is_resumed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line."""
    token = "5ec7e7" + "0" * 58
    pair = Pair(is_opened=False, first={**RESUME, "resume_token": token})
    with caplog.at_level(logging.INFO):
        pair.tunnel.log_start()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["tunnel resumed attempt=3 client=gw tunnel=abababab user=token-x"]


def test_client_is_full_when_it_has_as_many_tunnels_as_it_may_have() -> None:
    """One that ends makes room at once, and a `resume` does not count beside its own channel."""
    client = FakeClientLeg(tunnels_at_most=2)
    first = Pair(client=client)
    Pair(client=client, first={**OPEN, "tunnel_id": "cd" * 16})
    newcomer = {**OPEN, "tunnel_id": "ef" * 16}
    with pytest.raises(Refused, match=r"as may be .2.") as caught:
        Pair(client=client, first=newcomer, is_opened=False)
    assert caught.value.code == "client_full"
    Pair(client=client, first=RESUME)  # Of the first one's id.
    with pytest.raises(Refused):
        Pair(client=client, first=newcomer, is_opened=False)
    first.tunnel.user_lost()
    for tunnel in list(client.channels.tunnels.values())[:1]:
        tunnel.user_lost()
    Pair(client=client, first=newcomer, is_opened=False)


def test_record_is_told_of_the_start_and_of_the_end_once() -> None:
    """Whatever ends it, and also what was never opened."""
    told: list[tuple[str, bool]] = []

    class Noting(TunnelObserver[Tunnel]):
        def accepted(self, tunnel: Tunnel) -> None:
            told.append(("accepted", tunnel.is_opened))

        def ended(self, tunnel: Tunnel, reason: str) -> None:
            told.append((reason, tunnel.is_opened))

    for answer in ("opened", "refused"):
        client = FakeClientLeg()
        tunnel = Tunnel(
            client, FakeUserLeg(), from_dict(dict(OPEN)), "token-x", "*", observer=Noting()
        )
        with client.channels.lock:
            tunnel.assign_locked(CAP)
        if answer == "opened":
            tunnel.on_client_control(from_dict({"type": "opened", "limit": 300_000, "grace_s": 0}))
        else:
            refused = {"type": "refused", "code": "target_refused", "message": ""}
            tunnel.on_client_control(from_dict(refused))
        tunnel.user_lost()
        tunnel.client_lost("client_lost")
    assert told == [("accepted", True), ("user_lost", True), ("target_refused", False)]


# What each end is told, and by what: the reason for the record, then who is told of it.
ENDINGS: list[tuple[str, Callable[[Tunnel], None], list[str]]] = [
    ("user_lost", lambda tunnel: tunnel.user_lost(), ["client"]),
    ("client_lost", lambda tunnel: tunnel.client_lost("client_lost"), ["user"]),
    ("max_age", lambda tunnel: tunnel.fail(TunnelError("", code="max_age")), ["client", "user"]),
    (
        "user_gone",
        lambda tunnel: tunnel.on_user_control(
            from_dict({"type": "reset", "code": "user_gone", "message": ""})
        ),
        ["client"],
    ),
    (
        "target_failed",
        lambda tunnel: tunnel.on_client_control(
            from_dict({"type": "reset", "code": "target_failed", "message": ""})
        ),
        ["user"],
    ),
]


@pytest.mark.parametrize(
    ("reason", "end", "who"), [pytest.param(*each, id=each[0]) for each in ENDINGS]
)
def test_record_is_told_before_an_end_can_know(
    reason: str, end: Callable[[Tunnel], None], who: list[str]
) -> None:
    """Whoever is told may come back at once: the audit log has the lines in order even then."""
    told: list[str] = []

    class NotingOutbox(FrameSender):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def put_first(self, channel: int, frame: Frame, *, cancellable: bool = False) -> None:
            told.append(self.name)
            super().put_first(channel, frame, cancellable=cancellable)

        def put_end(self, channel: int, frame: Frame, *, in_turn: bool = False) -> None:
            told.append(self.name)
            super().put_end(channel, frame, in_turn=in_turn)

    class Noting(TunnelObserver[Tunnel]):
        def accepted(self, tunnel: Tunnel) -> None:
            told.append("accepted")

        def ended(self, tunnel: Tunnel, reason: str) -> None:
            told.append(reason)

    client, user = FakeClientLeg(), FakeUserLeg()
    client.frame_sender, user.frame_sender = NotingOutbox("client"), NotingOutbox("user")
    tunnel = Tunnel(client, user, from_dict(dict(OPEN)), "token-x", "*", observer=Noting())
    with client.channels.lock:
        tunnel.assign_locked(CAP)
    tunnel.on_client_control(from_dict({"type": "opened", "limit": 300_000, "grace_s": 0}))
    end(tunnel)
    assert told == ["accepted", "user", reason, *who]
