"""The server's code without a network or a process."""
