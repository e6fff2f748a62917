"""The server's log: one handler on stderr, and the fields that every line of a tunnel has."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # Takes no parameter before Python 3.11.

ROOT_NAME = "http_network_relay.server"


def set_up_logging() -> None:
    """Log to stderr from INFO on, unless the starting program has set logging up."""
    logger = logging.getLogger(ROOT_NAME)
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class FieldsAdapter(_Adapter):
    """Appends its fields to each line: `tunnel closed reason=eof client=a tunnel=1f2e3d4c`."""

    def process(
        self, msg: str, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        fields = "".join(f" {name}={value}" for name, value in (self.extra or {}).items())
        return msg + fields.replace("%", "%%"), kwargs
