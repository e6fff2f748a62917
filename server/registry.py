"""The slots of a worker, and the leg of each client. No I/O under its lock.

"Where is this client connected?" is asked here and nowhere else.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from http_network_relay.wire.codes import CloseCode, Code
from http_network_relay.wire.errors import Refused
from server.access.credentials import Login

# Of the slots, at most this part goes to clients: a fleet must not lock the users out.
_CLIENTS_PART = (3, 4)

LegT = TypeVar("LegT")


@dataclass(eq=False)
class Slot(Generic[LegT]):
    """The right to one thread for one leg. Slots are compared by identity.

    `tunnel_id`, `leg` and `close_code` are guarded by the registry's lock.
    """

    login: Login
    address: str
    instance: str = ""
    # The tunnel of a user's leg, once its id is known.
    tunnel_id: str = ""
    leg: LegT | None = field(default=None, repr=False)
    # Set when a newer leg of the same client has taken the slot over.
    close_code: int = 0

    @property
    def kind(self) -> str:
        """Either "client" or "user"."""
        return self.login.kind

    @property
    def name(self) -> str:
        """The client's or the proxy user's."""
        return self.login.name


class Registry(Generic[LegT]):
    """Slots of one worker, and its clients by name."""

    def __init__(self) -> None:
        # Guards everything below.
        self._lock = threading.Lock()
        self._capacity = 0
        self._is_draining = False
        self._slots: set[Slot[LegT]] = set()
        self._clients: dict[str, Slot[LegT]] = {}

    def set_capacity(self, slots: int) -> None:
        """Set how many legs there is room for."""
        with self._lock:
            self._capacity = slots

    @property
    def clients_at_most(self) -> int:
        """How many slots may go to clients: always one, never all if there are more."""
        return max(1, self._capacity * _CLIENTS_PART[0] // _CLIENTS_PART[1])

    def admit_client(
        self, login: Login, instance: str, address: str
    ) -> tuple[Slot[LegT], Slot[LegT] | None]:
        """Return a slot, and the older slot that it takes the place of, if any.

        The caller ends the older slot's leg with its `close_code`. Raises Refused.
        """
        name = login.name
        new: Slot[LegT] = Slot(login, address, instance)
        with self._lock:
            self._check_draining_locked()
            old = self._clients.get(name)
            if old is None:
                self._check_room_locked()
                if len(self._clients) >= self.clients_at_most:
                    raise Refused(Code.BUSY, "the relay has no room for another client")
            else:
                same = old.instance == instance
                old.close_code = CloseCode.REPLACED_BY_SELF if same else CloseCode.REPLACED_BY_OTHER
                self._slots.discard(old)
            self._slots.add(new)
            self._clients[name] = new
        return new, old

    def admit_user(
        self, login: Login, address: str, tunnel_id: str = ""
    ) -> tuple[Slot[LegT], list[Slot[LegT]]]:
        """Return a slot, and the older ones of this user and tunnel that it takes the place of.

        The caller ends the older slots' legs. Raises Refused.
        """
        new: Slot[LegT] = Slot(login, address, tunnel_id=tunnel_id)
        with self._lock:
            self._check_draining_locked()
            # Linear search: at most one slot per thread, so an index is not worth keeping
            # consistent. One is found at most, but for ends that did not name their tunnel.
            olds = [slot for slot in self._slots if tunnel_id and _is_same_tunnel(slot, new)]
            if not olds:
                self._check_room_locked()
            self._slots.difference_update(olds)
            self._slots.add(new)
        return new, olds

    def bind(self, slot: Slot[LegT], tunnel_id: str) -> None:
        """Note which tunnel a user's leg serves."""
        with self._lock:
            slot.tunnel_id = tunnel_id

    def attach(self, slot: Slot[LegT], leg: LegT) -> bool:
        """Make `leg` the slot's; False if the slot was taken over or drained meanwhile."""
        with self._lock:
            if slot not in self._slots or self._is_draining:
                return False
            slot.leg = leg
            return True

    def release(self, slot: Slot[LegT]) -> None:
        """Give that very slot back; nothing if it has been taken over."""
        with self._lock:
            self._slots.discard(slot)
            if self._clients.get(slot.name) is slot:
                del self._clients[slot.name]

    def client_leg(self, name: str) -> LegT | None:
        """Return the leg of the client of that name."""
        with self._lock:
            slot = self._clients.get(name)
            return slot.leg if slot is not None else None

    def drain(self) -> list[LegT]:
        """Admit nobody any more; return all legs."""
        with self._lock:
            self._is_draining = True
            return [slot.leg for slot in self._slots if slot.leg is not None]

    @property
    def is_draining(self) -> bool:
        """Whether drain() was called."""
        with self._lock:
            return self._is_draining

    def __len__(self) -> int:
        with self._lock:
            return len(self._slots)

    def _check_draining_locked(self) -> None:
        assert self._lock.locked()
        if self._is_draining:
            raise Refused(Code.SERVER_RESTART, "the relay restarts; try again")

    def _check_room_locked(self) -> None:
        assert self._lock.locked()
        if len(self._slots) >= self._capacity:
            raise Refused(Code.BUSY, "the relay has no free slot; try again later")


def _is_same_tunnel(old: Slot[LegT], new: Slot[LegT]) -> bool:
    mine = (new.kind, new.name, new.tunnel_id)
    return (old.kind, old.name, old.tunnel_id) == mine
