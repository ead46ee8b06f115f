import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.mining import segments, sketches
from scopeatlas.mining.sketches import (
    EARLY_POSITIONS,
    PER_BIN_CONTEXTS,
    SAMPLE_CONTEXTS,
    TOP_DOCUMENTS,
    Sketch,
    context_table,
    draws,
    merge,
    merge_all,
    sketch_shard,
    value_bins,
)
from scopeatlas.storage.files import stable_id

WIDTH, LENGTH = 6, 12


def random_firings(rng, contexts: int = 240) -> tuple[np.ndarray, Contexts]:
    """Values [contexts, LENGTH, WIDTH], many of them tied and most zero, and contexts of a third as many documents."""
    values = (rng.integers(1, 40, (contexts, LENGTH, WIDTH)) / 8).astype(np.float32)
    values[rng.random(values.shape) > np.array([0.3, 0.02, 0.1, 0.05, 0.005, 0])] = 0
    documents = rng.integers(0, contexts // 3, contexts)
    splits = rng.integers(0, 3, contexts // 3)[documents].astype(np.uint8)
    ids = rng.choice(2**62, contexts, replace=False).astype(np.int64)
    tokens = rng.integers(0, 50, (contexts, LENGTH)).astype(np.int32)
    return values, Contexts(ids, [f"document {d}" for d in documents], splits, tokens)


def nonzeros_of(values: np.ndarray, rows: np.ndarray) -> ActivationShard:
    feature, row, position = np.nonzero(values[rows].transpose(2, 0, 1))
    token = (row * LENGTH + position).astype(np.uint32)
    return ActivationShard(feature.astype(np.uint32), token, values[rows][row, position, feature])


def tiles_of(acts: ActivationShard, features: int) -> Iterator[ActivationShard]:
    """Cut after every so many features; a tile where nothing fires is left out."""
    for first in range(0, WIDTH, features):
        at = (acts.feature >= first) & (acts.feature < first + features)
        if at.any():
            yield ActivationShard(acts.feature[at], acts.token[at], acts.value[at])


def sketch_of(values: np.ndarray, contexts: Contexts, rows: np.ndarray, shard: int = 0, *, tile: int = WIDTH) -> Sketch:
    """The sketch of some of the contexts."""
    chosen = contexts.take(rows)
    table = context_table(chosen, np.full(len(rows), LENGTH))
    acts = tiles_of(nonzeros_of(values, rows), tile)
    return sketch_shard(acts, table, length=LENGTH, width=WIDTH, shard=shard)[0]


def assert_same(a: Sketch, b: Sketch) -> None:
    """Equal bit for bit, but for the rounding of moments and for which shard a context lies in."""
    for name in ("tokens", "contexts", "early", "max"):
        assert (a.counts[name] == b.counts[name]).all() and a.counts[name].dtype == b.counts[name].dtype
    for name in ("sum", "sum2"):
        assert np.allclose(a.counts[name], b.counts[name], rtol=1e-13, atol=0)
    assert (a.seen == b.seen).all()
    assert a.histogram.equals(b.histogram)
    assert a.entries.drop("shard", "row").equals(b.entries.drop("shard", "row"))


def mixed(context_id: int, feature: int) -> int:
    """Splitmix64's finaliser in plain integers."""
    mask = 2**64 - 1
    z = (context_id + feature * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_counts_moments_and_histogram_equal_brute_force(rng):
    values, contexts = random_firings(rng)
    sketch = sketch_of(values, contexts, np.arange(len(contexts)))
    histogram = defaultdict(lambda: [0, 0])
    for split in range(3):
        for feature in range(WIDTH):
            mine = values[contexts.splits == split][:, :, feature].astype(np.float64)
            fired = mine[mine > 0]
            counts = {name: array[split, feature] for name, array in sketch.counts.items()}
            assert counts["tokens"] == len(fired) and counts["contexts"] == (mine > 0).any(1).sum()
            assert counts["early"] == (mine[:, : EARLY_POSITIONS + 1] > 0).sum()
            assert math.isclose(counts["sum"], math.fsum(fired)) and math.isclose(counts["sum2"], math.fsum(fired**2))
            assert counts["max"] == (fired.max() if len(fired) else 0)
            for value in fired:
                histogram[feature, split, math.floor(2 * math.log2(value))][0] += 1
            for peak in mine.max(1)[mine.max(1) > 0]:
                histogram[feature, split, math.floor(2 * math.log2(peak))][1] += 1
    got = {
        (f, s, b): [tokens, peaks]
        for f, s, b, tokens, peaks in sketch.histogram.select("feature", "split", "bin", "tokens", "contexts").rows()
    }
    assert got == dict(histogram)


def test_remembered_contexts_equal_brute_force(rng):
    values, contexts = random_firings(rng)
    sketch = sketch_of(values, contexts, np.arange(len(contexts)))
    got = {(row["feature"], row["context_id"]): row for row in sketch.entries.iter_rows(named=True)}
    expected = set()
    for split in range(3):
        for feature in range(WIDTH):
            firing = [r for r in range(len(contexts)) if contexts.splits[r] == split and values[r, :, feature].any()]
            ranked = sorted(firing, key=lambda r: (-values[r, :, feature].max(), contexts.ids[r]))
            documents, top = set(), []
            for r in ranked:
                if contexts.document_ids[r] not in documents:
                    documents.add(contexts.document_ids[r])
                    top.append(r)
            drawn = sorted(firing, key=lambda r: mixed(int(contexts.ids[r]), feature))
            bins = defaultdict(list)
            for r in drawn:
                bins[math.floor(2 * math.log2(values[r, :, feature].max()))].append(r)
            binned = [r for members in bins.values() for r in members[:PER_BIN_CONTEXTS]]
            expected |= {(feature, int(contexts.ids[r])) for r in [*top[:TOP_DOCUMENTS], *drawn[:SAMPLE_CONTEXTS], *binned]}
    assert got.keys() == expected
    for (feature, _), row in got.items():
        context = values[row["row"], :, feature]
        assert contexts.ids[row["row"]] == row["context_id"] and contexts.splits[row["row"]] == row["split"]
        assert row["peak"] == context.max() and row["position"] == context.argmax()
        assert row["document"] == stable_id("document", contexts.document_ids[row["row"]])


@pytest.mark.parametrize("shards", [1, 3, 7, 40])
def test_merging_any_sharding_in_any_order_gives_the_sketch_of_the_union(rng, shards):
    values, contexts = random_firings(rng)
    whole = sketch_of(values, contexts, np.arange(len(contexts)))
    shard_of = rng.integers(0, shards, len(contexts))
    for _ in range(3):
        parts = [sketch_of(values, contexts, np.flatnonzero(shard_of == s)) for s in rng.permutation(shards)]
        assert_same(merge_all(parts), whole)
        while len(parts) > 1:  # a random tree
            a, b = (parts.pop(rng.integers(len(parts))) for _ in range(2))
            parts.append(merge([a, b]))
        assert_same(parts[0], whole)


def test_merging_commutes_bit_for_bit(rng):
    values, contexts = random_firings(rng)
    a, b = (
        sketch_of(values, contexts, rows, name) for name, rows in enumerate(np.array_split(rng.permutation(len(contexts)), 2))
    )
    ab, ba = merge([a, b]), merge([b, a])
    assert ab.entries.equals(ba.entries) and ab.histogram.equals(ba.histogram)
    assert all((ab.counts[name] == ba.counts[name]).all() for name in ab.counts)


def test_a_shard_where_nothing_fires_changes_nothing_but_the_tokens_seen(rng):
    values, contexts = random_firings(rng)
    sketch = sketch_of(values, contexts, np.arange(len(contexts)))
    silent = sketch_of(np.zeros_like(values), contexts, np.arange(len(contexts)))
    assert_same(replace(merge([sketch, silent]), seen=sketch.seen), sketch)
    assert (merge([silent, sketch]).seen == 2 * sketch.seen).all()


def test_one_long_document_cannot_fill_the_top(rng):
    values, contexts = random_firings(rng)
    longest = max(set(contexts.document_ids), key=contexts.document_ids.count)
    at = [r for r, d in enumerate(contexts.document_ids) if d == longest]
    values[at, 0, 0] = 100.0
    sketch = sketch_of(values, contexts, np.arange(len(contexts)))
    strongest = sketch.entries.filter((pl.col("feature") == 0) & (pl.col("split") == int(contexts.splits[at[0]])))
    assert len(at) > 1 and strongest["document"].n_unique() >= TOP_DOCUMENTS


def test_ties_are_broken_by_context_id(rng):
    values, contexts = random_firings(rng)
    values[:] = 0
    values[:, 3, 0] = 1.0
    contexts = replace(contexts, document_ids=[str(i) for i in range(len(contexts))], splits=np.zeros(len(contexts), np.uint8))
    entries = sketch_of(values, contexts, np.arange(len(contexts))).entries
    assert entries["context_id"].to_list()[:TOP_DOCUMENTS] == sorted(contexts.ids.tolist())[:TOP_DOCUMENTS]


def test_bins_are_half_octaves():
    assert value_bins(np.array([1.0, 1.4, 1.42, 2.0, 0.5], dtype=np.float32)).tolist() == [0, 0, 1, 2, -2]


def test_the_order_of_the_draw_is_uniform_and_differs_between_features(rng):
    ids = rng.choice(2**62, 4000, replace=False).astype(np.int64)
    drawn = draws(pl.DataFrame({"context_id": np.r_[ids, ids], "feature": np.repeat([0, 1], 4000).astype(np.uint32)})) / 2**64
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(drawn[:4000], drawn[4000:])[0, 1]) < 0.08


@pytest.mark.parametrize("tile", [1, 2, 5])
def test_tiles_of_features_change_nothing(rng, tile):
    values, contexts = random_firings(rng)
    every = np.arange(len(contexts))
    whole, tiled = sketch_of(values, contexts, every), sketch_of(values, contexts, every, tile=tile)
    assert_same(tiled, whole)
    assert all((tiled.counts[name] == whole.counts[name]).all() for name in whole.counts)


def test_the_pairs_of_a_context_are_the_squares_of_what_fires_on_its_tokens(rng):
    values, contexts = random_firings(rng)
    every = np.arange(len(contexts))
    table = context_table(contexts, np.full(len(contexts), LENGTH))
    _, pairs = sketch_shard(tiles_of(nonzeros_of(values, every), 2), table, length=LENGTH, width=WIDTH)
    assert pairs.tolist() == [sum(int((token > 0).sum()) ** 2 for token in context) for context in values]


@pytest.mark.parametrize("waiting", [1, 300, 10**9])
def test_how_many_entries_wait_to_be_merged_changes_nothing(rng, monkeypatch, waiting):
    monkeypatch.setattr(sketches, "MERGE_ENTRIES", waiting)
    values, contexts = random_firings(rng)
    parts = [sketch_of(values, contexts, rows) for rows in np.array_split(rng.permutation(len(contexts)), 11)]
    assert_same(merge_all(iter(parts)), sketch_of(values, contexts, np.arange(len(contexts))))


def test_draws_that_agree_in_most_bits_are_still_put_in_order(rng):
    segment = np.sort(rng.integers(0, 1000, 4000))
    draw = rng.integers(0, 4, 4000).astype(np.uint64) << np.uint64(60) | rng.permutation(4000).astype(np.uint64)
    expected = sorted(range(4000), key=lambda i: (segment[i], int(draw[i])))
    assert segments.by_draw(segment, draw).tolist() == expected
