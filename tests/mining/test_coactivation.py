from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from scopeatlas.activations.shards import ActivationShard
from scopeatlas.mining import coactivation
from scopeatlas.mining.coactivation import PARTNER_SCHEMA, Sample, draw_sample, firing_matrix, partners

WIDTH, LENGTH = 60, 9


@pytest.fixture
def fires(rng) -> np.ndarray:
    """Which features fire where, bool [WIDTH, tokens]: some often together, one everywhere, three never."""
    common = rng.random((4, 700)) < 0.1
    fires = rng.random((WIDTH, 700)) < rng.choice([0.002, 0.03, 0.1], WIDTH)[:, None]
    fires[:30] |= common[rng.integers(0, 4, 30)] & (rng.random((30, 700)) < 0.7)
    fires[30] = True
    fires[[0, 31, WIDTH - 1]] = False
    return fires


def brute_force(fires: np.ndarray, count: int) -> set[tuple]:
    """Feature, partner, both, and the ranks, by a loop over pairs."""
    found: dict[tuple[int, int], list] = {}
    for a in range(len(fires)):
        together = {b: int((fires[a] & fires[b]).sum()) for b in range(len(fires)) if b != a}
        jaccard = {b: n / int((fires[a] | fires[b]).sum()) for b, n in together.items() if n}
        share = {b: n / int(fires[b].sum()) for b, n in together.items() if n >= 2}  # a's own rate is the same for all
        for measure, scores in enumerate((share, jaccard)):
            for rank, b in enumerate(sorted(scores, key=lambda b, scores=scores: (-scores[b], b))[:count]):
                found.setdefault((a, b), [together[b], None, None])[measure + 1] = rank
    return {(*pair, *facts) for pair, facts in found.items()}


def as_matrix(fires: np.ndarray) -> sparse.csr_matrix:
    return sparse.csr_matrix(fires.astype(np.float32))


@pytest.mark.parametrize("tile", [1, 900, 1 << 22])
@pytest.mark.parametrize("block", [2, 32])
def test_partners_are_those_of_highest_pmi_and_jaccard_over_all_pairs(fires, monkeypatch, tile, block):
    monkeypatch.setattr(coactivation, "TILE_PAIRS", tile)
    monkeypatch.setattr(coactivation, "_BLOCK", block)
    tables = list(partners(as_matrix(fires), fires.shape[1], count=5))
    assert (len(tables) == 1) == (tile == 1 << 22)
    table = pl.concat(tables)
    assert table.schema == PARTNER_SCHEMA and table.equals(table.sort("feature", "partner"))
    got = table.select("feature", "partner", "both", "pmi_rank", "jaccard_rank").rows()
    assert len(set(got)) == len(got) and set(got) == brute_force(fires, 5)


def test_pmi_is_in_bits_and_jaccard_a_share_of_tokens(fires):
    table = pl.concat(partners(as_matrix(fires), fires.shape[1]))
    for row in table.iter_rows(named=True):
        a, b = fires[row["feature"]], fires[row["partner"]]
        assert row["jaccard"] == pytest.approx((a & b).sum() / (a | b).sum(), rel=1e-6)
        assert row["pmi"] == pytest.approx(np.log2((a & b).mean() / (a.mean() * b.mean())), rel=1e-5, abs=1e-6)


def test_a_feature_that_fires_everywhere_tells_nothing_of_another(fires):
    table = pl.concat(partners(as_matrix(fires), fires.shape[1], count=WIDTH))
    assert np.allclose(table.filter(pl.col("partner") == 30)["pmi"], 0, atol=1e-6)


def test_features_that_never_fire_neither_have_nor_are_partners(fires):
    table = pl.concat(partners(as_matrix(fires), fires.shape[1], count=WIDTH))
    assert not {0, 31, WIDTH - 1} & {*table["feature"], *table["partner"]}


def test_a_sample_where_nothing_fires_has_no_partners():
    tables = list(partners(as_matrix(np.zeros((5, 9), dtype=bool)), 9))
    assert all(table.is_empty() and table.schema == PARTNER_SCHEMA for table in tables)


def context_tables(rng: np.random.Generator, shards: int) -> list[pl.DataFrame]:
    columns = {
        "context_id": rng.choice(2**62, 400, replace=False).astype(np.int64),
        "split": rng.integers(0, 3, 400).astype(np.uint8),
        "tokens": rng.integers(1, 9, 400),
        "pairs": rng.integers(0, 50, 400),
    }
    return sharded(pl.DataFrame(columns), rng, shards)


def sharded(table: pl.DataFrame, rng: np.random.Generator, shards: int) -> list[pl.DataFrame]:
    shard = rng.integers(0, shards, len(table))
    return [
        table.filter(shard == number).sample(fraction=1, shuffle=True, seed=int(rng.integers(1e9))) for number in range(shards)
    ]


@pytest.mark.parametrize("budget", [1, 700, 1 << 40])
def test_the_sample_does_not_depend_on_shards(rng, monkeypatch, budget):
    monkeypatch.setattr(coactivation, "PAIRS", budget)
    (whole,) = context_tables(rng, 1)
    expected = draw_sample([whole])
    for shards in (3, 7):
        parts = sharded(whole, rng, shards)
        found = draw_sample(parts)
        assert found.table["context_id"].equals(expected.table["context_id"]) and found.tokens == expected.tokens
        assert all(parts[row["shard"]].row(row["row"])[0] == row["context_id"] for row in found.table.iter_rows(named=True))
    explain = whole.filter(pl.col("split") == 0)
    assert set(expected.table["context_id"]) <= set(explain["context_id"])
    assert len(expected.table) == len(explain) if budget == 1 << 40 else expected.table["pairs"].sum() <= max(budget, 49)


def test_a_larger_corpus_keeps_the_order_of_the_smaller_one(rng):
    tables = context_tables(rng, 5)
    few, all_ = (draw_sample(tables[:n]).table["context_id"].to_list() for n in (3, 5))
    assert [context for context in all_ if context in set(few)] == few


def test_what_fires_is_gathered_from_shards_and_tiles(rng):
    """Two shards of 5 contexts, of which the sample has 1, 3 of the first and 0 of the second."""
    dense = rng.random((2, WIDTH, 5 * LENGTH)) < 0.1
    table = pl.DataFrame({"shard": [0, 1, 0], "row": [3, 0, 1], "tokens": [LENGTH] * 3, "context_id": [4, 5, 6]})

    def read(number: int) -> Iterator[ActivationShard]:
        for features in np.array_split(np.arange(WIDTH), 4):
            feature, token = np.nonzero(dense[number][features])
            value = np.ones(len(feature), dtype=np.float32)
            yield ActivationShard((feature + features[0]).astype(np.uint32), token.astype(np.uint32), value)

    found = firing_matrix(Sample(table), read, length=LENGTH, width=WIDTH).toarray()
    rows = [dense[shard][:, row * LENGTH : (row + 1) * LENGTH] for shard, row in ((0, 3), (1, 0), (0, 1))]
    assert (found == np.concatenate(rows, axis=1)).all()
