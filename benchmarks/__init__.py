"""`python -m benchmarks`: how fast, fair and light the relay is. See README.md here."""
