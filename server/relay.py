"""The relay of one worker process: admits legs, serves them, drains.

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

from http_network_relay.wire.codes import CloseCode, Code
from http_network_relay.wire.errors import Refused
from server.access.access import Access
from server.access.credentials import Credentials, Login
from server.access.file_watch import FileWatch
from server.config import LEG_BUDGET_BYTES, Config
from server.legs.client_leg import ClientLeg
from server.legs.leg import Leg
from server.legs.pending_resumes import PendingResumes
from server.legs.sender import LegSender
from server.legs.timer import Timer
from server.legs.user_leg import UserLeg
from server.legs.websocket import Connection
from server.limits.policy import Policy
from server.live_legs import LiveLegs, enforce, enforce_all
from server.logs import ROOT_NAME
from server.registry import Registry, Slot
from server.tunnel_opener import SlotOpener

_log = logging.getLogger(f"{ROOT_NAME}.relay")

# CPython's 5 ms let one busy leg's thread delay a keystroke on another by that much.
_SWITCH_INTERVAL_S = 0.0005


class Relay:
    """Everything that the legs of one process share."""

    def __init__(
        self, config: Config, credentials: Credentials, watch: FileWatch | None = None
    ) -> None:
        self._config = config
        self.policy = Policy(config)
        self._registry: Registry[Leg] = Registry()
        self._pending: PendingResumes[UserLeg] = PendingResumes()
        self._timer = Timer()
        self._sender = LegSender()
        self._legs = LiveLegs(self._timer)
        self._access = Access(credentials, watch, self._enforce_all)
        self._is_started = False
        # One line is enough: peers retry for ever.
        self._has_complained = False

    def start(self, slots: int) -> None:
        """Open for business, with room for `slots` legs. In the worker process, once."""
        self._registry.set_capacity(slots)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        # The objects of now stay: no garbage collection, which stops all threads, need visit them.
        gc.freeze()
        self._timer.start()
        self._sender.start()
        self._access.start()
        self.policy.start()
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
        raise Refused(Code.WRONG_WORKER, "the relay runs under the wrong gunicorn worker class")

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
            if old.close_code == CloseCode.REPLACED_BY_OTHER:
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
        """Make the slot's leg, before the peer reads the answer to its upgrade.

        So a client that has its answer can be reached: a proxy user who comes in the next
        instant finds it. The user's `open` waits in the frame sender until serve().
        """
        config = self._config
        leg: Leg
        shared = (transport, slot.login, config.ping_interval_s, self._timer, self._sender)
        if slot.kind == "client":
            leg = ClientLeg(
                *shared,
                *(LEG_BUDGET_BYTES, config.tunnels_per_client),
            )
        else:
            opener = SlotOpener(
                *(slot, self._registry, self._access, self.policy, config.max_window_bytes)
            )
            leg = UserLeg(
                *shared,
                *(opener, self._pending, config.handshake_timeout_s),
            )
        if not self._registry.attach(slot, leg):
            raise Refused(Code.SERVER_RESTART, "a newer connection came; try again")

    def serve(self, slot: Slot[Leg], websocket: Any) -> None:
        """Run the slot's leg to its end, in the handler's thread."""
        leg = slot.leg
        if leg is None:
            raise ValueError("serve() without attach()")
        thread = threading.current_thread()
        thread_name, thread.name = thread.name, f"{slot.kind}-leg:{slot.name}"
        # Before the look at is_draining: a drain that comes later finds the leg in the list.
        self._legs.add(leg)
        if self._registry.is_draining:
            leg.end(CloseCode.RESTART, Code.SERVER_RESTART)
        # The credentials that have let the leg in may not be in force any more.
        enforce(self._access, leg)
        started_at = time.monotonic()
        fields = f"{slot.kind}={slot.name} address={slot.address}"
        if slot.instance:
            fields += f" instance={slot.instance[:8]}"
        _log.info("leg up %s", fields)
        self.policy.leg_up(slot.kind, slot.name, slot.address)
        try:
            if slot.kind == "client":
                self._pending.open_for(slot.name)
            leg.run(websocket)
        finally:
            secs = time.monotonic() - started_at
            # Before join() can return: what comes after the stop is not written.
            self.policy.leg_down(slot.kind, slot.name, slot.address, leg.reason, secs)
            self._legs.drop(leg)
            thread.name = thread_name
            _log.info("leg down reason=%s secs=%.1f %s", leg.reason, secs, fields)

    def release(self, slot: Slot[Leg]) -> None:
        """Give a slot back; every admitted slot comes here once."""
        self._registry.release(slot)
        if slot.leg is not None:
            # Does nothing unless the upgrade failed: serve() has ended the tunnels.
            slot.leg.lost()

    def _enforce_all(self) -> None:
        enforce_all(self._access, self._legs)

    # The end.

    def drain(self) -> None:
        """Refuse newcomers, and send `going_away` to all legs; their tunnels go on."""
        self._registry.drain()
        self._pending.fail_all()
        _log.info("relay draining legs=%d", len(self._legs))
        self._legs.going_away()

    def end(self) -> None:
        """Give all tunnels up, and let each leg flush and close. Does not wait."""
        self._legs.end()

    def stop(self) -> None:
        """Shut every leg down at once."""
        self._legs.abort()

    def join(self, timeout_s: float) -> bool:
        """Wait until all legs have ended; False if some have not."""
        return self._legs.join(timeout_s)

    def stop_threads(self, timeout_s: float) -> None:
        """End the relay's own threads and those of policy and access; after the legs."""
        self._access.stop()
        self._timer.stop()
        self._sender.stop()
        self.policy.stop()
        self._timer.join(timeout_s)
        self._sender.join(timeout_s)
        self._access.join(timeout_s)
        self.policy.join(timeout_s)
