"""The installed command `ssh-proxy-command`; also `python -m http_network_relay.proxy_command`.

Not a part of the script, whose head does the same.
"""

from __future__ import annotations

import gc
import signal
import sys


def start() -> int:
    """Run the proxy command; return the exit code."""
    # As in main.py. The other imports are most of a start, so they come afterwards.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    from http_network_relay.proxy_command.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
