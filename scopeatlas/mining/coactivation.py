"""Co-activation: which features fire on the same tokens, counted over one sample of the whole corpus.

What belongs here: the sample, the counts, and each feature's partners by PMI and by Jaccard index. What does not: what
partners are used for (`hypotheses/neighbours.py`).

The unit is a token of the explain split: two features that share contexts may merely share a topic, and a context has
a hundred times as many pairs as its tokens. Explain alone, because hard negatives are drawn by it and must not be chosen
by what labels are tested on. Counts are exact over the sample: contexts in the order of a hash of their ids, as many as
have PAIRS pairs together and SAMPLE_CONTEXTS at most. So it depends on the corpus alone, not on shards or batches, and
its cost does not grow with the corpus.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.mining.segments import begins, ranks
from scopeatlas.mining.sketches import draws

PARTNERS = 10
PAIRS = 1 << 27
"""Ordered pairs of features, of a token l0²: what counting costs. At an l0 of 50 that is 53,000 tokens."""
SAMPLE_CONTEXTS = 2048
MIN_TOGETHER = 2
"""A pair that fires together once has the highest PMI of all if both are rare; partners by PMI do so on more tokens."""
TILE_PAIRS = 1 << 22
_BLOCK = 32

PARTNER_SCHEMA = pl.Schema(
    {
        "feature": pl.UInt32,
        "partner": pl.UInt32,
        "both": pl.Int32,
        "pmi": pl.Float32,
        "jaccard": pl.Float32,
        "pmi_rank": pl.Int8,
        "jaccard_rank": pl.Int8,
    }
)


@dataclass(frozen=True)
class Sample:
    """The contexts that are counted. table: shard, row, context_id, tokens, pairs, in the order of their hashes."""

    table: pl.DataFrame

    @property
    def tokens(self) -> int:
        """Unmasked tokens in all."""
        return int(self.table["tokens"].sum())


def draw_sample(tables: Iterable[pl.DataFrame]) -> Sample:
    """The sample, from the context tables of each shard (context_id, split, tokens, pairs), whatever their order."""
    sample: pl.DataFrame | None = None
    for number, table in enumerate(tables):
        numbered = table.with_row_index("row").with_columns(shard=pl.lit(number, dtype=pl.UInt32))
        explain = numbered.filter(pl.col("split") == SPLITS.index("explain")).select(
            "shard", "row", "context_id", "tokens", "pairs"
        )
        # Contexts that are beyond the budget now stay so whatever comes.
        sample = _within_budget(explain if sample is None else pl.concat([sample, explain]))
    assert sample is not None, "a corpus has shards"
    return Sample(sample)


def _within_budget(contexts: pl.DataFrame) -> pl.DataFrame:
    """The first by hash that together have PAIRS pairs at most; one at least, so that there is something to count."""
    drawn = contexts.with_columns(draw=draws(contexts.select("context_id", feature=pl.lit(0, dtype=pl.UInt32)))).sort("draw")
    is_first = pl.int_range(pl.len()) == 0
    within = (pl.col("pairs").cum_sum() <= PAIRS) & (pl.int_range(pl.len()) < SAMPLE_CONTEXTS)
    return drawn.filter(is_first | within).drop("draw")


def firing_matrix(
    sample: Sample, read: Callable[[int], Iterator[ActivationShard]], *, length: int, width: int
) -> sparse.csr_matrix:
    """Which features fire on which tokens of the sample: float32 0/1 [features, contexts of the sample * length].

    read: a shard's activations in tiles, by its number; called once for each shard that has a context of the sample.
    """
    features, tokens = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=np.int64)]
    numbered = sample.table.with_row_index("place")
    for (number,), mine in numbered.group_by("shard", maintain_order=True):
        place = np.full(int(mine["row"].max()) + 1, -1, dtype=np.int64)  # type: ignore[arg-type]
        place[mine["row"]] = mine["place"]
        for acts in read(int(number)):  # type: ignore[arg-type]
            row = acts.token // np.uint32(length)
            at = np.flatnonzero(row < len(place))
            at = at[place[row[at]] >= 0]
            features.append(acts.feature[at])
            tokens.append(place[row[at]] * length + acts.token[at] % np.uint32(length))
    feature, token = np.concatenate(features), np.concatenate(tokens)
    shape = (width, len(sample.table) * length)
    return sparse.csr_matrix((np.ones(len(feature), dtype=np.float32), (feature, token)), shape=shape)


def partners(fires: sparse.csr_matrix, tokens: int, *, count: int = PARTNERS) -> Iterator[pl.DataFrame]:
    """The partners of each feature that fires, in tiles of consecutive features: PARTNER_SCHEMA, sorted by feature and partner.

    fires: float32 0/1 [features, places]. tokens: N, how many places count. With n the tokens on which a feature fires and
    both those on which two do: jaccard = both / (n_a + n_b - both); pmi = log2(both * N / (n_a * n_b)), in bits (Church &
    Hanks, 1990), 0 for features that fire independently. A rank, from 0, is None where a partner is not among the `count`
    highest of that measure; ties go to the lower index. PMI ranks only those that fire together MIN_TOGETHER times.
    """
    by_token = fires.T.tocsr()
    fired = np.diff(fires.indptr)
    before = np.r_[0, np.cumsum(np.diff(by_token.indptr)[fires.indices])][fires.indptr]  # pairs of the features before
    edges = np.flatnonzero(np.r_[begins(before[:-1] // TILE_PAIRS), True])
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield _partners_of(fires[start:stop] @ by_token, int(start), fired, tokens, count)


def _partners_of(both: sparse.csr_matrix, first: int, fired: np.ndarray, tokens: int, count: int) -> pl.DataFrame:
    """The partners of the features from `first` on, of which `both` [features, F] has the tokens shared with every other."""
    rows = np.repeat(np.arange(len(both.indptr) - 1, dtype=np.int32), np.diff(both.indptr))
    own, others = fired.astype(np.float32)[first + rows], fired.astype(np.float32)[both.indices]
    # Both scores order as their measures do, but for rounding, which keeps order: it makes ties at most.
    similar, associated = both.data / (own + others), both.data / others
    similar[both.indices == first + rows] = 0
    associated[(both.indices == first + rows) | (both.data < MIN_TOGETHER)] = 0

    def highest(score: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Of the likely ones the `count` highest of each feature, by the exact score; int64 [m], by feature, highest first."""
        likely = _likely(score, both.indptr, count)
        together, partner = both.data[likely].astype(np.float64), both.indices[likely]
        order = np.lexsort((partner, -together / among[likely], rows[likely]))
        return likely[order[ranks(begins(rows[likely][order])) < count]]

    by_jaccard, by_pmi = highest(similar, own + others), highest(associated, others)
    chosen = np.union1d(by_jaccard, by_pmi)
    together, own, others = (column[chosen].astype(np.float64) for column in (both.data, own, others))
    table = pl.DataFrame(
        {
            "feature": first + rows[chosen],
            "partner": both.indices[chosen],
            "both": together,
            "pmi": np.log2(together * tokens / (own * others)),
            "jaccard": together / (own + others - together),
            "pmi_rank": _ranks_of(chosen, by_pmi, rows),
            "jaccard_rank": _ranks_of(chosen, by_jaccard, rows),
        }
    )
    return table.cast(dict(PARTNER_SCHEMA)).sort("feature", "partner")  # type: ignore[arg-type]  # names are selectors too


