"""Import and export: what other tools write, as ours, and ours as theirs."""
