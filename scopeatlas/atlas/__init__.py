"""The atlas: one searchable row per feature, the embeddings behind the search, and how an SAE's rows get there."""
