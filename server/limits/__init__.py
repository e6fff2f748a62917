"""Limits of users, clients and source addresses, and the policy that asks them."""
