"""Sketches: per-feature statistics of one SAE that merge, whatever the sharding and order.

What belongs here: updating from a shard, merging, and which contexts a sketch remembers. What does not: which of those
become examples (`choosing.py`), or sketches on disk (`sketch_files.py`).

Everything is segment arithmetic over non-zeros sorted by (feature, token); nothing loops over features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.mining.segments import begins, first_of_each, lowest_draws, numbers, ranks_among, sizes
from scopeatlas.storage.files import stable_id

TOP_DOCUMENTS = 16
SAMPLE_CONTEXTS = 16
PER_BIN_CONTEXTS = 4
BINS_PER_OCTAVE = 2
EARLY_POSITIONS = 3
"""Positions 1 to 3 after BOS; a feature that fires mostly there is positional."""
MERGE_SKETCHES = 8
MERGE_ENTRIES = 1 << 18
"""So many entries at least wait to be merged at once."""

COUNTS = {"tokens": np.int64, "contexts": np.int64, "early": np.int64, "sum": np.float64, "sum2": np.float64, "max": np.float32}
_POSITION_BITS, _POSITIONS = np.uint64(16), np.uint64(0xFFFF)
_BIN_BITS, _LOWEST_BIN = 16, -(1 << 15)


@dataclass(frozen=True)
class Sketch:
    """What is remembered of some features over some contexts, per split.

    features: consecutive ones, F of them. counts: arrays [splits, F]: tokens and contexts fired, tokens fired at early
    positions (int64), sum and sum of squares of the values (float64), max (float32). seen: tokens per split, int64
    [splits], fired or not. histogram: feature, split, bin, tokens, contexts (by peak); bin = floor(log2(value) *
    BINS_PER_OCTAVE). entries: one row per remembered (feature, context), of each feature and split the strongest first:
    feature, split, context_id, document, peak, position, bin, and where the context lies: number of the shard, and row.
    """

    features: range
    counts: dict[str, np.ndarray]
    seen: np.ndarray
    histogram: pl.DataFrame
    entries: pl.DataFrame


def context_table(contexts: Contexts, counted: np.ndarray) -> pl.DataFrame:
    """What sketches look up of a shard's contexts, by row: context_id, document (its hash), split, and tokens, of which
    only unmasked ones are counted. counted: int64 [n]."""
    documents = {d: stable_id("document", d) for d in set(contexts.document_ids)}
    document = np.array([documents[d] for d in contexts.document_ids], dtype=np.int64)
    columns = {"context_id": contexts.ids, "document": document, "split": contexts.splits, "tokens": counted}
    return pl.DataFrame(columns, schema_overrides={"split": pl.UInt8, "tokens": pl.Int64})


def sketch_shard(
    tiles: Iterable[ActivationShard], contexts: pl.DataFrame, *, length: int, width: int, shard: int = 0
) -> tuple[Sketch, np.ndarray]:
    """The sketch of one shard, and the pairs of each context, int64 [contexts]: sum of l0² over its tokens, which is what
    it costs to count which features fire together.

    tiles: the shard's non-zeros, cut between features. contexts: see `context_table`. length: positions of a context.
    shard: its number. What is held is one tile and what is remembered.
    """
    counts = {name: np.zeros((len(SPLITS), width), dtype=dtype) for name, dtype in COUNTS.items()}
    l0 = np.zeros(len(contexts) * length, dtype=np.int64)
    histograms, entries = (
        [_histogram(*np.zeros((3, 0), dtype=np.int64))],
        [entry_table(*np.zeros((4, 0)), contexts=contexts, shard=shard)],
    )
    for acts in tiles:
        l0 += np.bincount(acts.token, minlength=len(l0))
        tile = _Tile(acts, contexts["split"].to_numpy(), length)
        tile.count(counts)
        histograms.append(tile.histogram())
        fired = entry_table(tile.pair_feature, tile.pair_row, tile.peak, tile.peak_position, contexts=contexts, shard=shard)
        entries.append(_remembered(fired))
    sketch = Sketch(range(width), counts, seen_in(contexts), pl.concat(histograms), pl.concat(entries))
    return sketch, (l0.reshape(-1, length) ** 2).sum(axis=1)


def seen_in(contexts: pl.DataFrame) -> np.ndarray:
    """Unmasked tokens of each split: int64 [splits]."""
    return np.bincount(contexts["split"], contexts["tokens"], minlength=len(SPLITS)).astype(np.int64)


def entry_table(
    feature: np.ndarray, row: np.ndarray, peak: np.ndarray, position: np.ndarray, *, contexts: pl.DataFrame, shard: int
) -> pl.DataFrame:
    """Entries as `Sketch` has them, of (feature, context row) pairs [n] with the value and place of each one's peak."""
    row = row.astype(np.uint32)
    peak = peak.astype(np.float32)
    return pl.DataFrame(
        {
            "feature": feature.astype(np.uint32),
            "split": contexts["split"].gather(row),
            "context_id": contexts["context_id"].gather(row),
            "document": contexts["document"].gather(row),
            "peak": peak,
            "position": position.astype(np.uint16),
            "bin": value_bins(peak),
            "shard": np.full(len(row), shard, dtype=np.uint32),
            "row": row,
        }
    )


