"""Sketches: per-feature statistics of one SAE that merge, whatever the sharding and order.

What belongs here: updating from a shard, merging, and which contexts a sketch remembers. What does not: cutting
windows of text (`examples.py`).

Everything is segment arithmetic over non-zeros sorted by (feature, token); nothing loops over features.
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import polars as pl

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.storage.files import atomic_path, stable_id

TOP_DOCUMENTS = 16
SAMPLE_CONTEXTS = 16
PER_BIN_CONTEXTS = 4
BINS_PER_OCTAVE = 2
EARLY_POSITIONS = 3
"""Positions 1 to 3 after BOS; a feature that fires mostly there is positional."""

_COUNTS = ("tokens", "contexts", "early", "sum", "sum2", "max")


@dataclass(frozen=True)
class Sketch:
    """What is remembered of F features over some contexts, per split.

    counts: arrays [splits, F]: tokens and contexts fired, tokens fired at early positions (int64), sum and sum of
    squares of the values (float64), max (float32). seen: tokens per split, int64 [splits], fired or not.
    histogram: feature, split, bin, tokens, contexts (by peak); bin = floor(log2(value) * BINS_PER_OCTAVE).
    entries: one row per remembered (feature, context): feature, split, context_id, document, peak, position, bin,
    shard, row.
    """

    counts: dict[str, np.ndarray]
    seen: np.ndarray
    histogram: pl.DataFrame
    entries: pl.DataFrame

    @property
    def width(self) -> int:
        return self.counts["tokens"].shape[1]


def sketch_shard(acts: ActivationShard, contexts: Contexts, *, width: int, shard: str, seen: np.ndarray) -> Sketch:
    """The sketch of one shard. seen: unmasked tokens per split, int64 [splits]."""
    length = contexts.tokens.shape[1]
    row, position = np.divmod(acts.token.astype(np.int64), length)
    feature = acts.feature.astype(np.int64)
    cell = contexts.splits[row].astype(np.int64) * width + feature
    bins = value_bins(acts.value)
    peaks = _peaks(feature, row, acts.value)
    peak_cell = cell[peaks.at]

    def per_cell(cells: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cells, weights, minlength=len(SPLITS) * width).reshape(len(SPLITS), width)

    values = acts.value.astype(np.float64)
    largest = np.zeros(len(SPLITS) * width, dtype=np.float32)
    np.maximum.at(largest, peak_cell, acts.value[peaks.at])
    counts = {
        "tokens": per_cell(cell),
        "contexts": per_cell(peak_cell),
        "early": per_cell(cell[position <= EARLY_POSITIONS]),
        "sum": per_cell(cell, values),
        "sum2": per_cell(cell, values**2),
        "max": largest.reshape(len(SPLITS), width),
    }
    documents = {d: stable_id("document", d) for d in set(contexts.document_ids)}
    document = np.array([documents[d] for d in contexts.document_ids], dtype=np.int64)
    entries = pl.DataFrame(
        {
            "feature": feature[peaks.at].astype(np.uint32),
            "split": contexts.splits[row[peaks.at]],
            "context_id": contexts.ids[row[peaks.at]],
            "document": document[row[peaks.at]],
            "peak": acts.value[peaks.at],
            "position": position[peaks.at].astype(np.uint16),
            "bin": bins[peaks.at],
            "shard": np.full(len(peaks.at), shard),
            "row": row[peaks.at].astype(np.uint32),
        },
        schema_overrides={"shard": pl.String},
    )
    return Sketch(counts, seen, _histogram(feature, contexts.splits[row], bins, peaks.at), _remembered(entries))


def merge(a: Sketch, b: Sketch) -> Sketch:
    """The sketch of the union of two disjoint sets of contexts: associative, and commutative bit for bit but for the
    float64 rounding of sum and sum2."""
    counts = {
        name: np.maximum(a.counts[name], b.counts[name]) if name == "max" else a.counts[name] + b.counts[name] for name in _COUNTS
    }
    histogram = pl.concat([a.histogram, b.histogram]).group_by("feature", "split", "bin").sum().sort("feature", "split", "bin")
    return Sketch(counts, a.seen + b.seen, histogram, _remembered(pl.concat([a.entries, b.entries])))


def merge_all(sketches: list[Sketch]) -> Sketch:
    """Merge in pairs, so that no entry is re-ranked more than log2(n) times."""
    while len(sketches) > 1:
        sketches = [reduce(merge, sketches[i : i + 2]) for i in range(0, len(sketches), 2)]
    return sketches[0]


def value_bins(values: np.ndarray) -> np.ndarray:
    """The fixed log bin of each positive value: int16."""
    return np.floor(np.log2(values) * BINS_PER_OCTAVE).astype(np.int16)


@dataclass(frozen=True)
class _Peaks:
    at: np.ndarray  # index into the non-zeros of each (feature, context)'s first maximum


def _peaks(feature: np.ndarray, row: np.ndarray, value: np.ndarray) -> _Peaks:
    if not len(feature):
        return _Peaks(np.zeros(0, dtype=np.int64))
    starts = np.flatnonzero(np.r_[True, (feature[1:] != feature[:-1]) | (row[1:] != row[:-1])])
    segment = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(feature)]))
    is_peak = np.flatnonzero(value == np.maximum.reduceat(value, starts)[segment])
    first = np.r_[True, segment[is_peak][1:] != segment[is_peak][:-1]]
    return _Peaks(is_peak[first])


def _histogram(feature: np.ndarray, split: np.ndarray, bins: np.ndarray, peaks: np.ndarray) -> pl.DataFrame:
    is_peak = np.zeros(len(feature), dtype=np.uint32)
    is_peak[peaks] = 1
    table = pl.DataFrame({"feature": feature.astype(np.uint32), "split": split, "bin": bins, "contexts": is_peak})
    counted = table.group_by("feature", "split", "bin").agg(
        tokens=pl.len().cast(pl.Int64), contexts=pl.col("contexts").cast(pl.Int64).sum()
    )
    return counted.sort("feature", "split", "bin")


def _remembered(entries: pl.DataFrame) -> pl.DataFrame:
    """Those entries that are among a feature's top documents, uniform sample or per-bin samples, per split."""
    cell = ["feature", "split"]
    ranked = entries.with_columns(draw=_draw(entries)).sort(
        "feature", "split", "peak", "context_id", descending=[False, False, True, False]
    )
    best = ranked.unique(["feature", "split", "document"], keep="first", maintain_order=True)
    top = best.filter(pl.int_range(pl.len()).over(cell) < TOP_DOCUMENTS)
    drawn = ranked.sort("feature", "split", "draw", "context_id")
    sample = drawn.filter(pl.int_range(pl.len()).over(cell) < SAMPLE_CONTEXTS)
    binned = drawn.filter(pl.int_range(pl.len()).over([*cell, "bin"]) < PER_BIN_CONTEXTS)
    kept = pl.concat([top, sample, binned]).unique(["feature", "context_id"], keep="first", maintain_order=True)
    return kept.drop("draw").sort("feature", "split", "peak", "context_id", descending=[False, False, True, False])


