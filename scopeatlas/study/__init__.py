"""Questions on top of a published atlas: trace, contrast, intervene, attribute, compare."""
