"""The harness: what the tests run the relay with, cut it with and measure it by.

One file per concern; none imports the product, so that it can also test a broken one.
"""
