"""Scope Atlas: from published sparse autoencoders to a searchable, scored atlas of their features.

Everything here works from a notebook; nothing here knows Dagster. The public door is `open_atlas`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scopeatlas.api import Atlas
    from scopeatlas.atlas.embedding import Embedder
    from scopeatlas.subject.loading import SubjectModel

__version__ = "0.1.0"
__all__ = ["open_atlas"]


def open_atlas(path: "str | Path", *, embedder: "Embedder | None" = None, subject: "SubjectModel | None" = None) -> "Atlas":
    """Open the atlas under a store, a folder or a URI such as s3://bucket/prefix, for every question there is.

    embedder: only needed if the one that made the vectors is no longer found under its name. subject: the model under
    study, where questions about new text shall not load the one that the features were mined with.
    Raises AtlasError if there is no atlas, or it is of another version.
    """
    from scopeatlas.api import open_atlas as _open

    return _open(path, embedder=embedder, subject=subject)
