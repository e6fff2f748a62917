"""`python -m benchmarks`: speed, fairness, CPU and memory of the relay. See README.md here."""
