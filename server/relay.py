"""The relay of one worker process: admits legs, opens tunnels, drains.

Builds and owns registry, timer, sender and legs. Threads: handlers (admit, serve, release),
the worker's main thread (start, drain, stop, join).
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from typing import Any

from http_network_relay.wire.codes import CLOSE_REPLACED_BY_OTHER, CLOSE_RESTART
from http_network_relay.wire.controls import Opening, type_of
from http_network_relay.wire.errors import Refused
from server.access.access import Access
from server.access.credentials import Credentials, Login
from server.access.file_watch import FileWatch
from server.config import LEG_BUDGET_BYTES, Config
from server.legs.client_leg import ClientLeg
from server.legs.leg import Helpers, Leg
from server.legs.pending_resumes import PendingResumes
from server.legs.sender import LegSender
from server.legs.timer import Timer
from server.legs.user_leg import UserLeg
from server.legs.websocket import Connection
from server.limits.policy import Policy, PolicyObserver
from server.logs import ROOT_NAME
from server.registry import Registry, Slot
from server.tunnels.tunnel import Tunnel

_log = logging.getLogger(f"{ROOT_NAME}.relay")

# CPython's 5 ms let one busy leg's thread delay a keystroke on another by that much.
_SWITCH_INTERVAL_S = 0.0005
# How far apart peers should come back after a restart: about what a TLS handshake and an upgrade
# take of us. Not more: all of some 150 legs are to have their turn before the worker ends them.
SPREAD_MS_PER_LEG = 3


class Relay:
    """Everything that the legs of one process share."""

    def __init__(
        self, config: Config, credentials: Credentials, watch: FileWatch | None = None
    ) -> None:
        self._access = Access(credentials, watch, self._enforce_all)
        self._config = config
        self.guard = Policy(config)
        self._registry: Registry[Leg] = Registry()
        self._held: PendingResumes[UserLeg] = PendingResumes()
        self._timer = Timer()
        self._sender = LegSender()
        self._helpers = Helpers(self._timer.look, self._sender.call)
        self._is_started = False
        # One line is enough: peers retry for ever.
        self._has_complained = False
        # Guards the replacement of _legs, which itself is never changed; told of each.
        self._legs_changed = threading.Condition()
        self._legs: tuple[Leg, ...] = ()

    def start(self, slots: int) -> None:
        """Open for business, with room for `slots` legs. In the worker process, once."""
        self._registry.set_capacity(slots)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        # What is there now stays: no collection, which stops all threads, need look at it.
        gc.freeze()
        self._timer.start()
        self._sender.start()
        self._access.start()
        self.guard.start()
        self._is_started = True
        _log.info(
            "relay ready legs=%d clients_at_most=%d ping_interval_s=%g max_window_bytes=%d",
            slots,
            self._registry.clients_at_most,
            self._config.ping_interval_s,
            self._config.max_window_bytes,
        )

    @property
    def credentials(self) -> Credentials:
        """Who may connect, as it stands now."""
        return self._access.credentials

    def check_started(self) -> None:
        """Raise Refused where no worker of ours has started the relay."""
        if self._is_started:
            return
        if not self._has_complained:
            self._has_complained = True
            _log.error(
                "websockets are refused code=wrong_worker fix='run gunicorn in the project's "
                "root, where it reads gunicorn.conf.py, without -k and -c; or python -m server'"
            )
        raise Refused("wrong_worker", "the relay runs under the wrong gunicorn worker class")

    @property
    def config(self) -> Config:
        """The settings."""
        return self._config

    @property
    def is_draining(self) -> bool:
        """Whether nobody is admitted any more."""
        return self._registry.is_draining

    # A leg's life: admit, attach (before the upgrade's answer), serve, release.

    def admit_client(self, login: Login, instance: str, address: str) -> Slot[Leg]:
        """Return a slot; an older leg of that client ends here. Raises Refused."""
        slot, old = self._registry.admit_client(login, instance, address)
        if old is not None:
            if old.close_code == CLOSE_REPLACED_BY_OTHER:
                _log.warning(
                    "client replaced by another instance client=%s old_address=%s "
                    "old_instance=%s new_address=%s new_instance=%s",
                    *(login.name, old.address, old.instance[:8], address, instance[:8]),
                )
            if isinstance(old.leg, ClientLeg):
                old.leg.replace(old.close_code)
        return slot

    def admit_user(self, login: Login, address: str, tunnel_id: str) -> Slot[Leg]:
        """Return a slot; an older leg of that user's tunnel ends here. Raises Refused."""
        slot, olds = self._registry.admit_user(login, address, tunnel_id)
        for old in olds:
            if isinstance(old.leg, UserLeg):
                old.leg.replace()
        return slot

    def attach(self, slot: Slot[Leg], transport: Connection) -> None:
        """Make the slot's leg, before the peer is told that it is connected.

        A client that has its answer can be reached: a proxy user who comes in the next
        instant finds it. Its `open` waits in the outbox until serve().
        """
        interval_s = self._config.ping_interval_s
        is_spent = False

        def open_tunnel(leg: UserLeg, control: Opening) -> Tunnel:
            nonlocal is_spent
            self._registry.bind(slot, control.tunnel_id)
            # Once: a `resume` that waits for its client comes here again.
            if not is_spent:
                is_spent = True
                self.guard.limits.spend(slot.name, type_of(control))
            return self._open_tunnel(leg, control, slot.name, slot.address)

        def refused(control: Opening, reason: str) -> None:
            self.guard.refused(control, slot.name, slot.address, reason)

        leg: Leg
        if slot.kind == "client":
            leg = ClientLeg(transport, slot.name, interval_s, self._helpers, LEG_BUDGET_BYTES)
            leg.channels.tunnels_at_most = self._config.tunnels_per_client
        else:
            first_s = self._config.handshake_timeout_s
            leg = UserLeg(
                *(transport, slot.name, interval_s, self._helpers),
                *(open_tunnel, self._held, first_s),
            )
            leg.on_refused = refused
        leg.login = slot.login
        if not self._registry.attach(slot, leg):
            raise Refused("server_restart", "a newer connection came; try again")

    def serve(self, slot: Slot[Leg], websocket: Any) -> None:
        """Run the slot's leg to its end, in the handler's thread."""
        leg = slot.leg
        if leg is None:
            raise ValueError("serve() without attach()")
        thread = threading.current_thread()
        thread_name, thread.name = thread.name, f"{slot.kind}-leg:{slot.name}"
        # Before the question: a drain that it does not see finds the leg in the list.
        self._change_legs(add=leg)
        if self._registry.is_draining:
            leg.end(CLOSE_RESTART, "server_restart")
        # It may have been let in by credentials that are not in force any more.
        self._enforce(leg)
        started_at = time.monotonic()
        fields = f"{slot.kind}={slot.name} address={slot.address}"
        if slot.instance:
            fields += f" instance={slot.instance[:8]}"
        _log.info("leg up %s", fields)
        self.guard.leg_up(slot.kind, slot.name, slot.address)
        try:
            if slot.kind == "client":
                self._held.open_for(slot.name)
            leg.run(websocket)
        finally:
            secs = time.monotonic() - started_at
            # Before join() can return: what comes after the stop is not written.
            self.guard.leg_down(slot.kind, slot.name, slot.address, leg.reason, secs)
            self._change_legs(drop=leg)
            thread.name = thread_name
            _log.info("leg down reason=%s secs=%.1f %s", leg.reason, secs, fields)

    def release(self, slot: Slot[Leg]) -> None:
        """Give a slot back; every admitted slot comes here once."""
        self._registry.release(slot)
        if slot.leg is not None:
            # Only where the upgrade failed is there anything left to tell.
            slot.leg.lost()

    def _change_legs(self, *, add: Leg | None = None, drop: Leg | None = None) -> None:
        with self._legs_changed:
            legs = [leg for leg in self._legs if leg is not drop]
            self._legs = (*legs, add) if add is not None else tuple(legs)
            self._legs_changed.notify_all()
        if add is not None:
            self._timer.add(add)
        if drop is not None:
            self._timer.drop(drop)

    def _open_tunnel(self, leg: UserLeg, control: Opening, user: str, address: str) -> Tunnel:
        """Pair a user's leg with a channel of the client that it names.

        For `open` and `resume` alike. Raises Refused, TunnelError.
        """
        name = control.client
        if self._registry.is_draining:
            raise Refused("server_restart", "the relay restarts; try again")
        rule = self._access.check_open(user, control)
        client_leg = self._registry.client_leg(name)
        if not isinstance(client_leg, ClientLeg):
            raise Refused("client_offline", f"the client {name} is not connected")
        record = PolicyObserver(self.guard, control, user, address, rule)
        tunnel = Tunnel(client_leg, leg, control, user, rule, record=record)
        self.guard.limits.admit(user, tunnel)
        try:
            client_leg.open(tunnel, self._config.max_window_bytes)
        except BaseException:
            self.guard.limits.forget(user, tunnel)
            raise
        return tunnel

    # What was revoked.

    def _enforce_all(self) -> None:
        """The credentials have changed: end what they do not allow any more."""
        failure: Exception | None = None
        for leg in self._legs:
            try:
                self._enforce(leg)
            except Exception as exc:
                failure = exc  # The others have their turn first; then all are asked again.
        if failure is not None:
            raise failure

    def _enforce(self, leg: Leg) -> None:
        if leg.login is None:
            return
        if not self.credentials.is_valid(leg.login):
            leg.revoke("revoked", f"the access of {leg.login.name} was revoked, or has expired")
        elif isinstance(leg, UserLeg) and (tunnel := leg.opened_tunnel()) is not None:
            try:
                self._access.check_open(leg.login.name, tunnel.asked)
            except Refused as exc:
                leg.revoke(exc.code, exc.message)

    # The end.

    def drain(self) -> None:
        """Refuse newcomers, and tell all legs; their tunnels go on. Does not wait."""
        self._registry.drain()
        self._held.open_all()
        legs = self._legs
        _log.info("relay draining legs=%d", len(legs))
        for leg in legs:
            leg.going_away(SPREAD_MS_PER_LEG * len(legs))

    def end(self) -> None:
        """Give all tunnels up, and let each leg flush and close. Does not wait."""
        legs = self._legs
        # Clients first: they end the tunnels, and say so to the users.
        for leg in legs:
            if isinstance(leg, ClientLeg):
                leg.end_tunnels("server_restart")
        for leg in legs:
            leg.end(CLOSE_RESTART, "server_restart")

    def stop(self) -> None:
        """Shut every leg down at once."""
        for leg in self._legs:
            leg.abort("server_restart")

    def join(self, timeout_s: float) -> bool:
        """Wait until all legs have ended; False if some have not."""
        with self._legs_changed:
            return self._legs_changed.wait_for(lambda: not self._legs, timeout_s)

    def stop_threads(self, timeout_s: float) -> None:
        """End the relay's own threads and those of guard and access; after the legs."""
        self._access.stop()
        self._timer.stop()
        self._sender.stop()
        self.guard.stop()
        self._timer.join(timeout_s)
        self._sender.join(timeout_s)
        self._access.join(timeout_s)
        self.guard.join(timeout_s)
