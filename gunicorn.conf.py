"""gunicorn reads this file by itself when it is started in the project's root."""

from server.worker.gunicorn_settings import *  # noqa: F403  # gunicorn wants the names in this file
