"""gunicorn: the settings, and the worker class that serves the relay."""
