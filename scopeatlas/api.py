"""`Atlas`: the one object that people hold; each question about features is one call of it.

What belongs here: the calls, their arguments and where each is answered. What does not: an answer (`atlas/`, `study/`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.search import AtlasReader
from scopeatlas.storage.uris import Location
from scopeatlas.study.opening import OpenSae, open_sae
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    from lancedb.table import Table


class Atlas(AtlasReader):
    """A published atlas. Search it, look features up, and ask about text of your own. Made by `open_atlas`.

    Questions about text load an SAE's weights and its subject model once and keep them.
    """

    def __init__(self, root: Location, features: "Table", embedder: Embedder | None):
        super().__init__(root, features, embedder)
        self.subject: SubjectModel | None = None
        self._opened: dict[str, OpenSae] = {}

    def open(self, sae: str) -> OpenSae:
        """An SAE with its weights, its subject model and its rows, by its key or enough of one.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do, NotReadyError if its publication does not say
        which subject model it is of.
        """
        key = self._one(sae)
        if key not in self._opened:
            opened = open_sae(self, key, subject=self.subject)
            loaded = [other.subject for other in self._opened.values() if other.subject == opened.subject]
            self._opened[key] = replace(opened, subject=loaded[0]) if loaded else opened
        return self._opened[key]


def open_atlas(path: str | Location, *, embedder: Embedder | None = None, subject: SubjectModel | None = None) -> Atlas:
    """Open the atlas under the store root `path`. See `scopeatlas.open_atlas`."""
    atlas = Atlas.at(path, embedder=embedder)
    atlas.subject = subject
    return atlas
