"""Targets, the rules that allow targets, and rules without effect. No I/O."""
