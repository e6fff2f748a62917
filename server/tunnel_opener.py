"""Opens tunnels for one user leg: looks the client up, asks the limits, takes a channel."""

from __future__ import annotations

from http_network_relay.wire.codes import Code
from http_network_relay.wire.controls import Opening, type_of
from http_network_relay.wire.errors import Refused
from server.access.access import Access
from server.legs.client_leg import ClientLeg
from server.legs.leg import Leg
from server.legs.user_leg import UserLeg
from server.limits.policy import Policy, PolicyObserver
from server.registry import Registry, Slot
from server.tunnels.tunnel import Tunnel


class SlotOpener:
    """Opens the tunnel of the user leg in one slot. Called under that leg's lock, or by reader."""

    def __init__(
        self,
        slot: Slot[Leg],
        registry: Registry[Leg],
        access: Access,
        policy: Policy,
        max_window_bytes: int,
    ) -> None:
        self._slot = slot
        self._registry = registry
        self._access = access
        self._policy = policy
        self._max_window_bytes = max_window_bytes
        self._is_counted = False

    def open(self, leg: UserLeg, control: Opening) -> Tunnel:
        """Pair the leg with a channel of the client that the control names.

        For `open` and `resume` alike. Raises Refused, TunnelError.
        """
        slot = self._slot
        self._registry.bind(slot, control.tunnel_id)
        # Once: a `resume` that waits for its client comes here again.
        if not self._is_counted:
            self._is_counted = True
            self._policy.limits.count_open(slot.name, type_of(control))
        if self._registry.is_draining:
            raise Refused(Code.SERVER_RESTART, "the relay restarts; try again")
        rule = self._access.check_open(slot.name, control)
        client_leg = self._registry.client_leg(control.client)
        if not isinstance(client_leg, ClientLeg):
            raise Refused(Code.CLIENT_OFFLINE, f"the client {control.client} is not connected")
        observer = PolicyObserver(self._policy, control, slot.name, slot.address, rule)
        tunnel = Tunnel(client_leg, leg, control, slot.name, rule, observer=observer)
        self._policy.limits.admit(slot.name, tunnel)
        try:
            client_leg.open(tunnel, self._max_window_bytes)
        except BaseException:
            self._policy.limits.forget(slot.name, tunnel)
            raise
        return tunnel

    def refused(self, control: Opening, reason: str) -> None:
        """Write that the leg has ended, and its first message made no tunnel."""
        self._policy.refused(control, self._slot.name, self._slot.address, reason)
