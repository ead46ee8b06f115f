"""The embedder: what turns text into vectors for search. What does not belong here: embedding (scopeatlas/atlas)."""

from functools import lru_cache

import dagster as dg
from pydantic import Field

from scopeatlas.atlas.embedding import Embedder


class EmbedderResource(dg.ConfigurableResource):
    """A sentence-transformers model."""

    name: str = Field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        description="A Hub id, a local folder, or package:NAME for a Python package that carries a model.",
    )
    revision: str | None = Field(default=None, description="The Hub revision.")

    def identity(self) -> str:
        """Name and revision: what scores of retrieval depend on."""
        return f"{self.name}@{self.revision or 'main'}"

    def open(self) -> Embedder:
        return _embedder(self.name, self.revision)


@lru_cache(maxsize=1)
def _embedder(name: str, revision: str | None) -> Embedder:
    return Embedder(name, revision)
