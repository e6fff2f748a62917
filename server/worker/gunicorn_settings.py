"""gunicorn's settings for a relay, and the checks before its start. Runs in the master.

`gunicorn.conf.py` in the project's root takes all names from here; the command line
and GUNICORN_CMD_ARGS still win, which is why on_starting() checks.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from http_network_relay.wire.errors import ConfigError as _ConfigError
from server.access.file import load_credentials as _load_credentials
from server.config import Config as _Config

_EXIT_CONFIG = 2
# One slot for a client and one for a proxy user.
_FEWEST_THREADS = 2

wsgi_app = "wsgi:app"
bind = "127.0.0.1:8000"
worker_class = "server.worker.relay_worker.RelayWorker"
# A client and its users meet in one process.
workers = 1
threads = 64
# Legs, answers that are being sent, and request heads. The worker raises the number if --threads
# needs more.
worker_connections = 2048
# Seconds between heartbeats of the accept thread, which never waits for long. Legs have own limits.
timeout = 30
# The drain takes 1.3 s at most, and its backstop 1.4 s. Then the master kills the worker.
graceful_timeout = 2
# One request per connection: no thread ever waits for the next one.
keepalive = 0
# A restart after so many requests would end all tunnels.
max_requests = 0
# gunicorn would open the control socket in the home folder.
control_socket_disable = True


def _check(cfg: Any) -> None:
    if cfg.workers != 1:
        raise _ConfigError(
            f"--workers is {cfg.workers}: the relay needs exactly one worker, since a client and "
            "its proxy users meet in one process; use --threads for more legs"
        )
    if not issubclass(cfg.worker_class, ThreadWorker):
        raise _ConfigError(
            f"--worker-class {cfg.worker_class_str} has no threads: leave -k out, then the "
            "relay's own worker is used"
        )
    if cfg.threads < _FEWEST_THREADS:
        raise _ConfigError(
            f"--threads is {cfg.threads}: each leg takes a thread; use at least {_FEWEST_THREADS}"
        )
    if cfg.max_requests:
        raise _ConfigError("--max-requests would cut all tunnels: leave it out")
    config = _Config.from_env()
    config.validate()
    # The worker reads the file again, and logs the warnings.
    _load_credentials(config.credentials_file, warn=False)


def on_starting(server: Any) -> None:
    """Check everything before the first worker: one line, exit 2, and no respawn loop."""
    try:
        _check(server.cfg)
    except _ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        if server.pidfile is not None:
            server.pidfile.unlink()
        raise SystemExit(_EXIT_CONFIG) from None
    _check_before_reload(server)


def _check_before_reload(server: Any) -> None:
    """Let SIGHUP do nothing while a setting is wrong: gunicorn would end the whole relay.

    The new worker could not start, and the master would end the relay for that.
    """
    reload = server.handle_hup

    def handle_hup() -> None:
        try:
            _check(server.cfg)
        except _ConfigError as exc:
            server.log.error("not reloaded, the old worker goes on: %s", exc)
        else:
            reload()

    server.handle_hup = handle_hup


def on_exit(server: Any) -> None:
    """Leave nothing for the collector, which looks through all modules at the end.

    That takes 50 ms, and half a second on a busy machine, of the 2 s that a stop may take.
    """
    gc.freeze()


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """Undo SIGTTIN: a second worker would not know the first one's clients."""
    if old_value is not None and new_value > 1:
        server.log.warning("the relay runs with exactly one worker; SIGTTIN is ignored")
        server._num_workers = 1
