"""Tunnels survive a link that breaks at every byte, and restarts under real ssh."""
