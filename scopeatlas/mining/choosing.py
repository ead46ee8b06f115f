"""Which of the contexts that a sketch remembers become examples.

What belongs here: the strongest ones, and a few of each stratum. What does not: what is remembered (`sketches.py`), or
cutting windows out of contexts (`cutting.py`).
"""

import numpy as np
import polars as pl

from scopeatlas.mining.segments import begins, by_draw, first_of_each, numbers, ranks_among, sizes
from scopeatlas.mining.sketches import Sketch, draws, packed_places

TOP_EXAMPLES = 10
STRATA = 4
PER_STRATUM = 3
MOST_EXAMPLES = TOP_EXAMPLES + STRATA * PER_STRATUM
"""Of one feature and split."""


def choose_examples(sketch: Sketch) -> pl.DataFrame:
    """Which remembered contexts become examples, per feature and split: the TOP_EXAMPLES strongest distinct documents,
    and PER_STRATUM from each quantile stratum of peaks, at most one a document and stratum. A top example is not
    repeated in a stratum.

    Columns: feature, split, kind (top, stratum), stratum, rank, context_id, peak, position, shard, row; sorted by the first
    five, top before stratum.
    """
    entries = sketch.entries.with_columns(stratum=_strata(sketch))
    begin = begins(*_columns(entries, "feature", "split"))
    first = first_of_each(numbers(begin), entries["document"].to_numpy())
    rank = ranks_among(first, begin)
    is_top = first & (rank < TOP_EXAMPLES)
    top = entries.filter(is_top).with_columns(kind=pl.lit("top"), stratum=pl.lit(STRATA - 1), rank=rank[is_top])
    rest = entries.filter(~is_top)
    begin = begins(*_columns(rest, "feature", "split", "stratum"))  # strata follow each other within a cell, as peaks do
    rest = rest[by_draw(numbers(begin), draws(rest))]
    first = first_of_each(numbers(begin), rest["document"].to_numpy())
    rank = ranks_among(first, begin)
    is_drawn = first & (rank < PER_STRATUM)
    drawn = rest.filter(is_drawn).with_columns(kind=pl.lit("stratum"), rank=rank[is_drawn])
    columns = ["feature", "split", "kind", "stratum", "rank", "context_id", "peak", "position", "shard", "row"]
    both = pl.concat([top.select(columns), drawn.select(columns)])
    return both.sort(columns[:5], descending=[False, False, True, False, False])


def _strata(sketch: Sketch) -> np.ndarray:
    """The quantile stratum of each entry's bin among the peaks of its feature and split, 0 the weakest: int32 [entries]."""
    bins = sketch.histogram.filter(pl.col("contexts") > 0)
    begin = begins(*_columns(bins, "feature", "split"))
    contexts = bins["contexts"].to_numpy()
    before = np.cumsum(contexts) - contexts
    before = before - np.repeat(before[begin], sizes(begin))
    total = np.repeat(np.add.reduceat(contexts, np.flatnonzero(begin)), sizes(begin)) if len(bins) else contexts
    stratum = ((before + contexts / 2) / total * STRATA).astype(np.int32).clip(0, STRATA - 1)
    begin = begins(*_columns(sketch.entries, "feature", "split", "bin"))
    at = np.searchsorted(packed_places(bins), packed_places(sketch.entries.filter(begin)))
    return np.repeat(stratum[at], sizes(begin))


def _columns(table: pl.DataFrame, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]
