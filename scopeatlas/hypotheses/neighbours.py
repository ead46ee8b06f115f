"""The nearest other features of a feature: by decoder direction, and by the tokens on which both fire.

What belongs here: finding them. What does not: counting what fires together (`mining/coactivation.py`), or the windows in
which they fire alone (`samples.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.mining.examples import FeatureExamples
from scopeatlas.storage.uris import readable

if TYPE_CHECKING:
    import torch

NEAREST = 3
TILE_ROWS = 2048


@dataclass(frozen=True)
class Neighbours:
    """Per feature the nearest others, nearest first, -1 where there is none: int32 [F, k].

    cosine: by the cosine of their decoder rows, only positive ones. coactive: by the Jaccard index of the explain tokens on
    which they fire (`mining/coactivation.py`). A feature that never fires on an explain token has no neighbours and is none.
    """

    cosine: np.ndarray
    coactive: np.ndarray


def nearest_features(dictionary: SparseDictionary, examples: FeatureExamples, *, k: int = NEAREST) -> Neighbours:
    """The `k` nearest of each feature among those that fire on explain tokens; at most `coactivation.PARTNERS` by
    co-activation. Ties go to the lower index.

    Never dense F x F: decoder rows, flattened over the outputs, meet in tiles of TILE_ROWS; co-activation was counted before.
    """
    alive = examples.features["explain_tokens"].to_numpy() > 0
    return Neighbours(_by_cosine(dictionary, alive, k), _by_coactivation(examples, len(alive), k))


def _by_coactivation(examples: FeatureExamples, width: int, k: int) -> np.ndarray:
    out = np.full((width, k), -1, dtype=np.int32)
    near = pl.read_parquet(readable(examples.partners), columns=["feature", "partner", "jaccard_rank"])
    near = near.filter(pl.col("jaccard_rank") < k)
    out[near["feature"], near["jaccard_rank"]] = near["partner"]
    return out


def _by_cosine(dictionary: SparseDictionary, alive: np.ndarray, k: int) -> np.ndarray:
    import torch

    out = np.full((len(alive), k), -1, dtype=np.int32)
    with torch.no_grad():
        for ids, rows in _directions(dictionary, alive):
            best = _Best(len(ids), k)
            for others, columns in _directions(dictionary, alive):
                best.add((rows @ columns.T).cpu().numpy(), ids, others)
            out[ids] = best.ids()
    return out


def _directions(dictionary: SparseDictionary, alive: np.ndarray) -> "Iterator[tuple[np.ndarray, torch.Tensor]]":
    """The features that are alive and their unit decoder rows, float32 [n, outputs * d], a tile at a time."""
    import torch

    start = 0
    for layer in dictionary.layers:
        for rows in layer.row_tiles(TILE_ROWS):
            ids = np.flatnonzero(alive[start : start + len(rows)])
            start += len(rows)
            if len(ids):
                kept = rows[torch.from_numpy(ids)].float().flatten(1)
                yield ids + start - len(rows), torch.nn.functional.normalize(kept, dim=1)


class _Best:
    """The k largest positive similarities of each row, from tiles of columns that come in ascending order of ids."""

    def __init__(self, rows: int, k: int):
        self._value = np.zeros((rows, k), dtype=np.float32)
        self._id = np.full((rows, k), -1, dtype=np.int32)

    def add(self, similarity: np.ndarray, ids: np.ndarray, others: np.ndarray) -> None:
        """similarity: float32 [rows, columns], overwritten; ids [rows], others [columns]: the features they are of."""
        similarity[ids[:, None] == others[None]] = 0
        rows = np.arange(len(ids))
        for _ in range(self._id.shape[1]):
            at = similarity.argmax(axis=1)
            value = similarity[rows, at]
            similarity[rows, at] = 0
            self._id = np.c_[self._id, np.where(value > 0, others[at], -1)]
            self._value = np.c_[self._value, np.maximum(value, 0)]
        k = self._id.shape[1] // 2
        order = np.argsort(-self._value, axis=1, kind="stable")[:, :k]
        self._id = np.take_along_axis(self._id, order, axis=1)
        self._value = np.take_along_axis(self._value, order, axis=1)

    def ids(self) -> np.ndarray:
        return self._id
