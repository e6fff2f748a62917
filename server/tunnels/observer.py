"""Who is told of a tunnel's life."""

from __future__ import annotations

from typing import Generic, TypeVar

TunnelT = TypeVar("TunnelT")


class TunnelObserver(Generic[TunnelT]):
    """Who is told of a tunnel's life; does nothing by itself.

    All but `hungry` come with the lock of the channels held, so that they are told in the order
    in which it happened, before either end can know and come back: they must not wait, nor
    touch the tunnel's ends.
    """

    # Whether credit is given by first_credit() and Tunnel.raise_limit() alone.
    is_paced = False

    def first_credit(self, is_up: bool, wanted: int) -> int:
        """Return how much of the credit of a paced direction its user may have at once."""
        return wanted

    def started(self, tunnel: TunnelT) -> None:
        """It has a channel, and the client will be asked."""

    def accepted(self, tunnel: TunnelT) -> None:
        """The client has answered `opened` or `resumed`."""

    def hungry(self, tunnel: TunnelT, is_up: bool) -> None:
        """An ack of a paced direction has come: its limit could rise."""

    def ended(self, tunnel: TunnelT, reason: str) -> None:
        """It is over, or was never accepted."""
