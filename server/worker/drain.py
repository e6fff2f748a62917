"""The end of a worker: the relay's legs leave, and a backstop ends a process that is stuck.

All is gone within 2 s of the signal, whatever is stuck. The wire allows a whole second for the
flush. The drain takes less: the master needs 0.2 s to notice and to end itself, and 0.4 s on a
busy machine.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from server.logs import ROOT_NAME
from server.relay import Relay

_log = logging.getLogger(f"{ROOT_NAME}.worker")

# To leave is to have the next leg up first: one TLS handshake, and the tries before it.
LEAVE_S = 0.5
_FLUSH_S = 0.5
_JOIN_S = 0.3
_GONE_S = 1.4


def drain_relay(relay: Relay) -> None:
    """Let the legs leave, flush the legs that stay, then end all threads."""
    relay.drain()
    if not relay.join(LEAVE_S):
        relay.end()
        if not relay.join(_FLUSH_S):
            relay.stop()
            relay.join(_JOIN_S)
    relay.stop_threads(_JOIN_S)


def start_backstop() -> None:
    """Start the thread that ends the process if another thread does not end."""
    due_at = time.monotonic() + _GONE_S

    def end() -> None:
        while (left_s := due_at - time.monotonic()) > 0:
            threading.Event().wait(left_s)
        names = [thread.name for thread in threading.enumerate()]
        _log.error("process ended hard threads=%s", ",".join(names))
        for handler in logging.getLogger(ROOT_NAME).handlers:
            handler.flush()
        os._exit(0)

    # A daemon: it must not keep alive the process that it ends.
    threading.Thread(target=end, name="backstop:drain", daemon=True).start()
