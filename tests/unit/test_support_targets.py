"""The harness's targets do what their names say, and record how connections end."""

import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.targets import (
    AnswerAfterEofTarget,
    DuplexTarget,
    EchoTarget,
    RecordingTarget,
    ResetTarget,
    SilentTarget,
    SinkTarget,
    SourceTarget,
    black_hole_port,
    pseudo_random,
    pseudo_random_bytes,
    pseudo_random_sha256,
)
from tests.support.waiting import eventually

LINGER_0 = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        yield sock


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while more := sock.recv(1 << 16):
        data += more
    return bytes(data)


def test_pseudo_random_is_the_same_when_seeded_alike() -> None:
    """Equal arguments give equal bytes of exactly the size asked for."""
    data = pseudo_random_bytes(200_001, 5)
    assert len(data) == 200_001
    assert data == b"".join(pseudo_random(200_001, 5))
    assert hashlib.sha256(data).hexdigest() == pseudo_random_sha256(200_001, 5)
    assert data != pseudo_random_bytes(200_001, 6)
    assert data[:65536] != data[65536:131072]


def test_echo_target_answers_when_written_to() -> None:
    """What comes goes back, and the end too."""
    with EchoTarget() as target, connected(target.port) as sock:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"hello"
        eventually(lambda: target.open_count == 0)


def test_sink_target_hashes_when_written_to() -> None:
    """It counts and hashes and keeps nothing."""
    with SinkTarget() as target, connected(target.port) as sock:
        sock.sendall(pseudo_random_bytes(100_000))
        sock.shutdown(socket.SHUT_WR)
        conversation = target.conversation()
        assert conversation.wait_ended() == "eof"
        assert conversation.received_sha256 == pseudo_random_sha256(100_000)
        assert conversation.received == b""


def test_source_target_sends_its_stream_when_connected() -> None:
    """The stream is the seeded one, followed by FIN."""
    with SourceTarget(100_000, 3) as target, connected(target.port) as sock:
        assert read_all(sock) == pseudo_random_bytes(100_000, 3)


def test_duplex_target_hashes_both_ways_when_both_write() -> None:
    """It sends and receives at once."""
    with DuplexTarget(3_000_000, "down") as target, connected(target.port) as sock:

        def send() -> None:
            sock.sendall(pseudo_random_bytes(3_000_000, "up"))
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        down = hashlib.sha256(read_all(sock)).hexdigest()
        sender.join()
        conversation = target.conversation()
        conversation.wait_ended()
        assert down == conversation.sent_sha256 == pseudo_random_sha256(3_000_000, "down")
        assert conversation.received_sha256 == pseudo_random_sha256(3_000_000, "up")


def test_answer_after_eof_target_sorts_when_it_saw_the_end() -> None:
    """Nothing comes before our FIN, everything after."""
    with AnswerAfterEofTarget() as target, connected(target.port) as sock:
        sock.sendall(b"b\na\n")
        target.conversation().wait_received(4)
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(5)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"a\nb\n"


def test_silent_target_takes_a_bounded_count_when_written_to() -> None:
    """It never reads, so the kernels' buffers fill."""
    with SilentTarget(receive_buffer_bytes=65536) as target, connected(target.port) as sock:
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(64 * 1024 * 1024))
        assert target.conversation().received_bytes == 0


def test_reset_target_resets_when_the_bytes_came() -> None:
    """RST, not FIN, after exactly that many bytes."""
    with ResetTarget(after_bytes=3) as target, connected(target.port) as sock:
        sock.sendall(b"abc")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_recording_target_tells_eof_from_reset_when_connections_end() -> None:
    """FIN is "eof", RST is "reset", and the bytes before are kept."""
    with RecordingTarget() as target:
        with connected(target.port) as sock:
            sock.sendall(b"one")
        with connected(target.port) as sock:
            sock.sendall(b"two")
            target.conversation(1).wait_received(3)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        first, second = target.conversation(0), target.conversation(1)
        assert (first.wait_ended(), first.received) == ("eof", b"one")
        assert (second.wait_ended(), second.received) == ("reset", b"two")


def test_recording_target_stays_half_open_when_told() -> None:
    """After our FIN it can still send, see a reset, and close when the test says."""
    with RecordingTarget(close_on_eof=False) as target:
        with connected(target.port) as sock:
            sock.shutdown(socket.SHUT_WR)
            conversation = target.conversation()
            assert conversation.wait_ended() == "eof"
            conversation.send(b"late")
            assert sock.recv(4) == b"late"
            conversation.close()
            assert sock.recv(1) == b""
        with connected(target.port) as sock:
            sock.shutdown(socket.SHUT_WR)
            conversation = target.conversation(1)
            conversation.wait_ended()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            sock.close()
            conversation.wait(lambda me: me.ended == "reset")


@pytest.mark.parametrize("half_closed", [False, True])
def test_conversation_resets_when_the_test_says(half_closed: bool) -> None:
    """The peer gets RST and the record does not call that the peer's end."""
    with RecordingTarget(close_on_eof=False) as target, connected(target.port) as sock:
        conversation = target.conversation()
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
            conversation.wait_ended()
        conversation.reset()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert conversation.ended == ("eof" if half_closed else None)


def test_target_joins_its_threads_when_they_are_blocked() -> None:
    """Leaving the block ends a thread that is stuck in send or recv."""
    with (
        DuplexTarget(50_000_000) as duplex,
        EchoTarget() as echo,
        connected(duplex.port),
        connected(echo.port),
    ):
        echo.conversation()
        sending = duplex.conversation()
        eventually(lambda: sending.sent_bytes > 0)
        duplex.stop()
        echo.stop()


def test_black_hole_port_never_answers_when_dialled() -> None:
    """connect() runs into its timeout."""
    with black_hole_port() as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), timeout=0.1)
