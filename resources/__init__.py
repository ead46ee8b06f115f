"""What is configured: one resource per thing a run needs, read from a scenario's YAML. Thin: no domain logic."""
