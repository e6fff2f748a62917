"""The proxy command's own part, as the package has it."""
