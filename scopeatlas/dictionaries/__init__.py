"""Sparse dictionaries: one type for every kind, one module per file format, and discovery of releases."""
