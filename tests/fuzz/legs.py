"""Whole legs with all their threads, on socket pairs: pests beside a good tunnel.

One process holds a real relay and a real client agent, joined by the good client's leg, with one
good tunnel through both to an echoing target. Each input plays one round of pests: a client, users
of it, a user of the good client, and a server at a leg of the good client's own. An input is played
by its bytes; when threads meet is the system's choice, so a failure may take a few tries to come
again.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from simple_websocket import Server as LibraryServer

from client.agent import Agent, _Run
from client.config import ClientConfig
from http_network_relay.dial.connection import Connection as ClientTransport
from http_network_relay.dial.connection import websocket_client
from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.leg.duplex_socket import wait_ready
from http_network_relay.leg.send_queue import Frame
from http_network_relay.rules.target import TargetRule
from http_network_relay.wire.constants import OP_BINARY, OP_CLOSE, OP_TEXT
from http_network_relay.wire.errors import RelayError
from server.access.credentials import Credentials
from server.config import Config
from server.legs.client_leg import ClientLeg
from server.legs.websocket import SERVER_OPTIONS, Connection, prepare_upgrade
from server.relay import Relay
from tests.fuzz.machines import Pest, opening
from tests.fuzz.source import Source, bad_frame, frame
from tests.fuzz.streams import _UPGRADE_ENVIRON
from tests.support.controls import encode
from tests.support.targets import EchoTarget
from tests.support.waiting import eventually

# Far above what any step takes; reached, it is a hang.
HANG_S = 20.0
# Bytes of pests' messages on their way before they are sent.
_BATCH_BYTES = 64 * 1024


class Violation(AssertionError):
    """The product broke a documented rule."""


class _Faults(logging.Handler):
    """Collects the product's own faults: error lines that no peer may cause, and dead threads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        # The client logs a server's protocol violation as an error with a sentence.
        is_peers = record.msg == "leg failed: %s" and not record.exc_info
        if record.exc_info or "internal_error" in line or (record.levelno >= 40 and not is_peers):
            error = record.exc_info[1] if record.exc_info else None
            trace = "".join(traceback.format_exception(error)) if error is not None else ""
            self.found.append(f"{record.name}: {line}\n{trace}")

    def on_dead_thread(self, args: Any) -> None:
        """Replaces threading.excepthook."""
        trace = "".join(traceback.format_exception(args.exc_value))
        self.found.append(f"thread {args.thread.name} died:\n{trace}")


class _Target(EchoTarget):
    """Echoes, and can forget closed connections, since the test measures the product's memory."""

    def forget(self) -> None:
        """Drop connections that are over."""
        with self._changed:
            self._conversations = [each for each in self._conversations if not each.is_closed]
            self._threads = [thread for thread in self._threads if thread.is_alive()]


