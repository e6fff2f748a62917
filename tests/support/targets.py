"""TCP targets inside the test's process, for a client to dial at a tunnel's far end.

Each is a context manager with `.port`, keeps one `Conversation` per connection, and joins
all its threads at the end, whatever they were blocked in.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, TypeVar

S = TypeVar("S", bound="Target")

_CHUNK_BYTES = 64 * 1024


def pseudo_random(
    size: int, seed: int | str = 0, *, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield `size` bytes that look random, the same for equal arguments, at some GB/s.

    Each chunk is one random block with its own 16-byte number in front, so no two are alike
    and a lost, doubled or swapped piece changes the hash.
    """
    block = random.Random(seed).randbytes(chunk_bytes)
    offset = 0
    while offset < size:
        number = offset.to_bytes(16, "big")
        chunk = number + block[16:]
        yield chunk[: size - offset]
        offset += chunk_bytes


def pseudo_random_bytes(size: int, seed: int | str = 0) -> bytes:
    """The same stream in one piece."""
    return b"".join(pseudo_random(size, seed))


def pseudo_random_sha256(size: int, seed: int | str = 0) -> str:
    """The hex SHA-256 of that stream."""
    digest = hashlib.sha256()
    for chunk in pseudo_random(size, seed):
        digest.update(chunk)
    return digest.hexdigest()


class Conversation:
    """One accepted connection: what came, what was sent, how the other side ended it.

    The connection's own thread reads; a test may send, and ask for an end. `ended` is None
    while the other side has not ended, else "eof" (FIN) or "reset" (RST).
    """

    def __init__(self, sock: socket.socket, *, keep: bool) -> None:
        self.peer: tuple[str, int] = sock.getpeername()
        self._sock = sock
        # Guards everything below; notified at every change.
        self._changed = threading.Condition()
        self._received = bytearray()
        self._keep = keep
        self._received_bytes = 0
        self._received_hash = hashlib.sha256()
        self._sent_bytes = 0
        self._sent_hash = hashlib.sha256()
        self._ended: Literal["eof", "reset"] | None = None
        self._closed = False
        self._reset_at_close = False
        self._end_wanted = threading.Event()  # by the test or the target, not by the other side

    @property
    def ended(self) -> Literal["eof", "reset"] | None:
        with self._changed:
            return self._ended

    @property
    def is_closed(self) -> bool:
        """Return whether our side has closed its socket too."""
        with self._changed:
            return self._closed

    @property
    def received(self) -> bytes:
        """Return all bytes received; only a RecordingTarget keeps them."""
        with self._changed:
            return bytes(self._received)

    @property
    def received_bytes(self) -> int:
        with self._changed:
            return self._received_bytes

    @property
    def received_sha256(self) -> str:
        with self._changed:
            return self._received_hash.hexdigest()

    @property
    def sent_bytes(self) -> int:
        with self._changed:
            return self._sent_bytes

    @property
    def sent_sha256(self) -> str:
        with self._changed:
            return self._sent_hash.hexdigest()

    def wait(self, predicate: Callable[[Conversation], object], timeout_s: float = 5.0) -> None:
        """Wait until `predicate(self)` is true; AssertionError after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout_s):
                raise AssertionError(f"{self!r} did not become as expected in {timeout_s} s")

    def wait_ended(self, timeout_s: float = 5.0) -> Literal["eof", "reset"]:
        """Wait until the other side has ended, and return how."""
        self.wait(lambda me: me.ended, timeout_s)
        ended = self.ended
        assert ended is not None
        return ended

    def wait_received(self, count: int, timeout_s: float = 5.0) -> None:
        """Wait until at least `count` bytes came."""
        self.wait(lambda me: me.received_bytes >= count, timeout_s)

    def send(self, data: bytes) -> None:
        """Send all of `data`; OSError when the connection has ended."""
        try:
            self._sock.sendall(data)
        except OSError:
            self._note_end("reset")
            raise
        with self._changed:
            self._sent_bytes += len(data)
            self._sent_hash.update(data)
            self._changed.notify_all()

    def shutdown_write(self) -> None:
        """Send FIN and go on reading."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Have the connection's thread close it: FIN, or RST if the kernel holds unread data."""
        # SHUT_RD sends nothing, and wakes the thread, which closes. A close() from here
        # would leave it asleep in recv() with the connection open.
        self._end_wanted.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def reset(self) -> None:
        """Have the connection's thread close it with RST."""
        with self._changed:
            self._reset_at_close = True
        self.close()

    def __repr__(self) -> str:
        return (
            f"<Conversation received={self.received_bytes} sent={self.sent_bytes}"
            f" ended={self.ended} closed={self.is_closed}>"
        )

    # For the target's own threads.

    def recv(self, size: int = _CHUNK_BYTES) -> bytes:
        """The next bytes; b"" once the other side, the test or the target has ended it."""
        try:
            data = self._sock.recv(size)
        except OSError:
            self._note_end("reset")
            return b""
        if not data:
            self._note_end("eof")
        with self._changed:
            self._received_bytes += len(data)
            self._received_hash.update(data)
            if self._keep:
                self._received += data
            self._changed.notify_all()
        return data

    def wait_without_reading(self) -> None:
        """Wait until the test or the target ends it, or an RST comes."""
        # Asking for no event still reports errors. The kernel cannot wake us for the flag:
        # a shutdown() that would do so sends a FIN, and the test may want an RST.
        poll = select.poll()
        poll.register(self._sock, 0)
        while not self._end_wanted.is_set():
            if any(events & select.POLLERR for _, events in poll.poll(20)):
                self._note_end("reset")
                return

    def _note_end(self, how: Literal["eof", "reset"]) -> None:
        with self._changed:
            # The first end wins, but an RST may still come after a FIN.
            if not self._end_wanted.is_set() and self._ended != "reset":
                self._ended = how
            self._changed.notify_all()

    def _abort(self) -> None:
        """Wake the thread that is in recv or send, for good."""
        self._end_wanted.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _close_now(self) -> None:
        with self._changed:
            if self._reset_at_close:
                linger_0 = struct.pack("ii", 1, 0)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0)
            self._sock.close()
            self._closed = True
            self._changed.notify_all()


