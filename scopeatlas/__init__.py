"""Scope Atlas: from published sparse autoencoders to a searchable, scored atlas of their features.

Everything here works from a notebook; nothing here knows Dagster. The public door is `open_atlas`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scopeatlas.atlas.search import Atlas

__version__ = "0.1.0"
__all__ = ["open_atlas"]


def open_atlas(path: str) -> "Atlas":
    """Open the atlas under a store for reading. See `scopeatlas.atlas.search.open_atlas`."""
    from scopeatlas.atlas.search import open_atlas as _open

    return _open(path)
