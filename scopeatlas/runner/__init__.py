"""Mapping a function over shards, with progress that a person can read."""
