"""The relay: the public process that pairs proxy users with clients."""
