"""The store: where everything is kept. What does not belong here: what a stage writes into it."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from scopeatlas.storage.store import Store


class StoreResource(dg.ConfigurableResource):
    """One root folder for corpora, activations, labels, scores and the atlas."""

    root: str = Field(default="store", description="Folder that holds everything; made if it is not there.")

    def open(self) -> Store:
        return Store(Path(self.root))
