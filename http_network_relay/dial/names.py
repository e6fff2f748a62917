"""Name lookups within a deadline, in a bounded number of daemon threads."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any

from http_network_relay.dial.deadline import Deadline
from http_network_relay.wire.errors import DialError

# The most lookups at a time. A lookup that hangs keeps its thread and its slot.
_lookup_slots = threading.BoundedSemaphore(32)


def resolve(host: str, port: int, deadline: Deadline) -> list[Any]:
    """Return getaddrinfo's answers, the address families in turns. Raises DialError."""
    if parse_address(host.strip("[]")) is not None:
        # No lookup: an address must not wait for a slot behind names that hang.
        return _by_turns(_look_up(host, port))
    failure = f"the name {host} could not be looked up"
    while not _lookup_slots.acquire(timeout=deadline.slice_s()):
        deadline.check(failure)
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

    # A daemon: getaddrinfo has no timeout, and nothing can wake the thread.
    thread = threading.Thread(target=look_up, name=f"lookup:{host}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _lookup_slots.release()
        raise
    while not is_done.wait(deadline.slice_s()):
        deadline.check(failure)
    (answer,) = answers
    if isinstance(answer, Exception):
        reason = getattr(answer, "strerror", None) or answer
        raise DialError("unknown", f"the name {host} is not known ({reason})") from answer
    return _by_turns(answer)


def _look_up(host: str, port: int) -> list[Any]:
    # The brackets of an IPv6 literal are the URL's.
    name = encode_name(host.strip("[]"))
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)


def _by_turns(infos: list[Any]) -> list[Any]:
    """Alternate the families, beginning with the first answer's (RFC 8305, 4)."""
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
    """Encode as Python's sockets do. Raises UnicodeError for a text that is no name.

    The IDNA codec is for other names than plain ones: its import costs a start 1 ms.
    """
    labels = name.removesuffix(".").split(".")
    is_plain = name.isascii() and all(0 < len(label) < 64 for label in labels)
    return name.encode("ascii" if is_plain else "idna")
