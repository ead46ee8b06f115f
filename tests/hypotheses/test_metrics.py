import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, balanced_accuracy_score, cohen_kappa_score, roc_auc_score

from scopeatlas.hypotheses.metrics import (
    CLAIM_METRICS,
    DocumentCounts,
    auprc,
    auroc,
    bootstrap_intervals,
    cohens_kappa,
    constant_f1,
    correlation,
    interval,
    lift,
    lift_of,
    metrics,
    paired_lift,
    point_metrics,
    unit_weights,
)


def random_counts(rng, features: int = 20, documents: int = 15) -> tuple[DocumentCounts, list[list[list[tuple[bool, bool]]]]]:
    """Counts, and the (claimed, fired) pair of every unit of every document of every feature that they count."""
    units = [
        [
            [(bool(rng.random() < 0.2), bool(rng.random() < 0.1 * (f % 4))) for _ in range(rng.integers(1, 30))]
            for _ in range(documents)
        ]
        for f in range(features)
    ]

    def count(of) -> np.ndarray:
        return np.array([[sum(of(c, f) for c, f in document) for document in feature] for feature in units], dtype=np.float64)

    counts = DocumentCounts(count(lambda c, f: c and f), count(lambda c, f: c), count(lambda c, f: f), count(lambda c, f: 1))
    return counts, units


def ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def test_metrics_equal_brute_force_over_units(rng):
    counts, units = random_counts(rng)
    found = point_metrics(counts)
    for i, feature in enumerate(units):
        pairs = [pair for document in feature for pair in document]
        hits, claimed, fired = sum(c and f for c, f in pairs), sum(c for c, _ in pairs), sum(f for _, f in pairs)
        quiet = [c for c, f in pairs if not f]
        precision, recall = ratio(hits, claimed), ratio(hits, fired)
        assert found.precision[i] == pytest.approx(precision) and found.recall[i] == pytest.approx(recall)
        assert found.f1[i] == pytest.approx(ratio(2 * precision * recall, precision + recall))
        assert found.balanced_accuracy[i] == pytest.approx((recall + ratio(quiet.count(False), len(quiet))) / 2)


def test_balanced_accuracy_and_auprc_of_a_claim_are_scikit_learns(rng):
    counts, units = random_counts(rng)
    found = point_metrics(counts)
    for i, feature in enumerate(units):
        claimed, fired = (np.array(part) for part in zip(*(pair for document in feature for pair in document), strict=True))
        if fired.any():
            assert found.balanced_accuracy[i] == pytest.approx(balanced_accuracy_score(fired, claimed))
            assert found.auprc[i] == pytest.approx(average_precision_score(fired, claimed))


def test_a_claim_that_matches_nothing_has_precision_0_and_no_warning(recwarn):
    found = metrics(*(np.array([n], dtype=np.float64) for n in (0, 0, 5, 10)))
    assert (found.precision, found.recall, found.f1, found.balanced_accuracy, found.auprc) == (0, 0, 0, 0.5, 0.5)
    assert not recwarn.list


def test_the_constant_claim_is_at_chance(rng):
    counts, _ = random_counts(rng)
    found, fires = point_metrics(counts.constant()), counts.fired.sum(1) > 0
    assert np.allclose(found.balanced_accuracy[fires], 0.5)
    assert np.allclose(found.f1, constant_f1(counts.fired.sum(1), counts.units.sum(1)))


def test_lift_is_1_for_the_truth_and_0_for_the_claim_that_everything_fires(rng):
    fired, units = rng.integers(1, 50, 30).astype(np.float64), np.full(30, 60.0)
    assert np.allclose(lift(np.ones(30), fired, units), 1)
    everything = metrics(fired, units, fired, units).f1
    assert np.allclose(everything, constant_f1(fired, units)) and np.allclose(lift(everything, fired, units), 0)
    assert (lift(everything - 0.1, fired, units) < 0).all()


def test_intervals_hold_the_point_and_are_the_same_on_every_call(rng):
    counts, _ = random_counts(rng)
    point, intervals, fires = point_metrics(counts), bootstrap_intervals(counts), counts.fired.sum(1) > 0
    assert set(intervals) == set(CLAIM_METRICS)
    for name, bounds in intervals.items():
        assert bounds.shape == (20, 2) and (bounds[fires, 0] <= bounds[fires, 1]).all() and np.isnan(bounds[~fires]).all()
        inside = (bounds[:, 0] - 0.05 <= getattr(point, name)) & (getattr(point, name) <= bounds[:, 1] + 0.05)
        assert inside[fires].all()
        assert np.array_equal(bootstrap_intervals(counts)[name], bounds, equal_nan=True)


def test_intervals_agree_with_a_bootstrap_written_as_a_loop(rng):
    counts, _ = random_counts(rng, features=4, documents=40)
    found = bootstrap_intervals(counts, draws=2000)["f1"]
    drawn = []
    for _ in range(2000):
        at = rng.integers(0, 40, 40)
        hits, claimed, fired = (part[:, at].sum(1) for part in (counts.true_positive, counts.claimed, counts.fired))
        drawn.append(2 * hits / np.maximum(claimed + fired, 1))
    fires = counts.fired.sum(1) > 0
    assert np.allclose(found[fires], np.percentile(drawn, [2.5, 97.5], axis=0).T[fires], atol=0.03)


def test_an_interval_covers_the_truth_about_as_often_as_it_says(rng):
    trials, documents, truth = 300, 60, 0.6
    fired = np.full((trials, documents), 10.0)
    hits = rng.binomial(10, np.clip(rng.normal(truth, 0.15, (trials, documents)), 0, 1)).astype(np.float64)
    counts = DocumentCounts(hits, hits, fired, fired * 10)
    low, high = bootstrap_intervals(counts)["recall"].T
    assert 0.88 <= ((low <= truth) & (truth <= high)).mean() <= 0.99


