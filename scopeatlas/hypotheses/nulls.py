"""The firings of null features, as those of an SAE's own features are read.

What belongs here: their activations in `Units`. What does not: how they were drawn (`activations/nulls.py`).
"""

import numpy as np

from scopeatlas.activations.nulls import null_matches, null_shards
from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel


def null_firings(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, units: Units) -> Firings | None:
    """All firings of an SAE's null features, numbered as in `null_matches`; None where it has none (`null_shards`)."""
    shards = null_shards(store, corpus, entry, subject)
    if shards is None:
        return None
    return Firings(
        np.concatenate([acts.feature for acts in shards]),
        np.concatenate([acts.token.astype(np.int64) + offset for acts, offset in zip(shards, units.offsets, strict=True)]),
        len(null_matches(store, corpus, entry, subject)),
        value=np.concatenate([acts.value for acts in shards]),
    )
