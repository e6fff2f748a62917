"""The command `client`: settings, log, signals; the agent does the work."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import time
from collections.abc import Sequence

from client.agent import Agent
from client.config import read_config
from http_network_relay.dial.connection import websocket_client
from http_network_relay.wire.errors import RelayError

# All threads are joined within this after a signal.
_STOP_S = 1.9
# The interpreter lets another thread run after 5 ms by default: too late for a keystroke.
_SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    try:
        config = read_config(sys.argv[1:] if argv is None else argv, os.environ)
        websocket_client()
    except RelayError as exc:
        print(f"client: {exc}", file=sys.stderr)
        return exc.exit_code
    logging.basicConfig(
        level=logging.DEBUG if config.is_verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    log = logging.getLogger("http_network_relay.client")
    if not config.endpoint.is_tls and not config.endpoint.is_loopback:
        log.warning("%s is not encrypted: use https", config.endpoint.url)
    if config.allow:
        log.info("dials allow=%s", ",".join(rule.text for rule in config.allow))
    else:
        log.warning("dials whatever the server asks for: --allow limits it")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # The objects that exist now stay. A collection, which stops all threads, skips them.
    gc.freeze()
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    agent = Agent(config, on_signal=signals.put)
    agent.start((signal.SIGTERM, signal.SIGINT))
    signals.get()
    begun = time.monotonic()
    agent.stop()
    if not agent.join(begun + _STOP_S):
        logging.shutdown()
        os._exit(0)  # A thread is stuck; the process ends all the same.
    return 0


if __name__ == "__main__":
    sys.exit(main())
