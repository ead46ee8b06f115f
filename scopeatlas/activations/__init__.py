"""From contexts to sparse activation shards, reading them back, and how faithful the dictionary is."""