def test_intervals_widen_when_the_same_units_come_from_fewer_documents(rng):
    hits = rng.integers(0, 11, (1, 200)).astype(np.float64)
    many = DocumentCounts(hits, hits, np.full((1, 200), 10.0), np.full((1, 200), 100.0))
    order = np.argsort(hits[0])  # units of one document are alike
    few = DocumentCounts(*(part[:, order].reshape(1, 10, 20).sum(2) for part in many.parts))
    assert np.ptp(bootstrap_intervals(few)["recall"]) > 1.5 * np.ptp(bootstrap_intervals(many)["recall"])
    assert point_metrics(few).recall == pytest.approx(point_metrics(many).recall)


def test_a_draw_without_a_firing_says_nothing_about_a_feature_of_one_document():
    once = np.array([[4.0] + [0.0] * 9])
    assert np.array_equal(bootstrap_intervals(DocumentCounts(once, once, once, np.full((1, 10), 20.0)))["recall"], [[1, 1]])


def test_a_paired_lift_is_narrower_than_the_two_intervals_taken_apart(rng):
    documents = 60
    fired, units = np.full((1, documents), 10.0), np.full((1, documents), 100.0)
    hits = rng.integers(3, 10, (1, documents)).astype(np.float64)  # both claims are good and bad on the same documents
    own, control = DocumentCounts(hits, hits, fired, units), DocumentCounts(hits - 2, hits - 2, fired, units)
    found = paired_lift(own, control)
    assert found.value == pytest.approx(0.1) and found.low <= found.value <= found.high
    apart = np.ptp(bootstrap_intervals(own)["balanced_accuracy"]) + np.ptp(bootstrap_intervals(control)["balanced_accuracy"])
    assert (found.high - found.low)[0] < 0.25 * apart
    assert found.p_value < 0.01 and paired_lift(control, own).p_value > 0.99


def test_p_values_of_two_claims_that_are_equally_good_are_rarely_small(rng):
    trials, documents = 400, 50
    fired, units = np.full((trials, documents), 5.0), np.full((trials, documents), 60.0)
    one, other = (rng.binomial(5, 0.5, (trials, documents)).astype(np.float64) for _ in range(2))
    p = paired_lift(DocumentCounts(one, one, fired, units), DocumentCounts(other, other, fired, units)).p_value
    assert 0.01 <= (p <= 0.05).mean() <= 0.11 and 0.4 <= p.mean() <= 0.6  # shares beyond: once in 100,000 runs


@pytest.mark.parametrize("documents", [1, 3, 6])
def test_few_documents_never_give_a_small_p_value(documents):
    found = lift_of(np.array([0.5]), np.full((1, 1000), 0.5), documents=np.array([documents]))
    assert found.p_value == pytest.approx(0.5**documents)


def random_units(rng, n: int = 60):
    score = np.round(rng.normal(size=n), 1)  # so that there are ties
    positive = rng.random(n) < 0.4
    return score, positive, rng.integers(0, 12, n)


def test_weighted_auroc_and_auprc_are_scikit_learns(rng):
    score, positive, document = random_units(rng)
    weights = unit_weights(document, draws=40)
    found_roc, found_pr = auroc(score, positive, weights), auprc(score, positive, weights)
    for draw, column in enumerate(weights.T):
        assert found_roc[draw] == pytest.approx(roc_auc_score(positive, score, sample_weight=column))
        assert found_pr[draw] == pytest.approx(average_precision_score(positive, score, sample_weight=column))


def test_weighted_correlation_is_scipys_of_the_units_repeated(rng):
    x, y, document = rng.normal(size=50), rng.normal(size=50), rng.integers(0, 8, 50)
    weights = unit_weights(document, draws=20)
    for found, column in zip(correlation(x, y, weights), weights.T, strict=True):
        repeated = np.repeat(np.arange(50), column.astype(int))
        assert found == pytest.approx(stats.pearsonr(x[repeated], y[repeated]).statistic)


def test_a_constant_answer_ranks_at_chance_and_correlates_with_nothing(rng):
    _, positive, document = random_units(rng)
    weights, same = unit_weights(document, draws=5), np.full(len(positive), 0.3)
    assert np.allclose(auroc(same, positive, weights), 0.5)
    assert np.isnan(correlation(same, positive, weights)).all()


def test_draws_without_a_pair_are_left_out_of_the_interval():
    score, positive = np.array([2.0, 1.0, 0.5]), np.array([True, False, False])
    weights = unit_weights(np.array([0, 1, 2]), draws=200)
    drawn = auroc(score, positive, weights)
    assert np.isnan(drawn).any() and np.array_equal(interval(drawn[None]), [[1, 1]])
    assert np.isnan(interval(np.full((1, 5), np.nan))).all()


def test_weights_resample_whole_documents(rng):
    document = rng.integers(0, 10, 40)
    weights = unit_weights(document, draws=30)
    assert (weights[:, 0] == 1).all()
    for name in np.unique(document):
        assert (weights[document == name] == weights[document == name][0]).all()
    first = [np.flatnonzero(document == name)[0] for name in np.unique(document)]
    assert (weights[first].sum(0) == len(first)).all()


def test_kappa_is_scikit_learns(rng):
    one, other = rng.random(80) < 0.4, rng.random(80) < 0.6
    assert cohens_kappa(one, other) == pytest.approx(cohen_kappa_score(one, other))
    assert cohens_kappa(one, one) == 1 and cohens_kappa(np.ones(5, dtype=bool), np.ones(5, dtype=bool)) == 1