class GoodUser:
    """A proxy user whose bytes must come back unchanged from the echoing target, all the time."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        self._transport = ClientTransport(websocket_client(), sock, b"", 20.0)
        self._transport.start("good-user")
        self._rng = random.Random(1)
        self._limit = self._moved = 0
        self._is_stopped = False
        self.rounds = 0
        self.failure = ""
        self._say("open", **opening("f" * 32, port=port, grace_s=0))
        kind, control = self._transport.receive()
        if kind != OP_TEXT or b'"opened"' not in control:
            raise Violation(f"the good tunnel was not opened: {control!r}")
        self._on_control(control)
        self._thread = threading.Thread(target=self._run, name="good-user")
        self._thread.start()

    def _say(self, kind: str, **fields: Any) -> None:
        self._transport.frame_sender.put_ack(0, Frame(OP_TEXT, b"", encode(kind, **fields)))
        self._transport.frame_sender.push()

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._echo(self._rng.randbytes(self._rng.choice((1, 100, 5000, 60_000))))
                self.rounds += 1
        except Exception as exc:
            self.failure = "".join(traceback.format_exception(exc))

    def _echo(self, data: bytes) -> None:
        sent, came = 0, b""
        while len(came) < len(data):
            # On a slow machine the window may be smaller than the largest message.
            piece = data[sent : self._limit - self._moved]
            if piece:
                self._transport.frame_sender.put_data(0, b"", piece)
                self._transport.frame_sender.push()
                sent += len(piece)
            else:
                came = self._take(came)
        if came != data:
            raise Violation("the good tunnel's bytes have changed")
        self._moved += len(data)
        limit = self._moved + 2**20
        self._say("ack", delivered=self._moved, limit=limit, eof=False)

    def _take(self, came: bytes) -> bytes:
        opcode, payload = self._transport.receive()
        if opcode == OP_BINARY:
            return came + bytes(payload)
        if opcode == OP_CLOSE:
            raise Violation(f"the good user's leg was closed with {payload}")
        self._on_control(payload)
        return came

    def _on_control(self, payload: bytes) -> None:
        if b'"ack"' not in payload and b'"opened"' not in payload:
            raise Violation(f"the good user received {payload!r}")
        self._limit = int(payload.partition(b'"limit":')[2].partition(b",")[0].rstrip(b"}"))

    def check(self) -> None:
        """Raise Violation unless the tunnel goes on."""
        before = self.rounds
        eventually(
            lambda: self.failure or self.rounds > before, HANG_S, message="the good tunnel hangs"
        )
        if self.failure:
            raise Violation(f"the good tunnel was harmed: {self.failure}")

    def stop(self) -> None:
        self._is_stopped = True
        self._thread.join(HANG_S)
        self._transport.stop()


class _PestLeg:
    """A leg that sends the messages of the input."""

    def __init__(self, sock: socket.socket, pest: Pest, *, masked: bool) -> None:
        sock.settimeout(HANG_S)
        self.sock = sock
        self.pest = pest
        self.masked = masked
        self.reads = True
        self.is_gone = False
        self._waiting = b""

    def say(self, source: Source) -> int:
        """Queue its next message, or garbage; return how many that were."""
        if source.is_rare(80):
            self._waiting += bad_frame(source, masked=self.masked)
        elif (said := self.pest.say(source)) is not None:
            self._waiting += frame(source, *said, masked=self.masked)
        else:
            # The pest waits for an answer, which another thread sends.
            self.flush()
            threading.Event().wait(0.001)
            return 0
        if len(self._waiting) > _BATCH_BYTES or source.is_rare(2):
            self.flush()
        return 1

    def flush(self) -> None:
        """Send the queued messages, and read all that has come."""
        try:
            if not self.is_gone:
                self.sock.sendall(self._waiting)
                while self.reads and wait_ready(self.sock, write=False, timeout_s=0):
                    if not self.sock.recv(2**20):
                        break
        except TimeoutError:
            raise Violation("a leg's reader does not read") from None
        except OSError:
            self.is_gone = True
        self._waiting = b""

    def close(self) -> None:
        self.flush()
        self.sock.close()


class World:
    """A relay, a good client with its agent, and the good tunnel through both."""

    def __init__(self) -> None:
        self.messages = 0
        self._faults = _Faults()
        self._logger = logging.getLogger("http_network_relay")
        self._before = (self._logger.propagate, self._logger.level, threading.excepthook)
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._faults)
        threading.excepthook = self._faults.on_dead_thread
        self._served: list[threading.Thread] = []
        self._runs: list[_Run] = []
        self._target = _Target().__enter__()
        credentials = Credentials.plain({"good": "a", "pest": "b"}, ["token-1", "token-2"])
        self._relay = Relay(Config(opens_per_s=0), credentials)
        self._relay.start(64)
        # Only the target may be dialled, whatever the pests ask; a second's grace, so that
        # tunnels that wait or are remembered do not refuse all later ones.
        rules = tuple(TargetRule.parse(f"127.0.0.1:{port}") for port in (self._target.port, 1))
        config = ClientConfig(Endpoint(False, "h", 80, "/"), "good", "a", grace_s=1, allow=rules)
        self._agent = Agent(config)
        self._agent._timer.start()
        sock, _ = self._connect_client("good", "a")
        self._good_run = self._start_run(sock)
        sock, _ = self._connect_user("token-1")
        self._user = GoodUser(sock, self._target.port)
        self._good_tunnels = self._agent._tunnels.alive()
        self._user.check()
        self._threads = set(threading.enumerate())

    # Legs.

    def _connect_client(self, name: str, secret: str) -> tuple[socket.socket, Any]:
        login = self._relay.credentials.login_client(name, secret)
        assert login is not None
        return self._upgrade(self._relay.admit_client(login, f"{name:0>32}", "127.0.0.1"))

    def _connect_user(self, token: str) -> tuple[socket.socket, Any]:
        login = self._relay.credentials.login_user(token)
        assert login is not None
        return self._upgrade(self._relay.admit_user(login, "127.0.0.1", ""))

    def _upgrade(self, slot: Any) -> tuple[socket.socket, Any]:
        """As server/app.py does with a request that is admitted."""
        ours, peer = socket.socketpair()
        environ: dict[str, Any] = {**_UPGRADE_ENVIRON, "gunicorn.socket": ours}
        self._relay.attach(slot, Connection(prepare_upgrade(environ)))

        def serve() -> None:
            try:
                self._relay.serve(slot, LibraryServer(environ, **SERVER_OPTIONS))
            finally:
                self._relay.release(slot)
                ours.close()

        thread = threading.Thread(target=serve, name="handler")
        thread.start()
        self._served.append(thread)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += peer.recv(1)
        return peer, slot.leg

    def _start_run(self, sock: socket.socket) -> _Run:
        return self._agent._start(ClientTransport(websocket_client(), sock, b"", 20.0))

    def _pests(self) -> list[_PestLeg]:
        sock, leg = self._connect_client("pest", "b")
        pests = [_PestLeg(sock, Pest(leg, {}), masked=True)]
        for client in ("pest", "pest", "good", "good"):
            sock, leg = self._connect_user("token-2")
            known = opening("0" * 32, client, self._target.port)
            pests.append(_PestLeg(sock, Pest(leg, known), masked=True))
        ours, sock = socket.socketpair()
        run = self._start_run(ours)
        self._runs.append(run)
        known = {**opening("0" * 32, port=self._target.port), "user": "anna"}
        pests.append(_PestLeg(sock, Pest(run.leg, known), masked=False))
        return pests

    # Rounds.

    def play(self, data: bytes) -> None:
        """Play one input; raises Violation."""
        source = Source(data)
        pests = self._pests()
        for leg in pests:
            leg.reads = source.number(8) > 0
        users = pests[1:-1]
        for leg in users:  # Open tunnels first.
            leg.say(source)
            leg.flush()
        while not source.is_empty:
            self.messages += source.pick(pests).say(source)
        for leg in pests:
            leg.close()
        self._end_round()

    def _end_round(self) -> None:
        deadline = time.monotonic() + HANG_S
        served, self._served = self._served[2:], self._served[:2]
        threads = [*served, *(run.thread for run in self._runs)]
        self._runs = []
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise Violation(f"{thread.name} hangs")
        self._user.check()
        self._check_faults()

    def _check_faults(self) -> None:
        if self._faults.found:
            raise Violation("\n".join(self._faults.found))

    def settle(self) -> None:
        """End the pests' tunnels; raise Violation where anything of them is left."""
        for tunnel in self._agent._tunnels.alive():
            if tunnel not in self._good_tunnels:
                channel = tunnel.end.channel
                if channel and channel.frame_sender is not self._good_run.connection.frame_sender:
                    raise Violation(f"{tunnel.about} did not learn that its leg has ended")
                tunnel.end.reset(RelayError("user_lost", "the end of the rounds"))
        self._wait(self._left_threads, "threads are left")
        self._target.forget()
        self._wait(lambda: list(self._relay._legs)[2:], "legs are left")
        self._wait(lambda: len(self._relay._registry) - 2, "slots are left")
        leg = self._relay._registry.client_leg("good")
        assert isinstance(leg, ClientLeg)
        self._wait(lambda: len(leg.channels.tunnels) - 1, "tunnels are left at the server")
        self._user.check()
        self._check_faults()

    def _left_threads(self) -> set[threading.Thread]:
        # A good leg may have needed a writer by now.
        good = {f"leg-writer:{leg.label}" for leg in list(self._relay._legs)[:2]}
        left = set(threading.enumerate()) - self._threads
        return {thread for thread in left if thread.name not in good}

    def _wait(self, left: Callable[[], Any], what: str) -> None:
        """Wait until nothing is left."""
        try:
            eventually(lambda: not left(), HANG_S)
        except AssertionError:
            raise Violation(f"{what}: {left()}") from None

    def close(self) -> None:
        """End all, whatever has happened."""
        self._user.stop()
        self._agent.stop()
        self._relay.drain()
        self._relay.end()
        if not self._relay.join(2.0):
            self._relay.stop()
        self._relay.stop_threads(2.0)
        for run in (*self._runs, self._good_run):
            run.thread.join(5.0)
        self._agent._tunnels.join(time.monotonic() + 5.0)
        self._agent._timer.stop()
        self._target.__exit__(None, None, None)
        self._logger.removeHandler(self._faults)
        self._logger.propagate, level, threading.excepthook = self._before
        self._logger.setLevel(level)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """A world that is checked for what is left, and ended."""
    made = World()
    try:
        yield made
        made.settle()
    finally:
        made.close()
