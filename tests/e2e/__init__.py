"""Real processes, real ssh, real nginx."""