def _draw(entries: pl.DataFrame) -> pl.Series:
    """A hash of (context, feature) that orders contexts at random, anew for each feature (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = entries["context_id"].to_numpy().astype(np.uint64)
        z = z + entries["feature"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return pl.Series("draw", z ^ (z >> np.uint64(31)))


def draw_order(entries: pl.DataFrame) -> pl.DataFrame:
    """`entries` with the column `draw`, by which uniform samples are taken: the lowest k of any subset are a sample."""
    return entries.with_columns(draw=_draw(entries))


def write_sketch(sketch: Sketch, counts_path: Path, histogram_path: Path, entries_path: Path) -> None:
    """Write a sketch as three files, each atomically."""
    with atomic_path(counts_path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, seen=sketch.seen, **sketch.counts)  # pyright: ignore[reportArgumentType]
    with atomic_path(histogram_path) as temporary:
        sketch.histogram.write_parquet(temporary)
    with atomic_path(entries_path) as temporary:
        sketch.entries.write_parquet(temporary)


def read_sketch(counts_path: Path, histogram_path: Path, entries_path: Path) -> Sketch:
    """Read back what `write_sketch` wrote."""
    with np.load(counts_path) as arrays:
        counts = {name: arrays[name] for name in _COUNTS}
        seen = arrays["seen"]
    return Sketch(counts, seen, pl.read_parquet(histogram_path), pl.read_parquet(entries_path))
