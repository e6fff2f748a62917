"""Legs of the server that are outboxes only, and the first messages of a tunnel."""

from __future__ import annotations

import json
from typing import Any

from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.wire.constants import FLUSH_S, OP_TEXT
from server.tunnels.channels import Channels
from tests.support.taking import take

KIB = 1024
MIB = 1024 * KIB
CAP = 4 * MIB
OPEN = {
    "type": "open",
    "client": "gw",
    "host": "h",
    "port": 22,
    "protocol": "tcp",
    "tunnel_id": "ab" * 16,
    "resume_token": "0" * 64,
    "limit": 262_144,
    "grace_s": 0,
}
RESUME = {**OPEN, "type": "resume", "attempt": 3, "received": 5000, "delivered": 4000}
RESUMED = {"type": "resumed", "received": 700, "delivered": 600, "limit": 300_000}


class FakeUserLeg:
    """A user's leg without a socket."""

    def __init__(self) -> None:
        self.frame_sender = FrameSender()
        self.ends: list[tuple[int, str]] = []
        self.expects_close = 0

    def end(self, close_code: int, reason: str, *, flush_s: float = FLUSH_S) -> None:
        assert flush_s >= FLUSH_S or reason == "superseded"
        self.ends.append((close_code, reason))

    def expect_close(self) -> None:
        self.expects_close += 1


class FakeClientLeg:
    """A client's leg without a socket."""

    def __init__(self, budget: int = 64 * MIB, tunnels_at_most: int = 0) -> None:
        self.frame_sender = FrameSender()
        self.channels: Channels[Any] = Channels(budget, tunnels_at_most)
        self.label = "gw"


def taken(frame_sender: FrameSender) -> list[Any]:
    """Return the messages in the frame sender, in order: controls as objects, data as bytes."""
    frames: list[Any] = []
    while frame_sender.has_frames:
        frame = take(frame_sender)
        assert frame is not None
        payload = bytes(frame.payload)
        frames.append(json.loads(payload) if frame.opcode == OP_TEXT else frame.head + payload)
    return frames
