"""The harness: what the tests run the relay with, cut it with and measure it by.

One file per concern. The harness runs the programs and imports none of their code, so that it
can also test a broken one. Only the fakes in `client/` and `server/` do, and `fleet.py`, which
runs many ends in one process.
"""
