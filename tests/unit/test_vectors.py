"""Server, client and proxy command speak the wire of tests/vectors/wire.json, all three alike.

docs/protocol.md, "Golden vectors", says how each section of that file is read.
"""

import re
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from flask import Flask
from werkzeug.datastructures import Headers

import client.agent
from client.agent import Agent
from client.config import read_config
from server.access.credentials import Credentials
from server.app import build_app
from server.config import Config
from server.relay import Relay
from server.tunnels.flow_counters import FlowCounters, WindowBudget
from tests.support.clock import Clock
from tests.support.controls import as_dict, from_dict
from tests.support.programs import load
from tests.support.taking import take
from tests.support.vectors import VECTORS

# Who may say what, and whether the message stands on a leg of many channels.
WAYS = {
    "user_to_server": ("FROM_USER", False),
    "server_to_client": ("TO_CLIENT", True),
    "client_to_server": ("FROM_CLIENT", True),
    "server_to_user": ("TO_USER", False),
}


@pytest.fixture(params=["package", "script"])
def shared(request: pytest.FixtureRequest) -> Any:
    """The names of the shared code: of the package, and of the generated script."""
    return load(request.param)


def each(section: str) -> pytest.MarkDecorator:
    """Parametrise over a section of the vectors, by its readable ids."""
    return pytest.mark.parametrize(
        "vector", [pytest.param(v, id=v["id"]) for v in VECTORS[section]]
    )


def text_of(vector: Mapping[str, Any]) -> str:
    """A text stands whole, or as parts with a repeat count each."""
    if "text" in vector:
        return str(vector["text"])
    return "".join(part * times for part, times in vector["parts"])


def parse(shared: Any, way: str, text: str) -> dict[str, Any]:
    legal, has_channel = WAYS[way]
    parsed = shared.parse_control(text, getattr(shared, legal), has_channel=has_channel)
    return as_dict(parsed, shared)


def encode(shared: Any, parsed: Mapping[str, Any]) -> bytes:
    encoded: bytes = shared.encode_control(from_dict(parsed, shared))
    return encoded


def test_vector_ids_are_unique() -> None:
    """A vector is found by its id."""
    for section in (name for name, rows in VECTORS.items() if isinstance(rows, list)):
        ids = [v.get("id", v.get("token")) for v in VECTORS[section]]
        assert len(set(ids)) == len(ids), section


def test_every_type_has_a_vector_in_each_direction(shared: Any) -> None:
    """A type that is added to the table without vectors is noticed."""
    seen = {(v["way"], v["parsed"]["type"]) for v in VECTORS["controls"]}
    wanted = {(way, kind) for way, (legal, _) in WAYS.items() for kind in getattr(shared, legal)}
    assert seen == wanted
    assert {kind for _, kind in wanted} == set(shared.FIELDS)


@pytest.mark.parametrize("name", VECTORS["constants"])
def test_constant_is_the_one_of_the_vectors(shared: Any, name: str) -> None:
    """Names and numbers are equal in all three programs."""
    is_close_code = name.startswith("CLOSE_")
    value = shared.CloseCode[name[6:]] if is_close_code else getattr(shared, name)
    assert value == VECTORS["constants"][name]


# The handshake.


@pytest.fixture
def app() -> Iterator[Flask]:
    """The server's application with one client and one proxy user, outside of gunicorn."""
    client, user = VECTORS["handshake"]["client"], VECTORS["handshake"]["user"]
    relay = Relay(Config(), Credentials.plain({client["name"]: client["secret"]}, [user["token"]]))
    interval_s = sys.getswitchinterval()
    relay.start(slots=4)
    yield build_app(relay)
    relay.stop_threads(1.0)
    sys.setswitchinterval(interval_s)