def value_bins(values: np.ndarray) -> np.ndarray:
    """The fixed log bin of each positive value: int16."""
    return np.floor(np.log2(values) * BINS_PER_OCTAVE).astype(np.int16)


class _Tile:
    """Non-zeros of whole features as columns [n], and their (feature, context) pairs with the first maximum of each."""

    def __init__(self, acts: ActivationShard, splits: np.ndarray, length: int):
        self.feature, self.value, self.splits = acts.feature, acts.value, splits
        self.row = acts.token // np.uint32(length)
        self.position = acts.token - self.row * np.uint32(length)
        starts = np.flatnonzero(begins(self.feature, self.row))
        self.pair_feature, self.pair_row = self.feature[starts], self.row[starts]
        # The bits of positive floats order as the floats do; of equal ones the first is wanted, so positions count down.
        packed = (self.value.view(np.uint32).astype(np.uint64) << _POSITION_BITS) | (_POSITIONS - self.position)
        best = np.maximum.reduceat(packed, starts)
        self.peak = (best >> _POSITION_BITS).astype(np.uint32).view(np.float32)
        self.peak_position = _POSITIONS - (best & _POSITIONS)

    def count(self, counts: dict[str, np.ndarray]) -> None:
        """Fill in the tile's features; no other tile has anything of theirs."""
        first, stop = int(self.feature[0]), int(self.feature[-1]) + 1
        shape = (len(SPLITS), stop - first)

        def cells(feature: np.ndarray, row: np.ndarray) -> np.ndarray:
            return self.splits[row].astype(np.int64) * shape[1] + (feature - np.uint32(first))

        def total(cell: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(cell, weights, minlength=shape[0] * shape[1]).reshape(shape)

        cell, pair_cell = cells(self.feature, self.row), cells(self.pair_feature, self.pair_row)
        values = self.value.astype(np.float64)
        largest = np.zeros(shape[0] * shape[1], dtype=np.float32)
        np.maximum.at(largest, pair_cell, self.peak)
        counts["tokens"][:, first:stop] = total(cell)
        counts["contexts"][:, first:stop] = total(pair_cell)
        counts["early"][:, first:stop] = total(cell[self.position <= EARLY_POSITIONS])
        counts["sum"][:, first:stop] = total(cell, values)
        counts["sum2"][:, first:stop] = total(cell, values**2)
        counts["max"][:, first:stop] = largest.reshape(shape)

    def histogram(self) -> pl.DataFrame:
        tokens = _pack(self.feature, self.splits[self.row], value_bins(self.value))
        peaks = _pack(self.pair_feature, self.splits[self.pair_row], value_bins(self.peak))
        (at, count), (peak_at, peak_count) = (np.unique(keys, return_counts=True) for keys in (tokens, peaks))
        contexts = np.zeros_like(count)
        contexts[np.searchsorted(at, peak_at)] = peak_count
        return _histogram(at, count, contexts)


def packed_places(table: pl.DataFrame) -> np.ndarray:
    """One integer for each row's (feature, split, bin), which order as those do: int64 [n]."""
    return _pack(table["feature"].to_numpy(), table["split"].to_numpy(), table["bin"].to_numpy())


def _pack(feature: np.ndarray, split: np.ndarray, bins: np.ndarray) -> np.ndarray:
    cell = feature.astype(np.int64) * len(SPLITS) + split
    return (cell << _BIN_BITS) + (bins.astype(np.int64) - _LOWEST_BIN)


def _histogram(packed: np.ndarray, tokens: np.ndarray, contexts: np.ndarray) -> pl.DataFrame:
    feature, split = np.divmod(packed >> _BIN_BITS, len(SPLITS))
    bins = (packed & ((1 << _BIN_BITS) - 1)) + _LOWEST_BIN
    columns = {"feature": feature.astype(np.uint32), "split": split.astype(np.uint8), "bin": bins.astype(np.int16)}
    return pl.DataFrame({**columns, "tokens": tokens, "contexts": contexts})


def merge(sketches: Sequence[Sketch]) -> Sketch:
    """The sketch of the union of disjoint sets of contexts, of the same features: in whatever order and grouping the same,
    bit for bit but for the float64 rounding of sum and sum2."""
    counts = {
        name: np.maximum.reduce([s.counts[name] for s in sketches])
        if name == "max"
        else np.add.reduce([s.counts[name] for s in sketches])
        for name in COUNTS
    }
    every = pl.concat([s.histogram for s in sketches])
    summed = every.select("tokens", "contexts", packed=packed_places(every)).group_by("packed").sum().sort("packed")
    histogram = _histogram(*(summed[name].to_numpy() for name in ("packed", "tokens", "contexts")))
    entries = _remembered(pl.concat([s.entries for s in sketches]))
    return Sketch(sketches[0].features, counts, np.add.reduce([s.seen for s in sketches]), histogram, entries)


def merge_all(sketches: Iterable[Sketch]) -> Sketch:
    """Merge any number, one at least, holding twice what the result remembers, or MERGE_ENTRIES, whichever is more, and
    MERGE_SKETCHES at most."""
    waiting: list[Sketch] = []
    held = 0
    for sketch in sketches:
        waiting.append(sketch)
        held += len(sketch.entries)
        is_many = len(waiting) == MERGE_SKETCHES  # each has counts of all features, whether they fire or not
        if is_many or len(waiting) > 1 and held > max(MERGE_ENTRIES, 2 * len(waiting[0].entries)):
            waiting = [merge(waiting)]
            held = len(waiting[0].entries)
    return merge(waiting)


def _remembered(entries: pl.DataFrame) -> pl.DataFrame:
    """Those entries that are among a feature's top documents, uniform sample or per-bin samples, per split; sorted."""
    entries = entries.sort("feature", "split", "peak", "context_id", descending=[False, False, True, False])
    begin = begins(*(entries[name].to_numpy() for name in ("feature", "split")))
    crowded = np.repeat(sizes(begin) > SAMPLE_CONTEXTS, sizes(begin))
    many, begin = entries.filter(crowded), begin[crowded]
    draw = draws(many)
    first = first_of_each(numbers(begin), many["document"].to_numpy())
    kept = first & (ranks_among(first, begin) < TOP_DOCUMENTS)
    kept |= lowest_draws(begin, draw, SAMPLE_CONTEXTS)
    kept |= lowest_draws(begin | begins(many["bin"].to_numpy()), draw, PER_BIN_CONTEXTS)
    forgotten = crowded
    forgotten[crowded] = ~kept
    return entries.filter(~forgotten)


def draws(entries: pl.DataFrame) -> np.ndarray:
    """A hash of (context_id, feature) that orders a feature's contexts at random, anew for each feature: uint64 [n].

    The lowest k of any subset are a sample of it. Splitmix64's finaliser is a bijection, so contexts of a feature never tie.
    """
    context, feature = (entries[name].to_numpy().astype(np.uint64) for name in ("context_id", "feature"))
    with np.errstate(over="ignore"):
        z = context + feature * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
