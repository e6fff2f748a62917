"""Name lookups: bounded daemon threads inside a deadline."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any

from http_network_relay.dial.deadline import Deadline
from http_network_relay.wire.errors import DialError

# Name lookups cannot be interrupted, so they run in daemon threads; this many at most.
_lookup_slots = threading.BoundedSemaphore(32)


def resolve(host: str, port: int, deadline: Deadline) -> list[Any]:
    """Return getaddrinfo's answers by turns of family. Raises DialError."""
    if parse_address(host.strip("[]")) is not None:
        # No lookup: an address must not wait behind names that hang.
        return _by_turns(_look_up(host, port))
    while not _lookup_slots.acquire(timeout=deadline.slice_s()):
        deadline.check(f"the name {host} could not be looked up")
    answers: list[Any] = []
    is_done = threading.Event()

    def look_up() -> None:
        try:
            answers.append(_look_up(host, port))
        except (OSError, UnicodeError) as exc:
            answers.append(exc)
        finally:
            _lookup_slots.release()
            is_done.set()

    # Daemon: getaddrinfo has no timeout and nothing can wake it.
    thread = threading.Thread(target=look_up, name=f"lookup:{host}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _lookup_slots.release()
        raise
    while not is_done.wait(deadline.slice_s()):
        deadline.check(f"the name {host} could not be looked up")
    (answer,) = answers
    if isinstance(answer, Exception):
        reason = getattr(answer, "strerror", None) or answer
        raise DialError("unknown", f"the name {host} is not known ({reason})") from answer
    return _by_turns(answer)


def _look_up(host: str, port: int) -> list[Any]:
    # An IPv6 literal may come in brackets, as it stands in a URL.
    name = encode_name(host.strip("[]"))
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)


def _by_turns(infos: list[Any]) -> list[Any]:
    """Alternate the families, first family first (RFC 8305, 4)."""
    families: dict[int, list[Any]] = {}
    for info in infos:
        families.setdefault(info[0], []).append(info)
    turns: list[Any] = []
    while any(families.values()):
        turns += [group.pop(0) for group in families.values() if group]
    return turns


def parse_address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def encode_name(name: str) -> bytes:
    """As Python's sockets do; to import the IDNA codec for every name takes a start 1 ms.

    Raises UnicodeError for what is no name.
    """
    labels = name.removesuffix(".").split(".")
    is_plain = name.isascii() and all(0 < len(label) < 64 for label in labels)
    return name.encode("ascii" if is_plain else "idna")
