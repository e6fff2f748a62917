"""The harness: means to run the relay, to break its connections and to measure it.

One file per concern. The harness runs the programs and imports none of their code, so the harness
can also test a broken program. The exceptions are the fakes in `client/` and `server/`, the
helpers that compare code with pages, and `fleet.py`, which runs many ends in one process.
"""
