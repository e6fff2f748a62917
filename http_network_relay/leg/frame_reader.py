"""WebSocket frames (RFC 6455, 5.2) that are made and read without the library.

Whole messages go out with a header written by hand, and whole messages, pings and pongs are
taken off the leg here. All other frames are left to the library, as they came: closes,
fragments, and whatever breaks the rules.
"""

from __future__ import annotations

from collections.abc import Callable

from http_network_relay.leg.duplex_socket import DuplexSocket
from http_network_relay.wire.constants import (
    MAX_MESSAGE_BYTES,
    MAX_PING_BYTES,
    OP_BINARY,
    OP_CLOSE,
    OP_PING,
    OP_PONG,
    OP_TEXT,
)
from http_network_relay.wire.frames import FIN, MASK_BIT, ZERO_KEY, mask

# One read takes many small frames, or a large one as long as the last, or most of it; the rest
# is read to where it stays. From 128 KiB on glibc would map memory for each read anew.
_READ_BYTES = 64 * 1024
_LARGE_BYTES = _READ_BYTES // 2
# The first byte of what is taken here -> its opcode and largest size.
_TAKEN = {
    FIN | OP_TEXT: (OP_TEXT, MAX_MESSAGE_BYTES),
    FIN | OP_BINARY: (OP_BINARY, MAX_MESSAGE_BYTES),
    FIN | OP_PING: (OP_PING, MAX_PING_BYTES),
    FIN | OP_PONG: (OP_PONG, MAX_PING_BYTES),
}
# What stands for a size of two or eight bytes: the least size that needs them, and how many.
_LONG_SIZES = {126: (126, 2), 127: (2**16, 8)}
# First bytes of frames that are whole messages, without an extension's bits.
_WHOLE = frozenset(FIN | opcode for opcode in (OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG))


class FrameReader:
    """What comes in on a leg. The reader's thread alone uses it."""

    def __init__(self, duplex: DuplexSocket, begun: bytes = b"", *, is_masked: bool) -> None:
        self._duplex = duplex
        self._is_masked = is_masked
        # Read, and not taken from `_at` on.
        self._ahead = begun
        self._at = 0
        # What the next read asks for: after a large frame as much, so that another as long comes
        # whole, and nothing of the one behind it.
        self._read_bytes = _READ_BYTES
        # Bytes of an odd frame that the library has still to read; None: all that comes.
        self._odd_bytes: int | None = 0

    def read_message(
        self, on_pause: Callable[[], None] | None = None
    ) -> tuple[int, bytearray | memoryview] | None:
        """Wait for a frame and take it, if it is a whole message, a ping or a pong.

        Return its opcode and payload; of a large message that is a view of what was read. None:
        it is the library's, by read(), and so is the end of the stream. `on_pause`: as in
        Duplex.recv. Raises OSError.
        """
        # In one piece: it runs for each message of each leg.
        if self._odd_bytes != 0:
            return None
        if len(self._ahead) - self._at < 2 and not self._fill(2, on_pause):
            self._odd_bytes = None
            return None
        first, size = self._ahead[self._at], self._ahead[self._at + 1]
        if first not in _WHOLE or (size >= MASK_BIT) != self._is_masked:
            # From what is not a whole message on, the stream is the library's.
            self._odd_bytes = None
            return None
        size &= ~MASK_BIT
        least, count_bytes = _LONG_SIZES.get(size, (0, 0))
        header_bytes = 2 + count_bytes + (4 if self._is_masked else 0)
        if len(self._ahead) - self._at < header_bytes and not self._fill(header_bytes):
            self._odd_bytes = None
            return None
        if count_bytes:
            size = int.from_bytes(self._ahead[self._at + 2 : self._at + 2 + count_bytes], "big")
            if size < least:  # It would have fitted into a shorter form: an error.
                self._odd_bytes = None
                return None
        opcode, most = _TAKEN.get(first, (0, -1))
        if size > most:
            self._odd_bytes = header_bytes + size
            return None
        self._at += header_bytes
        self._read_bytes = header_bytes + size if size >= _LARGE_BYTES else _READ_BYTES
        key = self._ahead[self._at - 4 : self._at] if self._is_masked else ZERO_KEY
        is_large = size >= _LARGE_BYTES and opcode == OP_BINARY
        if is_large and key == ZERO_KEY and len(self._ahead) - self._at >= size:
            # As it lies: what was read with it, and is kept as long, is no more than it.
            self._at += size
            return opcode, memoryview(self._ahead)[self._at - size : self._at]
        data = self._take(size)
        if data is None:
            self._odd_bytes = None
            return None
        if key != ZERO_KEY:
            mask(data, key)
        return opcode, data

    def read(self, size: int) -> bytes:
        """As socket.recv, for the library: bytes of the frame that read_message() left."""
        if not self._fill(1):
            return b""
        left = self._odd_bytes
        data = self._ahead[self._at : self._at + (size if left is None else min(size, left))]
        self._at += len(data)
        if left is not None:
            self._odd_bytes = left - len(data)
        return data

    def _fill(self, size: int, on_pause: Callable[[], None] | None = None) -> bool:
        """Have `size` bytes ahead; False if the stream ends before."""
        while len(self._ahead) - self._at < size:
            # Before the wait: what was taken is not kept by a leg that goes idle.
            self._ahead, self._at = self._ahead[self._at :], 0
            data = self._duplex.recv(self._read_bytes, on_pause)
            if not data:
                return False
            self._ahead += data
        return True

    def _take(self, size: int) -> bytearray | None:
        """Return the next `size` bytes; None if the stream ends before."""
        begun = min(size, len(self._ahead) - self._at)
        begin = memoryview(self._ahead)[self._at : self._at + begun]
        self._at += begun
        if begun == size:
            return bytearray(begin)
        data = bytearray(size)
        data[:begun] = begin
        with memoryview(data) as view:
            while begun < size:
                count = self._duplex.recv_into(view[begun:])
                if not count:
                    return None
                begun += count
        return data
