"""Slots and takeover."""

import pytest

from http_network_relay.wire.codes import Code
from http_network_relay.wire.errors import Refused
from server.access.credentials import Login
from server.registry import Registry, Slot

A, B = "a" * 32, "b" * 32


def registry(slots: int) -> Registry[str]:
    made: Registry[str] = Registry()
    made.set_capacity(slots)
    return made


def code_of(caught: pytest.ExceptionInfo[Refused]) -> tuple[str, int, int]:
    code = Code(caught.value.code)
    return code, code.http_status, code.retry_after_s


def user(name: str) -> Login:
    return Login("user", name, b"")


def client(name: str) -> Login:
    return Login("client", name, b"")


def test_admit_refuses_when_all_slots_are_taken() -> None:
    """One more than there is room for is told to come back; a released slot is free at once."""
    reg = registry(3)
    slots = [reg.admit_user(user("u"), "addr")[0] for _ in range(3)]

    with pytest.raises(Refused) as caught:
        reg.admit_user(user("u"), "addr")
    assert code_of(caught) == ("busy", 503, 5)

    reg.release(slots[1])
    reg.admit_user(user("u"), "addr")


def test_admit_refuses_clients_when_three_quarters_are_theirs() -> None:
    """A fleet of clients never locks the proxy users out."""
    reg = registry(8)
    assert reg.clients_at_most == 6
    for number in range(6):
        reg.admit_client(client(f"c{number}"), A, "addr")

    with pytest.raises(Refused) as caught:
        reg.admit_client(client("c6"), A, "addr")

    assert code_of(caught)[0] == "busy"
    reg.admit_user(user("u"), "addr")


def test_one_client_is_admitted_when_there_are_two_slots() -> None:
    """The smallest relay still works."""
    reg = registry(2)
    reg.admit_client(client("c"), A, "addr")
    reg.admit_user(user("u"), "addr")


@pytest.mark.parametrize(("instance", "close_code"), [(A, 4408), (B, 4409)])
def test_newcomer_takes_the_slot_over_when_the_client_is_there(
    instance: str, close_code: int
) -> None:
    """The newer leg of a client wins at once, also on a full relay, and says who lost."""
    reg = registry(2)
    old, nobody = reg.admit_client(client("c"), A, "addr")
    assert nobody is None
    assert reg.attach(old, "old leg")
    reg.admit_user(user("u"), "addr")

    new, replaced = reg.admit_client(client("c"), instance, "addr")

    assert replaced is old
    assert old.close_code == close_code
    assert len(reg) == 2
    assert reg.client_leg("c") is None
    assert reg.attach(new, "new leg")
    assert reg.client_leg("c") == "new leg"


def test_release_of_the_loser_gives_nothing_back() -> None:
    """The old request's teardown leaves the new leg and its slot alone."""
    reg = registry(1)
    old, _ = reg.admit_client(client("c"), A, "addr")
    new, _ = reg.admit_client(client("c"), A, "addr")
    assert reg.attach(new, "new leg")

    reg.release(old)

    assert reg.client_leg("c") == "new leg"
    with pytest.raises(Refused):
        reg.admit_user(user("u"), "addr")
    reg.release(new)
    assert reg.client_leg("c") is None
    assert len(reg) == 0


def test_attach_fails_when_the_slot_was_taken_over_meanwhile() -> None:
    """A leg whose upgrade took longer than its successor's is not registered."""
    reg = registry(4)
    old, _ = reg.admit_client(client("c"), A, "addr")
    new, _ = reg.admit_client(client("c"), B, "addr")

    assert reg.attach(new, "new leg")
    assert not reg.attach(old, "old leg")
    assert reg.client_leg("c") == "new leg"


def test_nothing_is_admitted_or_attached_when_draining() -> None:
    """After drain() newcomers are told to come back in a second."""
    reg = registry(4)
    slot, _ = reg.admit_user(user("u"), "addr")
    late, _ = reg.admit_client(client("c"), A, "addr")
    assert reg.attach(slot, "leg")

    assert reg.drain() == ["leg"]

    assert not reg.attach(late, "late leg")
    for admit in (
        lambda: reg.admit_user(user("u"), "x"),
        lambda: reg.admit_client(client("d"), A, "x"),
    ):
        with pytest.raises(Refused) as caught:
            admit()
        assert code_of(caught) == ("server_restart", 503, 1)


def test_nothing_is_admitted_when_no_worker_said_how_much() -> None:
    """The default room is none."""
    with pytest.raises(Refused):
        registry(0).admit_user(user("u"), "addr")


def test_newcomer_takes_the_slot_over_when_its_tunnel_has_one() -> None:
    """Also on a full relay; the old request's teardown then gives nothing back."""
    reg = registry(2)
    old, nobody = reg.admit_user(user("u"), "addr")
    assert nobody == []
    assert reg.attach(old, "old leg")
    reg.bind(old, A)
    reg.admit_user(user("u"), "addr")

    new, olds = reg.admit_user(user("u"), "addr", A)

    assert olds == [old]
    assert len(reg) == 2
    reg.release(old)
    assert len(reg) == 2
    assert reg.attach(new, "new leg")
    # It serves that tunnel from the start: its own link may fail before its `resume`.
    assert reg.admit_user(user("u"), "addr", A)[1] == [new]


@pytest.mark.parametrize(("name", "tunnel_id"), [("v", A), ("u", B), ("u", "")])
def test_nothing_is_taken_over_when_user_or_tunnel_differ(name: str, tunnel_id: str) -> None:
    """Another user's tunnel never matches, nor does a leg that names none."""
    reg = registry(2)
    old, _ = reg.admit_user(user("u"), "addr")
    reg.bind(old, A)
    unbound, _ = reg.admit_client(client("c"), A, "addr")

    with pytest.raises(Refused) as caught:
        reg.admit_user(user(name), "addr", tunnel_id)
    assert code_of(caught)[0] == "busy"

    reg.release(unbound)
    assert reg.admit_user(user(name), "addr", tunnel_id)[1] == []


def test_attach_fails_when_a_newer_leg_of_the_tunnel_came_meanwhile() -> None:
    """As for clients: a leg whose upgrade took longer than its successor's is none."""
    reg = registry(2)
    old, _ = reg.admit_user(user("u"), "addr", A)
    new, olds = reg.admit_user(user("u"), "addr", A)
    assert olds == [old]
    assert not reg.attach(old, "old leg")
    assert reg.attach(new, "new leg")


def test_takeover_is_refused_when_draining() -> None:
    """A server that stops keeps nobody from going elsewhere, and takes nobody."""
    reg = registry(2)
    old, _ = reg.admit_user(user("u"), "addr", A)
    reg.attach(old, "leg")
    reg.drain()
    with pytest.raises(Refused) as caught:
        reg.admit_user(user("u"), "addr", A)
    assert code_of(caught)[0] == "server_restart"
    assert len(reg) == 1


def test_slots_are_told_apart_by_identity() -> None:
    """Two slots of the same user from the same address are two slots."""
    first: Slot[str] = Slot(user("u"), "addr")
    second: Slot[str] = Slot(user("u"), "addr")
    assert first != second
    assert len({first, second}) == 2
