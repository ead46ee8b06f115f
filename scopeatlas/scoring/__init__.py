"""Testing labels on report documents, with controls and intervals."""
