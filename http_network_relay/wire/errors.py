"""The errors of all three programs: one root, few classes."""

from __future__ import annotations

from typing import Literal

from http_network_relay.wire.codes import (
    CLOSE_PROTOCOL_ERROR,
    ERRORS,
    EXIT_TUNNEL_LOST,
    HTTP_ANSWERS,
    HttpAnswer,
)

DialFailure = Literal["refused", "unreachable", "timeout", "unknown", "denied", "cancelled"]


class RelayError(Exception):
    """Something failed that has a code; `str()` is a sentence for a person."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def exit_code(self) -> int:
        """The proxy command's exit code; an unknown code of a newer peer counts as a loss."""
        return ERRORS.get(self.code, (EXIT_TUNNEL_LOST, False))[0]

    @property
    def is_retryable(self) -> bool:
        """Whether a new try may help."""
        return ERRORS.get(self.code, (EXIT_TUNNEL_LOST, False))[1]


class DialError(RelayError):
    """A dial failed. The code is that of the way to the server; the client maps `kind`."""

    def __init__(self, kind: DialFailure, message: str) -> None:
        super().__init__("server_unreachable", message)
        self.kind = kind


class LegError(Exception):
    """The peer broke the leg's rules; the leg ends with `close_code`."""

    def __init__(self, message: str, close_code: int = CLOSE_PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.close_code = close_code


class TunnelError(Exception):
    """The peer broke one tunnel's rules; that tunnel is reset, the leg goes on."""

    def __init__(self, message: str, channel: int = 0, code: str = "protocol_error") -> None:
        super().__init__(message)
        self.channel = channel
        self.code = code


class ConfigError(RelayError):
    """A setting or a file is wrong; the message names it and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__("config", message)


class TunnelRefused(RelayError):
    """An `open` or `resume` that does not become a tunnel: answered with `refused`."""


class HttpRefusal(RelayError):
    """A request that is answered with an HTTP error; `code` is in HTTP_ANSWERS."""

    @property
    def answer(self) -> HttpAnswer:
        return HTTP_ANSWERS[self.code]
