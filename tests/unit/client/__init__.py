"""The client's code without a network."""