def _likely(score: np.ndarray, indptr: np.ndarray, count: int) -> np.ndarray:
    """Where scores of a row may be among its `count` highest, and positive: int64 [m]. indptr: where rows begin.

    Of each _BLOCK scores the maximum is taken: the `count`-th highest of those is at most the one sought.
    """
    lengths = np.diff(indptr)
    blocks = -(-lengths // _BLOCK)
    row = np.repeat(np.arange(len(blocks)), blocks)
    if not len(row):
        return np.zeros(0, dtype=np.int64)
    highest = np.maximum.reduceat(score, np.repeat(indptr[:-1], blocks) + _BLOCK * ranks(begins(row)))
    order = np.lexsort((-highest, row))
    at = order[ranks(begins(row)) == count - 1]
    floor = np.zeros(len(blocks), dtype=np.float32)
    floor[row[at]] = highest[at]
    return np.flatnonzero((score >= np.repeat(floor, lengths)) & (score > 0))


def _ranks_of(chosen: np.ndarray, best: np.ndarray, rows: np.ndarray) -> pl.Series:
    """For each of `chosen` its place in `best`, counted within its row, None if it is not there."""
    rank = np.full(len(chosen), -1)
    rank[np.searchsorted(chosen, best)] = ranks(begins(rows[best]))
    return pl.Series(rank).replace(-1, None)
