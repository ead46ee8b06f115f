"""The classifiers beside the features: what they learn, and that they are judged on what they have not seen."""

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scopeatlas.hypotheses.metrics import auroc
from scopeatlas.study import probes
from scopeatlas.study.permutation import Design
from scopeatlas.study.probes import FOLDS, Part, by_all, by_best, by_words, compared, folds, held_out, judged_by


def held_out_auroc(columns: np.ndarray, design: Design, how) -> float:
    fold = folds(design)
    assert fold is not None
    score = held_out(csr_array(columns), design, fold, how)
    return float(auroc(score, design.in_a, np.ones((design.documents, 1)))[0])


def test_folds_are_even_and_keep_pairs_together():
    fold = folds(Design(23, 11), seed=1)
    assert np.bincount(fold[:23]).max() <= 5 and np.bincount(fold[23:]).min() >= 2
    paired = folds(Design(12, 12, pairs=True), seed=1)
    assert (paired[:12] == paired[12:]).all() and set(paired) == set(range(FOLDS))
    assert folds(Design(4, 40)) is None


def test_a_direction_over_many_columns_is_learnt(rng):
    columns = rng.standard_normal((80, 50))
    columns[:40] += 0.6 * rng.choice([-1, 1], 50)
    assert held_out_auroc(columns, Design(40, 40), by_all) > 0.85


def average_on_noise(how, rng, sets: int = 20) -> float:
    """Held-out AUROC where there is nothing to learn, over fresh documents; a standard deviation of about 0.02."""
    return float(np.mean([held_out_auroc(rng.poisson(0.5, (60, 400)).astype(float), Design(30, 30), how) for _ in range(sets)]))


@pytest.mark.parametrize("how", [by_all, by_best, by_words])
def test_noise_is_not_learnt_although_there_are_more_columns_than_documents(how, rng):
    assert abs(average_on_noise(how, rng) - 0.5) < 0.1


def test_noise_would_be_learnt_if_the_column_were_chosen_on_the_documents_that_are_judged(rng):
    def leaking(columns: csr_array, _part: Part, judged: np.ndarray) -> np.ndarray:
        return by_best(columns, Part(np.arange(60), Design(30, 30), np.zeros(60, dtype=int)), judged)

    assert average_on_noise(leaking, rng) > 0.65


@pytest.mark.parametrize("sizes", [(6, 5), (9, 5), (5, 9), (14, 6), (7, 40)])
def test_what_tells_nothing_has_an_auroc_of_a_half_for_sets_of_any_size(sizes):
    for how in (by_all, by_best):
        assert held_out_auroc(np.ones((sum(sizes), 1)), Design(*sizes), how) == 0.5


def test_a_constant_added_to_every_column_changes_nothing_for_all_columns(rng, monkeypatch):
    monkeypatch.setattr(probes, "STRENGTHS", (3.0,))
    columns = rng.standard_normal((60, 20))
    columns[:, 3] = 0.0
    columns[:30] += 0.5 * rng.choice([-1, 1], 20)
    fold = np.arange(60) % FOLDS
    learnt, judged = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    part = Part(learnt, Design(24, 24), fold[learnt])
    found, moved = (by_all(csr_array(columns + offset), part, judged) for offset in (0, 1000 * rng.standard_normal(20) + 0.1))
    assert np.allclose(found, moved, atol=1e-3 * np.abs(found).max())


def test_the_best_column_is_chosen_with_its_direction(rng):
    columns = rng.standard_normal((60, 20))
    columns[:30, 7] -= 10
    assert held_out_auroc(columns, Design(30, 30), by_best) == 1


def test_a_word_is_learnt(rng):
    counts = rng.poisson(1.0, (60, 30)).astype(float)
    counts[:30, 4], counts[30:, 4] = 3, 0
    assert held_out_auroc(counts, Design(30, 30), by_words) > 0.95


def test_few_coordinates_give_the_same_regression_as_all_columns(rng, monkeypatch):
    monkeypatch.setattr(probes, "STRENGTHS", (3.0,))  # of several, rounding may choose another where two are as good
    columns = rng.standard_normal((40, 90))
    columns[:20] += 0.3
    design, fold = Design(20, 20), np.arange(40) % FOLDS
    learnt, judged = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    part = Part(learnt, Design(16, 16), fold[learnt])
    scaled = StandardScaler().fit(columns[learnt]).transform(columns)
    scaled /= np.sqrt((scaled[learnt] ** 2).sum(1).mean())
    regression = LogisticRegression(C=3.0, max_iter=20_000, tol=1e-8)
    expected = regression.fit(scaled[learnt], design.in_a[learnt]).decision_function(scaled[judged])
    assert np.allclose(by_all(csr_array(columns), part, judged), expected, atol=0.02 * np.abs(expected).max())


def test_one_classifier_beats_another_only_if_the_whole_interval_says_so(rng):
    design = Design(40, 40)
    good, fair = design.in_a + rng.normal(0, 0.1, 80), design.in_a + rng.normal(0, 3, 80)
    table, drawn = judged_by({"own": good, "same": good, "fair": fair}, design)
    assert table.filter(pl.col("by") == "own")["auroc"].item() > 0.99
    gains = compared(drawn, ("own",))
    assert gains["against"].to_list() == ["same", "fair"] and gains["beats"].to_list() == [False, True]
    assert gains["gain"][0] == 0 and gains["low"][1] > 0


def test_intervals_of_pairs_resample_pairs(rng):
    design = Design(30, 30, pairs=True)
    offset = rng.normal(0, 3, 30)
    score = np.concatenate([offset + 1, offset])
    ((_, _, low, high),) = judged_by({"own": score}, design)[0].rows()
    ((_, _, low_apart, high_apart),) = judged_by({"own": score}, Design(30, 30))[0].rows()
    assert high - low < 0.75 * (high_apart - low_apart)
