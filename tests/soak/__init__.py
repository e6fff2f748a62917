"""The full figures; run by `make soak`, never by `make test`."""