class Target:
    """Accepts on 127.0.0.1 and runs `serve` in one thread per connection."""

    # Whether conversations keep the bytes received, or only count and hash them.
    keeps_bytes = False

    def __init__(self, *, receive_buffer_bytes: int | None = None) -> None:
        """`receive_buffer_bytes` bounds the kernel's buffer of a target that does not read."""
        # Guards _conversations and _threads; notified when a connection comes.
        self._changed = threading.Condition()
        self._conversations: list[Conversation] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        if receive_buffer_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name=f"target:{self.port}")
        self._acceptor.start()

    @property
    def conversations(self) -> list[Conversation]:
        """All connections so far, in the order in which they came."""
        with self._changed:
            return list(self._conversations)

    @property
    def open_count(self) -> int:
        """Connections that neither side has fully closed."""
        return sum(not each.is_closed for each in self.conversations)

    def conversation(self, index: int = 0, timeout_s: float = 5.0) -> Conversation:
        """Wait for connection number `index` and return it."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._conversations) > index, timeout_s):
                raise AssertionError(f"no connection number {index} in {timeout_s} s")
            return self._conversations[index]

    def serve(self, conversation: Conversation) -> None:
        """Override: one connection, in its own thread. It is closed when this returns."""
        raise NotImplementedError

    def stop(self) -> None:
        """Refuse new connections, end all and join. Idempotent."""
        # Linux: shutdown() wakes the thread in accept(); close() alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for conversation in self.conversations:
            if not conversation.is_closed:
                conversation._abort()
        for thread in self._threads:
            thread.join()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                conversation = Conversation(sock, keep=self.keeps_bytes)
            except OSError:  # already reset by the other side
                sock.close()
                continue
            thread = threading.Thread(
                target=self._run, args=(conversation,), name=f"target:{self.port}:serve"
            )
            with self._changed:
                self._conversations.append(conversation)
                self._threads.append(thread)
                self._changed.notify_all()
            thread.start()

    def _run(self, conversation: Conversation) -> None:
        try:
            # The other side may end the connection at any time: record the end, do not raise.
            with contextlib.suppress(OSError):
                self.serve(conversation)
        finally:
            conversation._close_now()


class EchoTarget(Target):
    """Sends all bytes back; ends when the other side does."""

    def serve(self, conversation: Conversation) -> None:
        while data := conversation.recv():
            conversation.send(data)


class SinkTarget(Target):
    """Reads all and sends nothing: see `received_bytes` and `received_sha256`."""

    def serve(self, conversation: Conversation) -> None:
        while conversation.recv():
            pass


class SourceTarget(Target):
    """Sends pseudo_random(size, seed), then FIN, then waits for the other side's end."""

    def __init__(self, size: int, seed: int | str = 0) -> None:
        self.size = size
        self.seed = seed
        super().__init__()

    def serve(self, conversation: Conversation) -> None:
        for chunk in pseudo_random(self.size, self.seed):
            conversation.send(chunk)
        conversation.shutdown_write()
        while conversation.recv():
            pass


