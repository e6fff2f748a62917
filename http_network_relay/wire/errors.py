"""The errors of all three programs: one root, few classes.

str() of each is a sentence for a person. The code is for programs, logs and peers; a code
of a newer peer need not be in the table of codes.py.
"""

from __future__ import annotations

from typing import Literal

from http_network_relay.wire.codes import EXIT_TUNNEL_LOST, CloseCode, Code, find_code

DialFailure = Literal["refused", "unreachable", "timeout", "unknown", "denied", "cancelled"]


class RelayError(Exception):
    """An error that has a code."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def exit_code(self) -> int:
        """The proxy command's exit code; an unknown code counts as a lost tunnel."""
        row = find_code(self.code)
        return EXIT_TUNNEL_LOST if row is None else row.exit_code

    @property
    def is_retryable(self) -> bool:
        """Whether a new try may help."""
        row = find_code(self.code)
        return row is not None and row.is_retryable


class DialError(RelayError):
    """A dial failed. The code is that of the way to the server; the client maps `kind`."""

    def __init__(self, kind: DialFailure, message: str) -> None:
        super().__init__(Code.SERVER_UNREACHABLE, message)
        self.kind = kind


class LegError(RelayError):
    """The peer broke the leg's rules; the leg ends with `close_code`."""

    def __init__(self, message: str, close_code: int = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(Code.PROTOCOL_ERROR, message)
        self.close_code = close_code


class TunnelError(RelayError):
    """The peer broke one tunnel's rules; that tunnel is reset, the leg goes on."""

    def __init__(self, message: str, channel: int = 0, code: str = Code.PROTOCOL_ERROR) -> None:
        super().__init__(code, message)
        self.channel = channel


class ConfigError(RelayError):
    """A setting or a file is wrong; the message names the setting and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.USAGE, message)


class Refused(RelayError):
    """The server admits no leg or opens no tunnel: an HTTP answer, or `refused`."""
