"""One thing alone, without a network: under 10 ms each."""
