"""Fuzzing: every decoder, both state machines, and whole legs with their threads.

`make fuzz` runs all of it for long, the suite a little of it under Hypothesis. One input is one
byte string, whoever makes it: atheris, guided by coverage, for all that runs in one thread;
a seeded generator for whole legs, whose threads atheris could neither drive fast nor trace.
"""
