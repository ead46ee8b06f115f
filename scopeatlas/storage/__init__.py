"""How things are kept on disk: atomic files, content hashes, commit records, the layout of a store."""
