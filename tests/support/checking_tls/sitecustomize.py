"""Ends a process in which two threads are inside one TLS object at the same time.

Python imports this file by itself in every process that has this folder on PYTHONPATH. OpenSSL's
objects are "not safe to share between threads". A data race in them shows once in many runs on a
slow line, and never on loopback. This check therefore finds the cause, not the damage: each entry
into OpenSSL is marked before and unmarked after. A second thread's entry in between writes one
line to the file named by RELAY_TLS_CHECK_FILE and ends the process with code 99.

The mark is a lock-guarded owner and depth, so it holds for any switch interval, and a method
that calls another (`sendall`, `send`) is one owner two deep.
"""

from __future__ import annotations

import functools
import os
import ssl
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

EXIT_CODE = 99

# Every method that enters OpenSSL, and those that take the object away (`shutdown`,
# `_real_close`): doing so under another thread is the same fault.
_METHODS = (
    "_real_close",
    "cipher",
    "compression",
    "do_handshake",
    "get_channel_binding",
    "getpeercert",
    "pending",
    "read",
    "recv",
    "recv_into",
    "recvfrom",
    "recvfrom_into",
    "selected_alpn_protocol",
    "send",
    "sendall",
    "sendfile",
    "shared_ciphers",
    "shutdown",
    "unwrap",
    "verify_client_post_handshake",
    "version",
    "write",
)


class _Inside:
    """The thread that is inside one TLS object."""

    def __init__(self) -> None:
        # Guards the rest. Reentrant, because a signal handler may interrupt the owner.
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.depth = 0
        self.method = ""

    def enter(self, method: str) -> None:
        me = threading.get_ident()
        with self.lock:
            if self.owner not in (None, me):
                _report(self, method)
            if self.depth == 0:
                self.owner = me
                self.method = method
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.owner = None


def _name(ident: int) -> str:
    for thread in threading.enumerate():
        if thread.ident == ident:
            return thread.name
    return str(ident)


def _report(inside: _Inside, method: str) -> None:
    owner = inside.owner or 0
    lines = [
        f"TLS OBJECT SHARED by threads {_name(owner)} (in {inside.method}) and"
        f" {threading.current_thread().name} (in {method}), process {os.getpid()}\n"
    ]
    frames = sys._current_frames()
    for ident in (owner, threading.get_ident()):
        lines.append(f"  stack of {_name(ident)}:\n")
        lines += traceback.format_stack(frames.get(ident))
    text = "".join(lines).encode()
    path = os.environ.get("RELAY_TLS_CHECK_FILE")
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, text)
        os.close(fd)
    os.write(2, text)
    os._exit(EXIT_CODE)


def _checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # setdefault on an object's own dict is atomic: both threads get the same mark.
        inside: _Inside = self.__dict__.setdefault("_checking_tls_inside", _Inside())
        inside.enter(name)
        try:
            return original(self, *args, **kwargs)
        finally:
            inside.leave()

    return method


def install() -> None:
    """Wrap the methods of both TLS classes, once."""
    if getattr(ssl, "_checking_tls_installed", False):
        return
    for owner in (ssl.SSLSocket, ssl.SSLObject):
        for name in _METHODS:
            if name in vars(owner):
                setattr(owner, name, _checked(name, vars(owner)[name]))
    ssl._checking_tls_installed = True  # type: ignore[attr-defined]  # the mark that it is done


if "RELAY_TLS_CHECK_FILE" in os.environ:
    install()
