"""Cutting the windows of chosen examples out of contexts and activation shards.

What belongs here: windows as a table. What does not: which contexts are chosen (`choosing.py`), or windows as text
(`windows.py`).
"""

from collections.abc import Callable

import numpy as np
import polars as pl
import pyarrow as pa

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS

WINDOW = 32
BEFORE_PEAK = 20


def cut_windows(chosen: pl.DataFrame, corpus: Corpus, read: Callable[[int], ActivationShard]) -> pa.Table:
    """The windows of `chosen` (see `choose_examples`), in its order and as `read_examples` gives them, but for the texts.

    read: the activations of these features in a shard, by its number; called once for each shard that has one of them.
    """
    length = corpus.facts["context_length"]
    position = chosen["position"].to_numpy().astype(np.int64)
    start = np.clip(position - BEFORE_PEAK, 0, max(0, length - WINDOW))
    tokens = np.empty((len(chosen), min(WINDOW, length)), dtype=np.int32)
    activations = np.empty(tokens.shape, dtype=np.float32)
    order, documents = [np.zeros(0, dtype=np.int64)], [pl.Series(dtype=pl.String)]
    shard = chosen["shard"].to_numpy()
    for number in np.unique(shard):
        at = np.flatnonzero(shard == number)
        rows, contexts, acts = chosen[at], corpus.contexts(corpus.shards[number]), read(int(number))
        flat = rows["row"].to_numpy().astype(np.int64) * length + start[at]
        tokens[at] = contexts.tokens.reshape(-1)[flat[:, None] + np.arange(tokens.shape[1])]
        activations[at] = windows_of(acts, rows["feature"].to_numpy(), flat, tokens.shape[1])
        order.append(at)
        documents.append(pl.Series(contexts.document_ids, dtype=pl.String).gather(rows["row"]))
    columns = chosen.select("feature", "kind", "stratum", "rank", "context_id", "peak").with_columns(
        split=pl.Series(SPLITS, dtype=pl.String).gather(chosen["split"]),
        document_id=pl.concat(documents).gather(np.argsort(np.concatenate(order))),
        peak_at=(position - start).astype(np.int32),
    )
    return (
        columns.to_arrow().append_column("tokens", _fixed_lists(tokens)).append_column("activations", _fixed_lists(activations))
    )


def windows_of(acts: ActivationShard, wanted: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
    """Activations float32 [n, width] of `wanted` features at tokens start..start+width, integers [n] both."""
    key = _places(acts.feature, acts.token)
    low = _places(wanted, start)
    first, last = np.searchsorted(key, low), np.searchsorted(key, low + np.uint64(width))
    counts = last - first
    window = np.repeat(np.arange(len(wanted)), counts)
    source = np.repeat(first - np.r_[0, counts.cumsum()[:-1]], counts) + np.arange(counts.sum())
    out = np.zeros((len(wanted), width), dtype=np.float32)
    out[window, acts.token[source].astype(np.int64) - start[window]] = acts.value[source]
    return out


def _places(feature: np.ndarray, token: np.ndarray) -> np.ndarray:
    return (feature.astype(np.uint64) << np.uint64(32)) | token.astype(np.uint64)


def _fixed_lists(array: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
