"""What is known of each feature from its SAE and the subject model alone: kept once for each SAE, whatever the corpus.

What belongs here: the `outputs` stage of an SAE on disk. What does not: what features promote (`promoted.py`), or what is
counted over a corpus (`examples.py`).
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.promoted import PromotedTokens, promotion
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.subject.loading import SubjectModel

OUTPUTS_VERSION = 1
PART_FEATURES = 4096
"""Features of which the results are kept together while the rest is under way."""


def feature_outputs(store: Store, entry: SaeEntry, subject: SubjectModel, *, log: Log = silent) -> pl.DataFrame:
    """One row per feature: its flat id, the model layer that it reads and its index there, the norms of its decoder row at
    each output site, the tokens that it promotes and suppresses and how strongly (see `PromotedTokens`; empty where that
    cannot be said).

    Read back if it was made before, for whatever corpus; continued where an earlier run ended.
    """
    stage = store.outputs(entry.key)
    key = _key("features", entry, subject)
    path = stage.data_path(key, ".parquet")
    if not stage.is_done(key):
        store.require_writable()
        parts = list(_parts(stage, entry, subject, log))
        with atomic_path(path) as temporary:
            pl.concat([pl.read_parquet(readable(stage.data_path(part, ".parquet"))) for part in parts]).write_parquet(temporary)
        stage.commit(key, [path], {})
        for part in parts:
            stage.discard(stage.record(part))
    return pl.read_parquet(readable(path))


def outputs_identity(entry: SaeEntry, subject: SubjectModel) -> str:
    """What determines the table of an SAE."""
    return _key("features", entry, subject).identity


def _key(name: str, entry: SaeEntry, subject: SubjectModel) -> ShardKey:
    determined = (OUTPUTS_VERSION, entry.hashes, subject.identity, str(subject.resolved_dtype))
    return ShardKey(name, content_hash(name, *determined))


def _parts(stage: StageFolder, entry: SaeEntry, subject: SubjectModel, log: Log) -> Iterator[ShardKey]:
    """Make every part of the table that is not there yet."""
    dictionary = open_dictionary(entry)
    promoted = promotion(dictionary, subject)
    if promoted is not None:
        log(f"feature examples: promoted and suppressed tokens of {dictionary.width:,} features through the unembedding, once")
    for position, layer in enumerate(dictionary.layers):
        for number, rows_nod in enumerate(layer.row_tiles(PART_FEATURES)):
            first = position * dictionary.features_per_layer + number * PART_FEATURES
            key = _key(f"part-{first}", entry, subject)
            if not stage.is_done(key):
                table = _table(dictionary, first, rows_nod.float().norm(dim=-1).cpu().numpy(), promoted and promoted(rows_nod))
                with atomic_path(stage.data_path(key, ".parquet")) as temporary:
                    table.write_parquet(temporary)
                stage.commit(key, [stage.data_path(key, ".parquet")], {})
            yield key


def _table(dictionary: SparseDictionary, first: int, norms: np.ndarray, promoted: PromotedTokens | None) -> pl.DataFrame:
    feature = np.arange(first, first + len(norms))
    position, index = np.divmod(feature, dictionary.features_per_layer)
    nothing = np.zeros((len(norms), 0))
    found = promoted or PromotedTokens(nothing.astype(np.int32), nothing.astype(np.int32), nothing.astype(np.float32))
    return pl.DataFrame(
        {
            "feature": feature.astype(np.uint32),
            "layer": np.array([site.layer for site in dictionary.sites_in], dtype=np.int16)[position],
            "index": index.astype(np.int32),
            "decoder_norms": _lists(norms),
            "promoted": _lists(found.promoted),
            "suppressed": _lists(found.suppressed),
            "promoted_strength": _lists(found.strength),
        }
    )


def _lists(array: np.ndarray) -> pl.Series:
    """A row of [n, m] as a list."""
    ends = pa.array(np.arange(len(array) + 1) * array.shape[1])
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(ends, pa.array(array.ravel()))))