def ask(app: Flask, path: str, headers: Mapping[str, str]) -> tuple[int, Headers, Any]:
    """Ask for an upgrade over a socket pair whose peer leaves at once; status, headers, JSON."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.shutdown(socket.SHUT_WR)
        environ = {"gunicorn.socket": ours, "SERVER_PROTOCOL": "HTTP/1.1"}
        try:
            answer = app.test_client().get(path, headers=dict(headers), environ_overrides=environ)
            return answer.status_code, answer.headers, answer.json
        except StopIteration:
            # So flask-sock tells gunicorn that the socket was a WebSocket and has ended.
            head = theirs.recv(65536).split(b"\r\n\r\n")[0].decode()
    status, *lines = head.split("\r\n")
    return int(status.split()[1]), Headers([line.partition(": ")[::2] for line in lines]), None


@each("handshakes")
def test_server_answers_the_handshake(app: Flask, vector: dict[str, Any]) -> None:
    """The server admits what is right and refuses the rest before the upgrade, with a code."""
    right = VECTORS["handshake"][vector["leg"]]
    headers = {k: v for k, v in {**right["headers"], **vector["replace"]}.items() if v is not None}
    status, answer, told = ask(app, right["path"], headers)
    assert status == vector["status"]
    assert answer["HTTP-Network-Relay"] == "v1"
    if status == VECTORS["handshake"]["accepted"]["status"]:
        accepted = VECTORS["handshake"]["accepted"]
        assert {name: answer.get(name) for name in accepted["headers"]} == accepted["headers"]
        assert not set(accepted["absent"]) & set(answer.keys())
        assert answer.get("HTTP-Network-Relay-Mask") == vector.get("mask")
    else:
        assert told["code"] == vector["code"]
        assert vector.get("says", "") in told["message"]


def test_client_asks_as_the_vector_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and secret in one header, the random instance in another."""
    right = VECTORS["handshake"]["client"]
    asked: list[tuple[Any, list[str]]] = []
    monkeypatch.setattr(
        client.agent, "connect", lambda to, headers, **_: asked.append((to, headers))
    )
    for _ in range(2):
        argv = ["--server-url", "ws://localhost", "--client-name", right["name"]]
        config = read_config(argv, {"HTTP_NETWORK_RELAY_CLIENT_SECRET": right["secret"]})
        Agent(config)._connect()
    assert asked[0][0].resource == right["path"]
    sent, again = (dict(line.split(": ") for line in headers) for _, headers in asked)
    assert sent.pop("HTTP-Network-Relay-Instance") != again["HTTP-Network-Relay-Instance"]
    assert re.fullmatch("[0-9a-f]{32}", again["HTTP-Network-Relay-Instance"])
    assert sent == {"Authorization": right["headers"]["Authorization"]}


def test_proxy_command_asks_as_the_vector_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token in one header; the tunnel in another when it comes to resume, and nothing else."""
    right, script = VECTORS["handshake"]["user"], load("script")
    asked: list[tuple[Any, list[str]]] = []
    monkeypatch.setattr(script, "connect", lambda to, headers, **_: asked.append((to, headers)))
    argv = ["device", "127.0.0.1", "22", "--server-url", "ws://localhost"]
    settings = script.read_settings(argv, {"HTTP_NETWORK_RELAY_SECRET_KEY": right["token"]})
    script.dial_leg(settings)
    assert asked[0][0].resource == right["path"]
    assert asked[0][1] == [f"Authorization: {right['headers']['Authorization']}"]
    (resuming,) = [v["replace"] for v in VECTORS["handshakes"] if v["id"] == "user-that-resumes"]
    tunnel_id = resuming["HTTP-Network-Relay-Tunnel"]
    script.dial_leg(settings, tunnel_id)
    assert asked[1][0] == asked[0][0]
    more = [f"{name}: {value}" for name, value in resuming.items()]
    assert asked[1][1] == asked[0][1] + more


@pytest.mark.parametrize("vector", VECTORS["user_names"], ids=lambda v: v["user"])
def test_user_without_a_name_is_called_by_the_tokens_hash(vector: dict[str, str]) -> None:
    """A log names proxy users without telling their tokens."""
    assert Credentials.plain({}, [vector["token"]]).check_user(vector["token"]) == vector["user"]


# Controls.


@each("controls")
def test_control_is_read_field_by_field(shared: Any, vector: dict[str, Any]) -> None:
    """A good control becomes a dict of the known fields and nothing else."""
    parsed = parse(shared, vector["way"], text_of(vector))
    assert parsed == vector["parsed"]
    assert {k: type(v) for k, v in parsed.items()} == {
        k: type(v) for k, v in vector["parsed"].items()
    }


@each("controls")
def test_control_is_written_byte_by_byte(shared: Any, vector: dict[str, Any]) -> None:
    """Type, channel, then the fields in the table's order, without white space."""
    parsed = parse(shared, vector["way"], text_of(vector))
    encoded = encode(shared, parsed)
    assert encoded == vector["encoded"].encode()
    assert parse(shared, vector["way"], encoded.decode()) == parsed


