"""From activation shards to what is known of each feature: mergeable sketches, examples, promoted tokens."""
