import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from scopeatlas.scoring.measured import Sample, lift_cells, measure_claims, measure_correlation, measure_mean, measure_ranking

KINDS = np.array(["random", "trigger", "neighbour"])


def sample_from(rng, n: int = 100, documents: int = 25) -> Sample:
    truth = rng.random(n) < 0.5
    kind = np.where(truth, "positive", KINDS[rng.integers(0, 3, n)])
    return Sample(truth, rng.integers(0, documents, n), kind, np.where(truth, rng.integers(0, 10, n), -1))


def test_metrics_of_verdicts_are_scikit_learns(rng):
    sample = sample_from(rng)
    verdict = rng.random(100)
    said = verdict >= 0.5
    cells = measure_claims(sample, verdict, seed=0).cells
    expected = {
        "precision": precision_score(sample.truth, said),
        "recall": recall_score(sample.truth, said),
        "f1": f1_score(sample.truth, said),
        "balanced_accuracy": balanced_accuracy_score(sample.truth, said),
        "auroc": roc_auc_score(sample.truth, verdict),
        "auprc": average_precision_score(sample.truth, verdict),
    }
    for name, value in expected.items():
        assert cells[name] == pytest.approx(value) and cells[f"{name}_low"] <= value <= cells[f"{name}_high"]


def test_verdicts_of_yes_and_no_have_no_auroc_beside_their_balanced_accuracy(rng):
    sample = sample_from(rng)
    said = rng.random(100) < 0.5
    cells = measure_claims(sample, said.astype(float), seed=0).cells
    assert "auroc" not in cells and cells["auprc"] == pytest.approx(average_precision_score(sample.truth, said))


def test_negatives_are_told_apart_and_positives_by_decile(rng):
    sample = sample_from(rng)
    said = rng.random(100) < 0.5
    cells = measure_claims(sample, said.astype(float), seed=0).cells
    for kind in KINDS:
        assert cells[f"specificity_{kind}"] == pytest.approx((~said[sample.kind == kind]).mean())
        assert sample.cells()[f"negatives_{kind}"] == (sample.kind == kind).sum()
    for decile, share in enumerate(cells["recall_by_decile"]):
        mine = said[sample.decile == decile]
        assert share == (pytest.approx(mine.mean()) if len(mine) else None)


def test_documents_are_those_with_a_positive():
    sample = Sample(
        np.array([1, 1, 0, 0], bool), np.array([4, 4, 5, 4]), np.array(["positive"] * 2 + ["random"] * 2), np.arange(4)
    )
    assert sample.documents == 1 and sample.cells()["documents"] == 1 and sample.cells()["positives"] == 2


def test_a_ranking_has_no_accuracy(rng):
    sample, score = sample_from(rng), rng.normal(size=100)
    cells = measure_ranking(sample, score, seed=0).cells
    assert set(cells) == {f"{name}{part}" for name in ("auroc", "auprc") for part in ("", "_low", "_high")}
    assert cells["auroc"] == pytest.approx(roc_auc_score(sample.truth, score))


def test_a_prediction_is_correlated_over_tokens(rng):
    document = rng.integers(0, 9, 80)
    x, y = rng.random(80), rng.random(80)
    assert measure_correlation(x, y, document, seed=0).cells["correlation"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert measure_correlation(np.full(80, 3.0), y, document, seed=0).cells["correlation"] == 0


def test_a_mean_is_over_units_and_its_interval_over_documents(rng):
    document, values = np.repeat(np.arange(5), 20), np.repeat(rng.random(5), 20)
    cells = measure_mean("auroc", values, document, seed=0).cells
    assert cells["auroc"] == pytest.approx(values.mean())
    assert cells["auroc_high"] - cells["auroc_low"] > values.std() / 3  # of 100 independent units it would be far narrower


def test_a_lift_is_drawn_on_the_same_documents_for_both_arms(rng):
    sample = sample_from(rng, 400, 60)
    good, bad = np.where(rng.random(400) < 0.9, sample.truth, ~sample.truth), rng.random(400) < 0.5
    own, control = (measure_claims(sample, said.astype(float), seed=0) for said in (good, bad))
    cells = lift_cells(own, control, documents=sample.documents)
    assert cells["lift"] == pytest.approx(own.cells["balanced_accuracy"] - control.cells["balanced_accuracy"])
    assert cells["lift_low"] <= cells["lift"] <= cells["lift_high"] and cells["lift_low"] > 0 and cells["p_value"] < 0.01
    same = lift_cells(own, own, documents=sample.documents)
    assert (same["lift"], same["lift_low"], same["lift_high"], same["p_value"]) == (0, 0, 0, 1)


def test_windows_of_positives_alone_measure_nothing_but_recall_of_each_decile(rng):
    n = 20
    sample = Sample(np.ones(n, bool), np.arange(n), np.array(["positive"] * n), np.zeros(n, int))
    cells = measure_claims(sample, np.ones(n), seed=0).cells
    assert cells["balanced_accuracy"] is None and cells["f1"] is None and cells["recall_by_decile"][0] == 1