@each("bad_controls")
def test_bad_control_is_an_error_of_its_leg_or_tunnel(shared: Any, vector: dict[str, Any]) -> None:
    """What breaks the framing ends the leg, a bad field ends its tunnel only."""
    expected = shared.LegError if vector["error"] == "leg" else shared.TunnelError
    with pytest.raises(expected) as caught:
        parse(shared, vector["way"], text_of(vector))
    assert_error(caught.value, vector)


def assert_error(error: Any, vector: Mapping[str, Any]) -> None:
    if vector["error"] == "leg":
        assert error.close_code == vector["close_code"]
    else:
        assert error.channel == vector["channel"]
        assert error.code == "protocol_error"
    # What a peer sent must not come back through our log or our reset.
    assert str(error).isascii()
    assert len(str(error)) < 200


@each("relayed")
def test_relayed_control_is_still_a_legal_control(shared: Any, vector: dict[str, Any]) -> None:
    """What the server writes anew fits the next leg, whatever came in.

    A control that grew beyond 4 KiB on the way would end the other leg with all its
    tunnels, at the will of one proxy user.
    """
    parsed = parse(shared, vector["way"], text_of(vector))
    fields = {**parsed, **vector.get("added", {}), "channel": vector["channel"]}
    encoded = encode(shared, fields)
    assert len(encoded) <= VECTORS["constants"]["MAX_CONTROL_BYTES"]
    again = parse(shared, vector["then"], encoded.decode())
    assert {**again, "channel": vector["channel"]} == fields


@each("data")
def test_data_has_its_channel_in_front(shared: Any, vector: dict[str, Any]) -> None:
    """Four bytes, big-endian."""
    prefix = shared.encode_channel(vector["channel"])
    assert prefix.hex() == vector["prefix"]
    assert shared.split_channel(prefix + bytes(vector["size"])) == vector["channel"]


@each("bad_data")
def test_bad_data_is_an_error_of_its_leg_or_tunnel(shared: Any, vector: dict[str, Any]) -> None:
    """Too short for its channel ends the leg; no or too many stream bytes end the tunnel."""
    head, size = vector["message"]
    expected = shared.LegError if vector["error"] == "leg" else shared.TunnelError
    with pytest.raises(expected) as caught:
        shared.split_channel(bytes.fromhex(head) + bytes(size))
    assert_error(caught.value, vector)


# Frames.


