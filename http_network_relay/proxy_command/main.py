#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["websocket-client>=1.2.3"]
# ///
"""The proxy command: carries stdin and stdout to a TCP port behind a relay's client.

    ssh -o ProxyCommand='ssh_proxy_command.py device 127.0.0.1 22 tcp \
        --server-url https://relay.example --secret-key-file ~/.relay-token' device

One file: copy it anywhere; it needs Python >= 3.9 and websocket-client. Threads: main
reads the leg and never touches stdin or stdout; pump-up carries stdin to the leg and
watches for signals and a closed stdout; pump-down writes stdout and acknowledges; the
leg's writer; the timer.
"""

from __future__ import annotations

import gc
import signal

if __name__ == "__main__":
    # A Ctrl-C during the other imports ends it without a traceback; run() takes over later.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Imports make no garbage; to look for it among them costs a start 5 ms.
    gc.disable()

import os
import sys
from collections.abc import Sequence

from http_network_relay.dial.connection import websocket_client
from http_network_relay.proxy_command.messages import complain, warn
from http_network_relay.proxy_command.session import Session
from http_network_relay.proxy_command.settings import read_settings
from http_network_relay.proxy_command.stdio import fill_standard_files
from http_network_relay.wire.errors import RelayError

# The interpreter hands the GIL on after 5 ms by default, which a keystroke would feel.
SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tunnel over stdin and stdout; returns the exit code."""
    fill_standard_files()
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
        websocket_client()
    except RelayError as exc:
        return complain(exc)
    if not settings.endpoint.is_tls and not settings.endpoint.is_loopback:
        warn(f"{settings.endpoint.url} is not encrypted: use https")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()
    gc.enable()
    session = Session(settings)
    try:
        return session.run()
    except RelayError as exc:
        return complain(exc)


if __name__ == "__main__":
    sys.exit(main())
