"""The indexes of the features table: which there are, when they are built again, and how much they find.

What belongs here: scalar, full-text and vector indexes, and the recall of the last. What does not: rows (`publish.py`), or
asking through an index (`asking.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scopeatlas.atlas.tables import FEATURES, KEY, TERMS, VECTORS, has_table, open_table
from scopeatlas.atlas.terms import LONGEST_TERM
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from lancedb.table import Table

EXACT_ROWS = 50_000
"""Up to here a scan is as fast as an index, and exact (reference/lancedb.md, 5)."""
GROWTH = 4
"""A vector index is trained anew once the table has so many times the rows that it was trained on."""
PROBES, REFINE = 60, 3
"""Of an index, how many partitions are looked into, and how many times the hits asked for are compared exactly."""
_PARTITION_ROWS = 4096
"""LanceDB makes partitions of about 8,192 rows; none has fewer than this on average."""
LEAST_RECALL = 0.95
RECALL_AT, RECALL_QUERIES = 10, 100
_ROUNDING = 2e-4
"""LanceDB's cosines of float16 vectors were up to 1.4e-4 off those of float64."""
_TILE_ROWS = 65_536


def build_indexes(features: "Table") -> None:
    """Build what is missing or outgrown; called after rows are in, since full-text search built empty ranks wrongly."""
    from lancedb.index import FTS, Bitmap, BTree

    wanted: dict[str, BTree | Bitmap | FTS] = {
        KEY: BTree(),
        "feature": BTree(),
        "density": BTree(),
        "f1": BTree(),
        "f1_low": BTree(),
        "sae": Bitmap(),
        "release": Bitmap(),
        "layer": Bitmap(),
        "status": Bitmap(),
        "method": Bitmap(),
        TERMS: FTS(
            base_tokenizer="whitespace",  # and nothing else: `terms.py` has done the rest
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
            max_token_length=LONGEST_TERM,
            with_position=False,  # positions made optimize() crash (reference/lancedb.md, 4)
        ),
    }
    indexed = {column for index in features.list_indices() for column in index.columns}  # by column: names are not stable
    for column in wanted.keys() - indexed:
        features.create_index(column, config=wanted[column])
    _build_vector_indexes(features)


def _build_vector_indexes(features: "Table") -> None:
    """The name of a vector index is its column and the rows that it was trained on: LanceDB does not remember them."""
    from lancedb.index import IvfSq

    rows = features.count_rows()
    for column in VECTORS if rows > EXACT_ROWS else ():
        held = [index.name for index in features.list_indices() if column in index.columns]
        if any(rows < GROWTH * int(name.rpartition("_")[2]) for name in held):
            continue
        features.create_index(column, config=IvfSq(distance_type="cosine"), name=f"{column}_{rows}", replace=False)
        for name in held:
            features.drop_index(name)


def probes(rows: int, *, is_filtered: bool) -> int:
    """How many partitions to look into in a table of so many rows. With a filter all of them: what passes may lie in any.

    At a million rows and a filter that 0.5 to 4 % pass, 60 partitions found 0.39 to 0.95 of the nearest ten and all of them
    1.000, in 45 to 120 ms; comparing each that passes took 60 to 1,160 ms (`bench/search.py` has a million rows).
    """
    return max(PROBES, rows // _PARTITION_ROWS) if is_filtered else PROBES


@dataclass(frozen=True)
class IndexRecall:
    """How much the vector indexes find of what there is. rows: of the table. queries: that recall was measured with, none
    where nothing is indexed. recall: the mean share of the RECALL_AT nearest that the index finds, by column that is indexed
    and has vectors."""

    rows: int
    queries: int
    recall: dict[str, float]

    @property
    def is_enough(self) -> bool:
        return all(value >= LEAST_RECALL for value in self.recall.values())


def index_recall(root: Location, *, queries: int = RECALL_QUERIES, seed: int = 0) -> IndexRecall:
    """Recall at 10 of every vector index of the atlas under a store, against exact search, with its own vectors as queries.

    A neighbour as near as the tenth counts, whichever it is: many features have the same text. The query itself does not.
    Cost: the vectors are read once, 0.8 GB for each million rows and column.
    """
    if not has_table(root, FEATURES):
        return IndexRecall(0, 0, {})
    features = open_table(root, FEATURES)
    rows = features.count_rows()
    indexed = {column for index in features.list_indices() for column in index.columns} & VECTORS.keys()
    found: dict[str, float] = {}
    drawn = 0
    for column in sorted(indexed):
        sample = _sample(features, column, queries, np.random.default_rng(seed))
        if not sample.num_rows:  # every row of it is without a text, and so without a vector
            continue
        drawn = max(drawn, sample.num_rows)
        keys, vectors = sample[KEY].to_pylist(), _matrix(sample[column])
        least = _nearest(features, column, vectors)[:, RECALL_AT]  # the query itself is one of eleven
        shares = []
        for key, vector, bound in zip(keys, vectors, least, strict=True):
            asked = features.search(vector, vector_column_name=column).distance_type("cosine")  # type: ignore[attr-defined]
            hits = asked.nprobes(PROBES).refine_factor(REFINE).select([KEY, "_distance"]).limit(RECALL_AT + 1).to_arrow()
            near = [1.0 - hit["_distance"] >= bound - _ROUNDING for hit in hits.to_pylist() if hit[KEY] != key]
            shares.append(min(1.0, sum(near) / RECALL_AT))
        found[column] = float(np.mean(shares))
    return IndexRecall(rows, drawn, found)


def _sample(features: "Table", column: str, count: int, rng: np.random.Generator) -> pa.Table:
    """The keys and vectors of so many rows drawn from those that have a vector; of all where there are no more."""
    valid = features.search().where(f"{column} IS NOT NULL").select([KEY]).with_row_id(True).to_arrow()["_rowid"].to_numpy()
    drawn = np.sort(rng.choice(valid, size=min(len(valid), count), replace=False))
    return features.take_row_ids(drawn.tolist()).select([KEY, column]).to_arrow()


def _nearest(features: "Table", column: str, queries: np.ndarray) -> np.ndarray:
    """The RECALL_AT + 1 highest cosines of each query, exact, highest first: float32 [queries, RECALL_AT + 1]."""
    best = np.full((len(queries), RECALL_AT + 1), -np.inf, dtype=np.float32)
    for batch in features.search().select([column]).to_batches(batch_size=_TILE_ROWS):
        vectors = batch[column].filter(batch[column].is_valid())
        if not len(vectors):
            continue
        both = np.hstack([best, queries @ _matrix(vectors).T])
        best = -np.sort(-np.partition(both, -(RECALL_AT + 1), axis=1)[:, -(RECALL_AT + 1) :], axis=1)
    return best


def _matrix(vectors: Any) -> np.ndarray:
    """A column of vectors as float32 [rows, dim], each of length 1."""
    column = pa.chunked_array([vectors]) if isinstance(vectors, pa.Array) else vectors
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    matrix = flat.reshape(len(column), -1)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
