"""The observer of a tunnel's life."""

from __future__ import annotations

from typing import Generic, TypeVar

TunnelT = TypeVar("TunnelT")


class TunnelObserver(Generic[TunnelT]):
    """Follows a tunnel's life; this base class does nothing.

    All methods but `credit_headroom` are called under the lock of the channels: in the order of
    the events, and before either end can know of the event and come back. An override MUST NOT
    wait, and MUST NOT call the tunnel.
    """

    # Whether first_credit() and Tunnel.raise_limit() alone give credit.
    is_paced = False

    def first_credit(self, is_up: bool, wanted: int) -> int:
        """Return the part of a paced direction's first credit that its user may have at once."""
        return wanted

    def started(self, tunnel: TunnelT) -> None:
        """The tunnel has a channel, and its `open` or `resume` is queued next."""

    def accepted(self, tunnel: TunnelT) -> None:
        """The client has answered `opened` or `resumed`."""

    def credit_headroom(self, tunnel: TunnelT, is_up: bool) -> None:
        """An ack of a paced direction has come: its limit could rise."""

    def ended(self, tunnel: TunnelT, reason: str) -> None:
        """The tunnel has ended, accepted or not."""
