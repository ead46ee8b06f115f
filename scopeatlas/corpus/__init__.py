"""From sources of text to the contexts a subject model reads: sources, sampling, splits, contexts."""