class Stream:
    """Stands for a Duplex that reads: gives what came, in one piece, and takes what is sent."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def recv(self, size: int, _on_pause: object = None) -> bytes:
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    def recv_into(self, view: memoryview) -> int:
        piece = self.recv(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def send_now(self, header: bytes, payload: Any) -> None:
        self.data += header + bytes(payload)

    def send(self, data: memoryview) -> None:
        raise AssertionError("send_now() took it all")


@each("frames")
def test_frame_is_made_as_the_vector_says(shared: Any, vector: dict[str, Any]) -> None:
    """Mask bit, key and payload, byte for byte."""
    key = None if vector["key"] is None else bytes.fromhex(vector["key"])
    stream, frame_sender = Stream(), shared.FrameSender(lambda: key)
    frame_sender.start(stream)
    payload = bytes.fromhex(vector["payload"])
    # However it is cut into head and payload.
    frame_sender.put_first(1, shared.Frame(vector["opcode"], payload[:4], payload[4:]))
    frame_sender.push()
    assert stream.data.hex() == vector["frame"]


@each("frames")
def test_frame_is_read_as_the_vector_says(shared: Any, vector: dict[str, Any]) -> None:
    """A message is taken; any other frame is left to the library, as it came."""
    whole = bytes.fromhex(vector["frame"])
    is_masked = vector["key"] is not None
    reader = shared.FrameReader(Stream(whole), is_masked=is_masked)
    if vector["opcode"] in (
        load("package").OP_TEXT,
        load("package").OP_BINARY,
    ):
        assert reader.read_message() == (vector["opcode"], bytes.fromhex(vector["payload"]))
    else:
        assert reader.read_message() is None
        assert reader.read(1000) == whole
    # Without the mask that a leg's way wants, it is nobody's message.
    other = shared.FrameReader(Stream(whole), is_masked=not is_masked)
    assert other.read_message() is None
    assert other.read(1000) == whole


# Streams.


class StreamRun:
    """Plays the steps of a stream vector against one copy of the stream state."""

    def __init__(self, module: Any, vector: Mapping[str, Any]) -> None:
        self.module = module
        self.stream = module.Stream(vector["max_window"])
        self.replayed = 0

    def play(self, step: Mapping[str, Any]) -> None:
        """Do one step, and check its result and the counters after it."""
        do = getattr(self, "do_" + step["do"])
        if "error" in step:
            with pytest.raises(self.module.TunnelError) as caught:
                do(step)
            assert step["error"] == "tunnel"
            assert caught.value.code == "protocol_error"
        else:
            result = do(step)
            assert result == step.get("gives")
        seen = {name: getattr(self, "see_" + name)() for name in step.get("expect", {})}
        assert seen == step.get("expect", {})

    def do_nothing(self, step: Mapping[str, Any]) -> None:
        pass

    def do_limit(self, step: Mapping[str, Any]) -> None:
        self.stream.out.limit = step["limit"]

    def do_send(self, step: Mapping[str, Any]) -> None:
        self.stream.out.take(bytes(step["size"]))
        self.flush()

    def flush(self) -> None:
        """Send what the credit allows."""
        self.replayed = sum(len(piece) for piece in iter(self.stream.out.next_piece, None))

    def do_end(self, step: Mapping[str, Any]) -> int | None:
        self.stream.out.end()
        count: int | None = self.stream.out.next_eof()
        return count

    def do_ack(self, step: Mapping[str, Any]) -> int | None:
        ack = self.module.Ack(step["delivered"], step["limit"], step["eof"])
        self.stream.out.on_ack(ack)
        self.flush()
        count: int | None = self.stream.out.next_eof()
        return count

    def do_resume(self, step: Mapping[str, Any]) -> list[int]:
        """What this end says of itself; what comes then is on the new channel."""
        return list(self.stream.into.resume())

    def do_peer(self, step: Mapping[str, Any]) -> int | None:
        """What the other end says of itself; what goes out then is on the new channel."""
        peer = self.module.Position(step["received"], step["delivered"], step["limit"])
        self.stream.out.check_resume(peer)
        self.stream.out.resume(peer)
        self.flush()
        count: int | None = self.stream.out.next_eof()
        return count

    def do_data(self, step: Mapping[str, Any]) -> None:
        self.stream.into.on_data(step["size"], step["now"])

    def do_delivered(self, step: Mapping[str, Any]) -> list[Any] | None:
        ack = self.stream.into.on_delivered(step["size"], step["now"], drained=step["drained"])
        return None if ack is None else list(ack[:3])

    def do_eof(self, step: Mapping[str, Any]) -> None:
        self.stream.into.on_eof(step["count"])

    def do_eof_delivered(self, step: Mapping[str, Any]) -> list[Any] | None:
        ack = self.stream.into.on_eof_delivered(step["now"])
        return None if ack is None else list(ack[:3])

    def do_eof_ack_sent(self, step: Mapping[str, Any]) -> None:
        """Whoever sends the ack of the eof says so: only then is this end through."""
        self.stream.into.eof_acked = True

    def do_received_and_delivered(self, step: Mapping[str, Any]) -> None:
        """A stream that is this old: no test can send so much."""
        self.stream.into.received = self.stream.into.delivered = step["count"]

    def see_taken(self) -> int:
        return int(self.stream.out.taken)

    def see_replayed(self) -> int:
        """How much went out by the last step."""
        return self.replayed

    def see_sent(self) -> int:
        return int(self.stream.out.sent)

    def see_credit(self) -> int:
        return int(self.stream.out.credit)

    def see_out_delivered(self) -> int:
        return int(self.stream.out.delivered)

    def see_eof_acked(self) -> bool:
        return bool(self.stream.out.eof_acked)

    def see_received(self) -> int:
        return int(self.stream.into.received)

    def see_delivered(self) -> int:
        return int(self.stream.into.delivered)

    def see_window(self) -> int:
        return int(self.stream.into.window)

    def see_into_limit(self) -> int:
        return int(self.stream.into.limit)

    def see_is_finished(self) -> bool:
        return bool(self.stream.is_finished)


@each("streams")
def test_stream_counts_as_the_vector_says(shared: Any, vector: dict[str, Any]) -> None:
    """Credit, acks, windows and ends follow from the counts alone."""
    run = StreamRun(shared, vector)
    for number, step in enumerate(vector["steps"]):
        try:
            run.play(step)
        except AssertionError as exc:
            raise AssertionError(f"step {number}: {step}") from exc


# What the server counts.


def play_counter(directions: list[FlowCounters], step: Mapping[str, Any]) -> Any:
    direction = directions[step["tunnel"]]
    if step["do"] == "first_limit":
        return direction.raise_limit(step["limit"])
    if step["do"] == "ack":
        return direction.on_ack(step["delivered"], step["limit"], step["eof"])
    if step["do"] == "data":
        direction.on_data(step["size"])
    elif step["do"] == "eof":
        direction.on_eof(step["count"])
    else:
        direction.release()
    return None


@each("counters")
def test_server_counts_as_the_vector_says(vector: dict[str, Any]) -> None:
    """Limits are lowered to cap and budget, and an end that breaks the rules is found out."""
    budget = WindowBudget(vector["budget"])
    count = 1 + max(step["tunnel"] for step in vector["steps"])
    directions = [FlowCounters(budget, vector["cap"]) for _ in range(count)]
    for number, step in enumerate(vector["steps"]):
        if "error" in step:
            with pytest.raises(load("package").TunnelError) as caught:
                play_counter(directions, step)
            assert caught.value.code == "protocol_error", f"step {number}: {step}"
        else:
            result = play_counter(directions, step)
            assert result == step.get("gives"), f"step {number}: {step}"
    for direction in directions:
        direction.release()
    assert budget.free == vector["budget"]


# The frame_sender.


class OutboxRun:
    """Plays the steps of an frame_sender vector; a frame is known by its name."""

    def __init__(self, module: Any, clock: Clock) -> None:
        self.module = module
        self.clock = clock
        self.frame_sender = module.SendQueue()

    def play(self, step: Mapping[str, Any]) -> None:
        """Put one thing, take all that is listed, or set the clock."""
        if "clock" in step:
            self.clock.now = step["clock"]
        elif "take" in step:
            for name in step["take"]:
                assert self.name_of(take(self.frame_sender)) == name
        else:
            getattr(self, "put_" + step["put"])(step)

    def text(self, step: Mapping[str, Any]) -> Any:
        return self.module.Frame(load("package").OP_TEXT, b"", step["name"].encode())

    def name_of(self, frame: Any) -> str | None:
        if frame is None:
            return None
        if frame.opcode == load("package").OP_BINARY:
            return f"data {int.from_bytes(frame.head, 'big')} {len(frame.payload)}"
        return str(frame.payload.decode())

    def put_first(self, step: Mapping[str, Any]) -> None:
        cancellable = step.get("cancellable", False)
        self.frame_sender.put_first(step["channel"], self.text(step), cancellable=cancellable)

    def put_ack(self, step: Mapping[str, Any]) -> None:
        self.frame_sender.put_ack(step["channel"], self.text(step))

    def put_leg(self, step: Mapping[str, Any]) -> None:
        self.frame_sender.put_leg(step["name"], self.text(step))

    def put_data(self, step: Mapping[str, Any]) -> None:
        head = step["channel"].to_bytes(4, "big")
        self.frame_sender.put_data(step["channel"], head, bytes(step["size"]))

    def put_eof(self, step: Mapping[str, Any]) -> None:
        self.frame_sender.put_eof(step["channel"], self.text(step))

    def put_end(self, step: Mapping[str, Any]) -> None:
        in_turn = step.get("in_turn", False)
        self.frame_sender.put_end(step["channel"], self.text(step), in_turn=in_turn)

    def put_close(self, step: Mapping[str, Any]) -> None:
        self.frame_sender.close(self.text(step), flush=step.get("flush", True))

    def put_stop(self, step: Mapping[str, Any]) -> None:
        self.frame_sender.stop()


@each("outbox")
def test_outbox_gives_frames_in_order(
    shared: Any, vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast lane by its slots, then channels by turns, then the close."""
    clock = Clock(0.0)
    clock.replace_in(monkeypatch, sys.modules[shared.SendQueue.__module__])
    run = OutboxRun(shared, clock)
    for number, step in enumerate(vector["steps"]):
        # take() would wait for ever in a test that expects too much.
        assert "take" not in step or step["take"][-1] is None or run.frame_sender.has_frames, number
        try:
            run.play(step)
        except AssertionError as exc:
            raise AssertionError(f"step {number}: {step}") from exc
    assert not run.frame_sender.has_frames
