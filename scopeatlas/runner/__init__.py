"""Mapping work over shards: in this process, on a pool of processes, on a Ray cluster; with progress that a person can read."""
