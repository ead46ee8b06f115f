"""What exists: one file per stage, with bodies of a few lines that call scopeatlas. Not here: when things run."""
