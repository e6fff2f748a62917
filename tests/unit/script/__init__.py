"""The proxy command's own part without a network."""
