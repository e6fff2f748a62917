"""The credentials in force, and the targets that a proxy user may open.

One thread polls the file every second. After each change the relay checks every login again,
since a change may revoke a login whose leg is still open.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from http_network_relay.rules.target import RuleError, canonical_host
from http_network_relay.wire.controls import Opening
from http_network_relay.wire.errors import ConfigError, Refused
from server.access.credentials import Credentials, utc_today
from server.access.file_watch import FileWatch
from server.logs import ROOT_NAME
from server.service_thread import ServiceThread

_log = logging.getLogger(f"{ROOT_NAME}.access")

# Seconds between two polls. A change is in force after at most two polls, see FileWatch.
_LOOK_S = 1.0


class Access(ServiceThread):
    """The credentials in force. A reload replaces `credentials` whole; a read needs no lock."""

    def __init__(
        self, credentials: Credentials, watch: FileWatch | None, on_change: Callable[[], None]
    ) -> None:
        super().__init__("credentials")
        self.credentials = credentials
        # None: the credentials come from no file.
        self._watch = watch
        # Called in this thread after each change. The callee MUST check the login of each leg.
        self._on_change = on_change
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def check_open(self, user: str, control: Opening) -> str:
        """Return the rule that permits this user to open or resume the target. Raises Refused."""
        client, host, port = control.client, control.host, control.port
        try:
            asked = canonical_host(host)
        except RuleError as exc:
            raise Refused("target_invalid", str(exc)) from exc
        # Read once, so that both checks use the same version of the file.
        credentials = self.credentials
        rule = credentials.may_open(user, client, asked, port)
        # Before the check of the client: a refusal must not disclose which clients exist.
        if rule is None:
            raise Refused("denied", f"no rule lets {user} open {host}:{port} at {client}")
        if not credentials.has_client(client):
            raise Refused("client_unknown", f"no client is named {client}")
        return rule

    def _run(self) -> None:
        today = utc_today()
        is_due = False
        while not self._stopped.wait(_LOOK_S):
            try:
                # At midnight UTC an entry may expire without a change of the file.
                is_due = self._look() or is_due or utc_today() != today
                if is_due:
                    today = utc_today()
                    self._on_change()
                    is_due = False  # After the call: if on_change fails, the next poll retries.
            except Exception:
                _log.exception("credentials were not looked at")

    def _look(self) -> bool:
        if self._watch is None:
            return False
        try:
            credentials = self._watch.poll()
        except ConfigError as exc:
            _log.error("credentials not reloaded, the old ones stay in force: %s", exc)
            return False
        if credentials is None:
            return False
        self.credentials = credentials
        _log.info("credentials reloaded %s", credentials.summary)
        return True
