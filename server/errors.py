"""What the relay refuses, and with which HTTP status (docs/protocol.md, "Codes")."""

from __future__ import annotations

from typing import NamedTuple


class RelayError(Exception):
    """Root of the server's own errors; `code` is what the peer and the log read."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ConfigError(RelayError):
    """A setting or a file is wrong; the message names it and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__("config", message)


class TunnelRefused(RelayError):
    """An `open` or `resume` that does not become a tunnel: answered with `refused`."""


class _Answer(NamedTuple):
    status: int
    retry_after_s: int | None = None


# code -> how it is answered before the upgrade.
HTTP_ANSWERS: dict[str, _Answer] = {
    "bad_request": _Answer(400),
    "unauthorized": _Answer(401),
    "forbidden": _Answer(403),
    "not_found": _Answer(404),
    "version_unsupported": _Answer(426),
    "head_timeout": _Answer(408),
    # As long as a client waits anyway whose secret is wrong.
    "too_many": _Answer(429, 30),
    "head_too_large": _Answer(431),
    "internal_error": _Answer(500),
    "wrong_worker": _Answer(500),
    # Legs last for hours, but a failing peer gives its slot back within seconds.
    "busy": _Answer(503, 5),
    # A rolling restart has the next worker listening already.
    "server_restart": _Answer(503, 1),
}


class HttpRefusal(RelayError):
    """A request that is answered with an HTTP error; `code` is in HTTP_ANSWERS."""

    @property
    def answer(self) -> _Answer:
        return HTTP_ANSWERS[self.code]
