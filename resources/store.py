"""The store: where everything is kept. What does not belong here: what a stage writes into it."""

import dagster as dg
from pydantic import Field

from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import location


class StoreResource(dg.ConfigurableResource):
    """One root for corpora, activations, labels, scores and the atlas."""

    root: str = Field(
        default="store",
        description="Folder that holds everything, made if it is not there, or a URI such as s3://bucket/prefix; its "
        "credentials and endpoint come from the environment alone.",
    )

    def open(self) -> Store:
        return Store(location(self.root))
