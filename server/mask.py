"""Takes the mask off incoming frames in C, where a library that can is installed.

wsproto does it in Python, which is more than half of the relay's CPU per byte. The
package `websockets` has the C function; without it everything works, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable

from wsproto import frame_protocol


def _load() -> Callable[[bytearray, bytes], bytes] | None:
    try:
        from websockets.speedups import apply_mask
    except ImportError:
        return None
    apply: Callable[[bytearray, bytes], bytes] = apply_mask
    return apply


class FastMasker:
    """As wsproto's XorMaskerSimple: one frame's mask, over the pieces that come."""

    apply_mask: Callable[[bytearray, bytes], bytes]

    def __init__(self, masking_key: bytes | bytearray) -> None:
        self._key = bytes(masking_key)

    def process(self, data: bytearray) -> bytes:
        """Return the next piece without its mask."""
        used = len(data) % len(self._key)
        plain = self.apply_mask(data, self._key) if data else b""
        # The next piece goes on in the middle of the key.
        self._key = self._key[used:] + self._key[:used]
        return plain


def install() -> bool:
    """Let wsproto use it; False if there is no C function to use."""
    apply = _load()
    if apply is None:
        return False
    FastMasker.apply_mask = staticmethod(apply)
    # The decoder looks the name up for each frame; there is no option for it.
    frame_protocol.XorMaskerSimple = FastMasker  # type: ignore[misc, assignment]
    return True
