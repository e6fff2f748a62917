"""The policy of one process: all limits, and the audit log.

Builds and owns the counts of logins and tunnels, the pacer and the audit log. The relay and the
application ask here and nowhere else.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from http_network_relay.wire.codes import Code
from http_network_relay.wire.constants import NAME_PATTERN
from http_network_relay.wire.controls import Opening, Resume, matches
from http_network_relay.wire.errors import Refused
from server.addresses import parse_networks, source_address
from server.audit import AuditLog
from server.config import Config
from server.limits.failed_logins import FailedLogins
from server.limits.pacer import Pacer
from server.limits.quotas import Limits
from server.logs import ROOT_NAME
from server.tunnels.observer import TunnelObserver
from server.tunnels.tunnel import Tunnel

_log = logging.getLogger(f"{ROOT_NAME}.policy")


class _Target(NamedTuple):
    """The fields of an audit line that say which user wants which target. Nothing is secret."""

    tunnel: str
    user: str
    address: str
    client: str
    target: str
    rule: str | None

    @classmethod
    def of(cls, asked: Opening, user: str, address: str, rule: str | None = None) -> _Target:
        host, port = asked.host, asked.port
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return cls(asked.tunnel_id, user, address, asked.client, target, rule)


class Policy:
    """All limits of one process, and its audit log. Any thread."""

    def __init__(self, config: Config) -> None:
        self.audit = AuditLog(config.audit_log)
        self.limits = Limits(config)
        self.pacer = Pacer(config)
        self._logins = FailedLogins(config.failed_logins, config.failed_logins_by_address)
        self._trusted = parse_networks(config.trusted_proxies)

    def start(self) -> None:
        """Start the threads that the settings need; in the worker process."""
        self.audit.start()
        self.pacer.start()

    def stop(self) -> None:
        """Let the threads end, behind what is queued."""
        self.pacer.stop()
        self.audit.stop()

    def join(self, timeout_s: float) -> None:
        """Wait until they have ended."""
        deadline = time.monotonic() + timeout_s
        self.pacer.join(timeout_s)
        self.audit.join(max(0.0, deadline - time.monotonic()))

    def address(self, peer: str | None, forwarded: str) -> str:
        """Return the address that a request comes from; see addresses.py."""
        return source_address(peer, forwarded, self._trusted)

    def failed_login(self, kind: str, name: str, address: str, message: str) -> Refused:
        """Count and log a wrong name or secret; return the answer.

        The caller MUST compare the secret first, always: so the time of an answer says nothing
        about the count, and a right secret never comes here.
        """
        name = name if matches(NAME_PATTERN, name) else ""
        is_over = self._logins.count(kind, name, address)
        code = Code.TOO_MANY if is_over else Code.UNAUTHORIZED
        # docs/limits.md has a filter for this line: it must not change.
        _log.warning(
            "login failed address=%s kind=%s name=%s code=%s", address, kind, name or "-", code
        )
        self.audit.put("login_failed", kind=kind, name=name or None, address=address, reason=code)
        if is_over:
            message = "too many logins failed; wait, then correct the secret"
        return Refused(code, message)

    def leg_up(self, kind: str, name: str, address: str) -> None:
        """Write that a client is connected; a user's lines are those of the tunnels."""
        if kind == "client":
            self.audit.put("client_up", client=name, address=address)

    def leg_down(self, kind: str, name: str, address: str, reason: str, secs: float) -> None:
        """Write that a client is not connected any more."""
        if kind == "client":
            secs = round(secs, 3)
            self.audit.put("client_down", client=name, address=address, secs=secs, reason=reason)

    def refused(self, control: Opening, user: str, address: str, reason: str) -> None:
        """Write that an `open` or `resume` has reached no client."""
        self.audit.put(
            "tunnel_refused", **_Target.of(control, user, address)._asdict(), reason=reason
        )


class PolicyObserver(TunnelObserver[Tunnel]):
    """Follows one tunnel: its quota, its pacing, and its audit lines."""

    def __init__(
        self,
        policy: Policy,
        control: Opening,
        user: str,
        address: str,
        rule: str | None = None,
    ) -> None:
        self.is_paced = policy.pacer.shaper.is_on
        self._policy = policy
        self._user = user
        self._is_resume = isinstance(control, Resume)
        self._target = _Target.of(control, user, address, rule)
        self._started_at = time.monotonic()

    def first_credit(self, is_up: bool, wanted: int) -> int:
        """As in TunnelObserver."""
        return self._policy.pacer.shaper.first_credit(self._user, is_up, wanted)

    def started(self, tunnel: Tunnel) -> None:
        """As in TunnelObserver."""
        self._policy.pacer.started(self._user, tunnel)

    def accepted(self, tunnel: Tunnel) -> None:
        """As in TunnelObserver."""
        event = "tunnel_resumed" if self._is_resume else "tunnel_opened"
        self._policy.audit.put(event, **self._target._asdict())
        self._policy.pacer.accepted(tunnel)

    def credit_headroom(self, tunnel: Tunnel, is_up: bool) -> None:
        """As in TunnelObserver."""
        self._policy.pacer.credit_headroom(tunnel, is_up)

    def ended(self, tunnel: Tunnel, reason: str) -> None:
        """As in TunnelObserver."""
        policy = self._policy
        policy.limits.forget(self._user, tunnel)
        policy.pacer.ended(tunnel)
        if not tunnel.is_opened:
            policy.audit.put("tunnel_refused", **self._target._asdict(), reason=reason)
            return
        up, down = (flow.forwarded - flow.begun_at for flow in (tunnel.up, tunnel.down))
        secs = round(time.monotonic() - self._started_at, 3)
        policy.audit.put(
            "tunnel_closed", **self._target._asdict(), up=up, down=down, secs=secs, reason=reason
        )