class DuplexTarget(Target):
    """Sends pseudo_random(size, seed) and FIN while it reads to the other side's end."""

    def __init__(self, size: int, seed: int | str = 0) -> None:
        self.size = size
        self.seed = seed
        super().__init__()

    def serve(self, conversation: Conversation) -> None:
        sender = threading.Thread(
            target=self._send, args=(conversation,), name=f"target:{self.port}:send"
        )
        sender.start()
        try:
            while conversation.recv():
                pass
        finally:
            if conversation.ended != "eof":
                conversation._abort()
            sender.join()

    def _send(self, conversation: Conversation) -> None:
        with contextlib.suppress(OSError):
            for chunk in pseudo_random(self.size, self.seed):
                conversation.send(chunk)
        conversation.shutdown_write()


class AnswerAfterEofTarget(Target):
    """Like `sort`: reads to the end, then answers the lines in order, then ends."""

    def serve(self, conversation: Conversation) -> None:
        lines = bytearray()
        while data := conversation.recv():
            lines += data
        if conversation.ended == "eof":
            conversation.send(b"".join(sorted(bytes(lines).splitlines(keepends=True))))


class SilentTarget(Target):
    """Accepts, then neither reads nor writes, so it does not see the other side's FIN."""

    def serve(self, conversation: Conversation) -> None:
        conversation.wait_without_reading()


class ResetTarget(Target):
    """Reads `after_bytes` (0: none), then resets the connection."""

    def __init__(self, after_bytes: int = 0) -> None:
        self.after_bytes = after_bytes
        super().__init__()

    def serve(self, conversation: Conversation) -> None:
        while conversation.received_bytes < self.after_bytes and conversation.recv():
            pass
        conversation.reset()


class RecordingTarget(Target):
    """Keeps every byte that comes and how the other side ended.

    The test plays the target's part through the conversation: `send`, `shutdown_write`,
    `close`, `reset`. With `close_on_eof` off it stays open, one way, after the other's FIN.
    """

    keeps_bytes = True

    def __init__(self, *, close_on_eof: bool = True) -> None:
        self.close_on_eof = close_on_eof
        super().__init__()

    def serve(self, conversation: Conversation) -> None:
        while conversation.recv():
            pass
        if not self.close_on_eof and conversation.ended == "eof":
            conversation.wait_without_reading()


@contextmanager
def black_hole_port() -> Iterator[int]:
    """A port on which connect() neither succeeds nor fails: its accept queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        # A backlog of 0 still accepts one connection; Linux drops the SYN of the next.
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port


# A size that no test reads to its end.
ENDLESS = 1 << 40


def wait_stuck(conversation: Conversation, quiet_s: float = 0.3) -> None:
    """Wait until the target could send nothing more for `quiet_s`."""

    def sent_more_than(size: int) -> Callable[[Conversation], bool]:
        return lambda me: me.sent_bytes > size

    is_flowing = True
    while is_flowing:
        try:
            conversation.wait(sent_more_than(conversation.sent_bytes), quiet_s)
        except AssertionError:
            is_flowing = False
    assert conversation.sent_bytes > 0
