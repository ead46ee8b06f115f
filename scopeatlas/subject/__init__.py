"""The subject model: loading it, finding its sites, capturing and editing activations there."""
