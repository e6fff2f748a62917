"""The tests of the relay, in three tiers and a soak."""
