from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.study import matching as module
from scopeatlas.study.matching import (
    KEPT,
    LEAST,
    MATCH_SCHEMA,
    Matching,
    correlated_pairs,
    correlation_of,
    match,
    shared_counts,
)
from tests.conftest import WIDTH, Stored
from tests.planted import plant
from tests.study.opened import copied, dense_correlations, opened, random_acts

VANISHED, SPLIT, NEW, NEW_SPLIT = range(0, 8), range(8, 14), range(0, 6), range(90, 96)
"""Features of the first SAE that the second lacks or has twice; of the second, those that fire at random and the second parts."""


def copy_of(firings: Firings, units: Units) -> tuple[Firings, np.ndarray]:
    """The firings of a second SAE made of a first one's, and the place of each of the first's features there (-1: nowhere).

    Places are a permutation and values vary by a tenth. A split feature fires in every other context at its place, and in the
    rest at one of NEW_SPLIT; what is NEW fires on random tokens.
    """
    draw = np.random.default_rng(0)
    place = np.full(WIDTH, -1)
    rest = np.setdiff1d(np.arange(WIDTH), [*VANISHED])
    free = np.setdiff1d(np.arange(WIDTH), [*NEW, *NEW_SPLIT])
    place[rest[: len(free)]] = draw.permutation(free)
    feature = place[firings.feature]
    is_second = (firings.position // units.length) % 2 == 1
    for whole, part in zip(SPLIT, NEW_SPLIT, strict=True):
        feature[(firings.feature == whole) & is_second] = part
    kept = feature >= 0
    noise = draw.uniform(0.9, 1.1, kept.sum()).astype(np.float32)
    random = [draw.choice(np.flatnonzero(units.counted), 400, replace=False) for _ in NEW]
    new = np.repeat(np.array(NEW), 400)
    order = np.lexsort((np.r_[firings.position[kept], *random], np.r_[feature[kept], new]))
    made = Firings(
        np.r_[feature[kept], new].astype(np.uint32)[order],
        np.r_[firings.position[kept], *random][order],
        WIDTH,
        value=np.r_[firings.value[kept] * noise, np.ones(len(new), np.float32)][order],
    )
    return made, place


@pytest.fixture(scope="module")
def units(medium, subject) -> Units:
    return Units(medium.corpus, subject)


@pytest.fixture(scope="module")
def truth(medium, subject, units) -> tuple[Firings, np.ndarray]:
    return copy_of(read_firings(medium.store, medium.corpus, medium.entry, subject, units, width=WIDTH), units)


@pytest.fixture(scope="module")
def pair(medium, two_saes, subject, units, truth, tmp_path_factory) -> Stored:
    """The first SAE as it fires on the medium corpus, and beside it the second as it was made of that one."""
    root = tmp_path_factory.mktemp("pair") / "store"
    stored = replace(copied(medium, root), entries=two_saes)
    plant(replace(stored, entries=two_saes[1:]), subject, units, truth[0], root)
    return stored


def with_second(pair: Stored, subject, units: Units, firings: Firings, root: Path) -> Matching:
    """The matching where the second SAE fires otherwise, in a store at `root`."""
    changed = copied(pair, root)
    plant(replace(changed, entries=pair.entries[1:]), subject, units, firings, root)
    return match(*(opened(changed, entry, subject) for entry in pair.entries))


@pytest.fixture(scope="module")
def both(pair, subject):
    return tuple(opened(pair, entry, subject) for entry in pair.entries)


@pytest.fixture(scope="module")
def found(both) -> Matching:
    return match(*both)


def of_status(found: Matching, side, status: str) -> dict[int, list[int]]:
    rows = found.of(side).filter(status=status)
    return dict(zip(rows["feature"].to_list(), rows["partners"].to_list(), strict=True))


def test_correlations_are_those_of_dense_rows(rng):
    a, b = random_acts(rng, 40, 900, 0.05), random_acts(rng, 30, 900, 0.2)
    b = replace(b, matrix=(b.matrix + 3 * random_acts(rng, 30, 40, 0.1).matrix @ a.matrix).tocsr())
    pairs = correlated_pairs(a, b, count=30)
    expected = dense_correlations(a, b)
    at = tuple(pairs.select("a", "b").to_numpy().T)
    np.testing.assert_allclose(pairs["correlation"], expected[at], rtol=1e-9)
    listed = np.zeros(expected.shape, dtype=bool)
    listed[at] = True
    assert (listed == (expected >= LEAST)).mean() > 0.999  # but for one that lies on the bar


def test_the_correlation_of_one_pair_is_that_of_dense_rows_and_none_where_one_never_fires(rng):
    a, b = random_acts(rng, 5, 300, 0.2), random_acts(rng, 6, 300, 0.3)
    silent = replace(a, matrix=a.only(np.array([True, True, False, True, True])).matrix)
    assert correlation_of(a, 1, b, 4) == pytest.approx(dense_correlations(a, b)[1, 4], rel=1e-9, abs=1e-12)
    assert correlation_of(silent, 2, b, 4) is None


def test_of_each_feature_the_strongest_pairs_are_kept_with_their_ranks(rng):
    a, b = random_acts(rng, 60, 200, 0.1), random_acts(rng, 70, 200, 0.1)
    pairs = correlated_pairs(a, b, count=3)
    expected = dense_correlations(a, b)
    expected[expected < LEAST] = -np.inf
    for side, values in (("a", expected), ("b", expected.T)):
        for feature, row in enumerate(values):
            best = np.argsort(-row, kind="stable")[: min(3, int(np.isfinite(row).sum()))]
            mine = pairs.filter((pl.col(side) == feature) & (pl.col(f"rank_{side}") < 3)).sort(f"rank_{side}")
            other = "b" if side == "a" else "a"
            np.testing.assert_allclose(row[mine[other].to_numpy()], row[best], rtol=1e-9)


def test_tiles_give_what_one_piece_gives(rng, monkeypatch):
    a, b = random_acts(rng, 50, 400, 0.1), random_acts(rng, 50, 400, 0.1)
    at = rng.integers(0, 50, (2, 200))
    whole, counts = correlated_pairs(a, b, count=4), shared_counts(a, b, *at)
    monkeypatch.setattr(module, "TILE_PAIRS", 97)
    assert correlated_pairs(a, b, count=4).equals(whole)
    assert (shared_counts(a, b, *at) == counts).all()
    together = (a.fires.toarray() @ b.fires.toarray().T)[tuple(at)]
    assert (counts == together).all()


def test_a_permuted_feature_is_kept_and_its_place_is_found(found, truth):
    _, place = truth
    kept = of_status(found, "a", "kept")
    meant = {f: [int(place[f])] for f in range(WIDTH) if place[f] >= 0 and f not in SPLIT}
    assert kept == meant
    assert of_status(found, "b", "kept") == {p[0]: [f] for f, p in meant.items()}


def test_a_feature_that_fires_here_as_one_and_there_as_another_is_split(found, truth):
    _, place = truth
    split = of_status(found, "a", "split")
    meant = {f: {int(place[f]), part} for f, part in zip(SPLIT, NEW_SPLIT, strict=True) if place[f] >= 0}
    assert {f: set(parts) for f, parts in split.items()} == meant
    assert of_status(found, "b", "split") == {part: [f] for f, parts in meant.items() for part in parts}


def test_what_the_other_lacks_vanished_and_what_is_new_appeared(found, truth):
    _, place = truth
    assert set(of_status(found, "a", "vanished")) == set(np.flatnonzero(place < 0).tolist())
    assert set(of_status(found, "b", "appeared")) == set(NEW)
    assert all(partners == [] for partners in of_status(found, "a", "vanished").values())


def test_seen_from_the_other_side_everything_is_mirrored(found, both):
    back = match(both[1], both[0])
    mirror = {"split": "merged", "merged": "split", "vanished": "appeared", "appeared": "vanished"}
    turned = back.features.with_columns(
        side=pl.when(pl.col("side") == "a").then(pl.lit("b")).otherwise(pl.lit("a")), status=pl.col("status").replace(mirror)
    ).sort("side", "feature")
    numbers = ("cosine", "best_cosine")  # a product of matrices rounds as its tiles lie
    assert turned.drop(numbers).equals(found.features.drop(numbers))
    for name in numbers:
        np.testing.assert_allclose(turned[name].to_numpy(), found.features[name].to_numpy(), atol=1e-5)
    assert back.chance == found.chance


def test_random_places_match_by_chance_alone(found):
    shares = [(null >= found.chance).mean() for null in (found.null_a, found.null_b)]
    assert LEAST <= found.chance < KEPT and max(shares) <= 0.03
    new = found.of("b").filter(pl.col("feature").is_in(list(NEW)))
    assert (new["correlation"].fill_null(0.0) < 2 * found.chance).all()


def test_a_feature_that_hardly_fires_is_silent(pair, subject, units, truth, tmp_path):
    made, place = truth
    few = int(place[20])
    mine = np.flatnonzero(made.feature == few)
    kept = np.setdiff1d(np.arange(len(made.feature)), mine[9:])
    fewer = Firings(made.feature[kept], made.position[kept], WIDTH, value=made.value[kept])
    again = with_second(pair, subject, units, fewer, tmp_path / "store")
    row = again.of("b").row(few, named=True)
    assert (row["status"], row["partners"], row["nearest"]) == ("silent", [], None)
    assert again.of("a").row(20, named=True)["status"] == "vanished"


def test_documents_of_the_report_split_decide_nothing(pair, found, subject, units, truth, tmp_path):
    report = {
        units.documents[d] for d, s in zip(units.context_document, units.context_split, strict=True) if SPLITS[s] == "report"
    }
    assert report and not report & found.documents
    inside = units.in_split("report")[truth[0].position]
    gone = Firings(truth[0].feature[~inside], truth[0].position[~inside], WIDTH, value=truth[0].value[~inside])
    assert with_second(pair, subject, units, gone, tmp_path / "store").features.equals(found.features)


def test_the_frame_has_one_row_for_each_feature_of_both(found):
    assert found.features.schema == MATCH_SCHEMA and found.cached
    assert found.features.select("side", "feature").rows() == [(side, f) for side in "ab" for f in range(WIDTH)]
    assert found.counts.select(pl.col("a", "b").sum()).row(0) == (WIDTH, WIDTH)
