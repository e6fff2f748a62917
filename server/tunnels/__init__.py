"""Tunnels: the pairing of a user leg with a channel of a client leg."""
