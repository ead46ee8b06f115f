"""The nearest other features of a feature: by decoder direction, and by the contexts in which both fire.

What belongs here: finding them, in tiles. What does not: the windows in which they fire alone (`samples.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.hypotheses.units import Firings, Units

if TYPE_CHECKING:
    import torch

NEAREST = 3
TILE_ROWS = 2048
TILE_BYTES = 64 << 20
COACTIVATION_CONTEXTS = 2048
"""Jaccard is taken over at most so many explain contexts, evenly spread: its cost grows with each, its use does not."""


@dataclass(frozen=True)
class Neighbours:
    """Per feature the nearest others, nearest first, -1 where there is none: int32 [F, k].

    cosine: by the cosine of their decoder rows, only positive ones. coactive: by the Jaccard index of the explain contexts
    in which they fire. A feature that never fires in an explain context has no neighbours and is none.
    """

    cosine: np.ndarray
    coactive: np.ndarray


def nearest_features(dictionary: SparseDictionary, firings: Firings, units: Units, *, k: int = NEAREST) -> Neighbours:
    """The `k` nearest of each feature among those that fire in explain contexts. Ties go to the lower index.

    Never dense F x F: decoder rows, flattened over the outputs, meet in tiles of TILE_ROWS, contexts in tiles of TILE_BYTES.
    """
    held = firings.within(units, "explain").in_contexts(units)  # [F, contexts]
    alive = np.asarray(held.sum(axis=1)).ravel() > 0
    return Neighbours(_by_cosine(dictionary, alive, k), _by_contexts(held, units, alive, k))


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


def _by_contexts(held: sparse.csr_matrix, units: Units, alive: np.ndarray, k: int) -> np.ndarray:
    out = np.full((len(alive), k), -1, dtype=np.int32)
    contexts = np.flatnonzero(units.context_split == SPLITS.index("explain"))
    if len(contexts) > COACTIVATION_CONTEXTS:
        contexts = contexts[np.linspace(0, len(contexts) - 1, COACTIVATION_CONTEXTS).astype(np.int64)]
    ids = np.flatnonzero(alive)
    fires = held[ids][:, contexts].tocsr()
    counts = np.asarray(fires.sum(axis=1)).ravel()
    size = max(1, TILE_BYTES // (4 * max(len(ids), 1)))
    for start in range(0, len(ids), size):
        both = (fires[start : start + size] @ fires.T).toarray()
        either = counts[start : start + size, None] + counts[None] - both
        best = _Best(len(both), k)
        best.add(np.divide(both, either, out=np.zeros_like(both), where=either > 0), ids[start : start + size], ids)
        out[ids[start : start + size]] = best.ids()
    return out


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
