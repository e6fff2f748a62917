"""The HTTP answer that refuses a WebSocket: the relay's own, or that of something before it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from http_network_relay.dial.endpoint import Endpoint
from http_network_relay.dial.http_proxy import printable
from http_network_relay.wire.codes import Code, find_code
from http_network_relay.wire.constants import RELAY_HEADER
from http_network_relay.wire.errors import RelayError

# A `Retry-After` counts up to here: a typo must not stop a client for years.
_MAX_RETRY_AFTER_S = 300.0
# By HTTP status, where the body has no code of the server.
_CODES = {401: Code.UNAUTHORIZED, 403: Code.FORBIDDEN, 426: Code.VERSION_UNSUPPORTED}
_CODES |= {429: Code.BUSY, 503: Code.BUSY}


def header_number(text: str) -> float | None:
    """Read a header's number; None for anything else, however long."""
    return float(text) if text.isascii() and text.isdecimal() else None


def refusal(endpoint: Endpoint, status: int, headers: Mapping[str, str], body: bytes) -> RelayError:
    """Return the error for an answer; `headers` have names in lower case."""
    where = f"{endpoint.host}:{endpoint.port}"
    location = headers.get("location")
    if 300 <= status < 400 and location:
        return RelayError(
            Code.NOT_A_RELAY,
            f"{where} redirects to {printable(location)}; redirects are not followed with"
            " secrets, so give that address as --server-url if it is right",
        )
    if RELAY_HEADER.lower() not in headers:
        server = printable(headers.get("server", "unknown"))
        return RelayError(
            Code.NOT_A_RELAY,
            f"something before the relay answered {status}, Server: {server};"
            f" check --server-url {endpoint.url}",
        )
    try:
        answer = json.loads(body)
        code, message = str(answer["code"]), printable(str(answer["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"it answered {status}"
    if find_code(code) in (None, Code.INTERNAL_ERROR):  # Of the server, not of the tunnel.
        code = _CODES.get(status, Code.SERVER_FAILED)
    retry_after_s = header_number(headers.get("retry-after", ""))
    if retry_after_s is not None:
        retry_after_s = min(retry_after_s, _MAX_RETRY_AFTER_S)
    return RelayError(code, f"the relay at {where}: {message}", retry_after_s=retry_after_s)
