"""The observer of a tunnel's events."""

from __future__ import annotations

from typing import Generic, TypeVar

TunnelT = TypeVar("TunnelT")


class TunnelObserver(Generic[TunnelT]):
    """Receives a tunnel's events; this base class ignores all events.

    The caller MUST call all methods but `credit_headroom` under the lock of the channels: in the
    order of the events, and before either end can react to the event. An override MUST NOT wait,
    and MUST NOT call the tunnel.
    """

    # Whether only first_credit() and Tunnel.raise_limit() grant credit.
    is_paced = False

    def first_credit(self, is_up: bool, wanted: int) -> int:
        """Return the bytes of a paced direction's first credit that are granted at once."""
        return wanted

    def started(self, tunnel: TunnelT) -> None:
        """The tunnel has a channel; the server queues the `open` or `resume` next."""

    def accepted(self, tunnel: TunnelT) -> None:
        """The client has answered `opened` or `resumed`."""

    def credit_headroom(self, tunnel: TunnelT, is_up: bool) -> None:
        """An ack of a paced direction has arrived, so Tunnel.raise_limit() may raise the limit."""

    def ended(self, tunnel: TunnelT, reason: str) -> None:
        """The tunnel has ended, whether the client had accepted the tunnel or not."""
