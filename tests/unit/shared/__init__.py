"""The shared package without a network."""
