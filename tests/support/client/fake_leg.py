"""A leg without a network: the test plays the server, message by message."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

from client.forwarder import Forwarder
from client.leg import Leg
from client.tunnel_table import TunnelTable
from http_network_relay.leg.frame_sender import FrameSender
from http_network_relay.wire.constants import (
    DEFAULT_MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_TEXT,
)
from http_network_relay.wire.controls import encode_channel
from http_network_relay.wire.errors import RelayError
from tests.support.controls import encode
from tests.support.taking import take
from tests.support.waiting import eventually


class FakeTransport:
    """The part of a Transport that Leg needs: a real frame_sender, and messages from a queue."""

    def __init__(self) -> None:
        self.frame_sender = FrameSender()
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closes: list[tuple[int, str, bool]] = []
        self.gave_up = None

    def receive(self, _on_pause: object = None) -> tuple[int, Any]:
        message = self.messages.get(timeout=10.0)
        if isinstance(message, BaseException):
            raise message
        return message  # type: ignore[no-any-return]

    def close(self, code: int, reason: str = "", *, flush: bool = True) -> None:
        self.closes.append((code, reason, flush))


class ServerSide:
    """A Leg in a thread; the test plays the server's end.

    A third thread takes what the leg sends, as the writer would. `tunnels` are those of an
    earlier leg, which that one ends; else they are this leg's own, with `grace_s`.
    """

    def __init__(self, tunnels: TunnelTable | None = None, *, grace_s: int = 0) -> None:
        self.transport = FakeTransport()
        self._owns_tunnels = tunnels is None
        self.tunnels = tunnels or TunnelTable(DEFAULT_MAX_WINDOW_BYTES, grace_s)
        self.leg = Leg(self.transport, self.tunnels)  # type: ignore[arg-type]
        # Guards controls and data; notified at each frame.
        self._changed = threading.Condition()
        self.controls: list[dict[str, Any]] = []
        self.data: dict[int, bytearray] = {}
        # Everything in order, data as "data".
        self.order: list[tuple[int, str]] = []
        self.code: int | None = None
        self._reader = threading.Thread(target=self._serve, name="leg-reader")
        self._writer = threading.Thread(target=self._take, name="leg-writer")
        self._reader.start()
        self._writer.start()

    def __enter__(self) -> ServerSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Lose the leg, and join all its threads."""
        self.transport.messages.put((OP_CLOSE, 1006))
        self._reader.join(5.0)
        if self._owns_tunnels:
            alive = self.tunnels.alive()
            self.tunnels.reset_all(RelayError("client_stopped", "the end of the test"))
            for tunnel in alive:
                tunnel.thread.join(5.0)
        self.transport.frame_sender.stop()
        self._writer.join(5.0)

    def lose(self) -> None:
        self.transport.messages.put((OP_CLOSE, 1006))
        self._reader.join(5.0)
        assert not self._reader.is_alive()

    def wait_served(self) -> int:
        """Wait for the leg's own end; the close code."""
        self._reader.join(5.0)
        assert not self._reader.is_alive()
        assert self.code is not None
        return self.code

    def _serve(self) -> None:
        self.code = self.leg.serve()

    def _take(self) -> None:
        while (frame := take(self.transport.frame_sender)) is not None:
            with self._changed:
                if frame.opcode == OP_BINARY:
                    channel = int.from_bytes(frame.head, "big")
                    self.data.setdefault(channel, bytearray()).extend(frame.payload)
                    self.order.append((channel, "data"))
                else:
                    control = json.loads(frame.payload)
                    self.controls.append(control)
                    self.order.append((control["channel"], control["type"]))
                self._changed.notify_all()

    # Messages of the server.

    def say(self, kind: str, channel: int = 0, **fields: Any) -> None:
        text = encode(kind, channel, **fields)
        self.transport.messages.put((OP_TEXT, text))

    def say_raw(self, payload: bytes, opcode: int = OP_TEXT) -> None:
        self.transport.messages.put((opcode, payload))

    def send(self, channel: int, data: bytes) -> None:
        for start in range(0, len(data), 65536):
            message = encode_channel(channel) + data[start : start + 65536]
            self.transport.messages.put((OP_BINARY, message))

    def open(self, channel: int, port: int, **fields: Any) -> None:
        self.say("open", channel, **{**self._opening(channel, port), **fields})

    def resume(self, channel: int, port: int, of: int, **fields: Any) -> None:
        """Resume, on this channel, the tunnel that was opened on the channel `of`."""
        more = {"attempt": 1, "received": 0, "delivered": 0}
        self.say("resume", channel, **{**self._opening(of, port), **more, **fields})

    def _opening(self, channel: int, port: int) -> dict[str, Any]:
        return {
            "client": "lab-1",
            "host": "127.0.0.1",
            "port": port,
            "protocol": "tcp",
            "tunnel_id": f"{channel:032x}",
            "resume_token": "0" * 64,
            "limit": MIN_WINDOW_BYTES,
            "grace_s": 120,
            "user": "anna",
        }

    def ack(self, channel: int, delivered: int, *, eof: bool = False, limit: int = 2**40) -> None:
        self.say("ack", channel, delivered=delivered, limit=limit, eof=eof)

    # Messages of the client.

    def wait(self, predicate: Callable[[], Any], timeout_s: float = 5.0) -> Any:
        with self._changed:
            value = self._changed.wait_for(predicate, timeout_s)
            assert value, f"only {self.order}"
            return value

    def find(self, kind: str, channel: int) -> dict[str, Any] | None:
        for control in self.controls:
            if (control["type"], control["channel"]) == (kind, channel):
                return control
        return None

    def control(self, kind: str, channel: int, timeout_s: float = 5.0) -> dict[str, Any]:
        """Wait for the first control of this type on this channel."""
        found: dict[str, Any] = self.wait(lambda: self.find(kind, channel), timeout_s)
        return found

    def bytes_of(self, channel: int) -> bytes:
        with self._changed:
            return bytes(self.data.get(channel, b""))

    def wait_bytes(self, channel: int, count: int) -> bytes:
        self.wait(lambda: len(self.data.get(channel, b"")) >= count)
        return self.bytes_of(channel)

    def kinds(self, channel: int) -> list[str]:
        """The kinds of all messages of a channel so far, data counted once."""
        with self._changed:
            kinds = [kind for number, kind in self.order if number == channel and kind != "ack"]
        return [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]

    def tunnel(self, channel: int) -> Forwarder:
        """The tunnel that came by this channel."""
        return eventually(lambda: self.leg._channels.get(channel), 5.0)[0]  # type: ignore[index]

    def wait_forgotten(self, channel: int, timeout_s: float = 5.0) -> None:
        """Wait until the client holds no thread and no socket of that channel's tunnel."""

        def is_forgotten() -> bool:
            found = self.leg._channels.get(channel)
            return found is None or found[0] not in self.tunnels.alive()

        eventually(is_forgotten, timeout_s)
