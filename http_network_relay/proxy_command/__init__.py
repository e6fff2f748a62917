"""The proxy command's own part; main.py is the entry of the generated script."""
