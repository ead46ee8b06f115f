"""An SAE of the atlas opened for questions about new text: its weights, its subject model and its labels.

What belongs here: getting those three from a store. What does not: any question (the modules beside this one).
"""

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from scopeatlas.activations.probe import Probe
from scopeatlas.atlas.search import AtlasReader
from scopeatlas.atlas.stage import live_generation, publication_facts
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import NotReadyError
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel


@dataclass(frozen=True)
class OpenSae:
    """One SAE, ready for new text. key: its sae key. corpus: what its published rows are of. rows: its features as the
    atlas publishes them (FEATURE_ROW), in order of `feature`, one for every feature."""

    store: Store
    key: str
    corpus: str
    entry: SaeEntry
    subject: SubjectModel
    rows: pl.DataFrame

    @cached_property
    def dictionary(self) -> SparseDictionary:
        """The weights, checked against the hashes that gave the SAE its key."""
        return open_dictionary(self.entry)

    @cached_property
    def probe(self) -> Probe:
        """Texts through the subject model and this SAE."""
        return Probe(self.dictionary, self.subject)

    def with_rows(self, rows: pl.DataFrame) -> "OpenSae":
        """The same with other rows; weights and model that are loaded stay loaded."""
        other = copy(self)
        for name, value in (("rows", rows), ("corpus", rows["corpus"][0])):
            object.__setattr__(other, name, value)  # a frozen copy that keeps what its properties have cached
        return other


def open_sae(atlas: AtlasReader, sae: str, *, subject: SubjectModel | None = None, device: str = "auto") -> OpenSae:
    """Open the SAE that `sae` (a key, or enough of one) names in an atlas. Weights and model are loaded when first needed.

    subject: the model under study; by default the one that its published features were mined with.
    Raises UnknownSaeError or AtlasError if `sae` names none or several, NotReadyError if its publication does not say
    which subject model it is of, and SubjectModelError if `subject` is another model than the SAE was trained on.
    """
    key, rows = atlas.rows(sae)
    store, corpus = Store(atlas.root), rows["corpus"][0]
    entry = SaeEntry.from_json(store.entry(key))
    return OpenSae(store, key, corpus, entry, subject or _recorded_subject(store, key, corpus, device), rows)


def _recorded_subject(store: Store, sae: str, corpus: str, device: str) -> SubjectModel:
    recipe = publication_facts(store, sae, corpus, live_generation(store, sae)).get("subject")
    if recipe is None:
        raise NotReadyError(
            f"the publication of {sae} does not say which subject model it is of; publish it again, or open the atlas with subject=SubjectModel(...)"
        )
    return SubjectModel.from_recipe(recipe, device=device)
