import numpy as np
import pytest

from scopeatlas.hypotheses.metrics import DocumentCounts, bootstrap_intervals, constant_f1, lift, metrics, point_metrics


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


def test_a_claim_that_matches_nothing_has_precision_0_and_no_warning(recwarn):
    found = metrics(*(np.array([n], dtype=np.float64) for n in (0, 0, 5, 10)))
    assert (found.precision, found.recall, found.f1, found.balanced_accuracy) == (0, 0, 0, 0.5)
    assert not recwarn.list


def test_lift_is_1_for_the_truth_and_0_for_the_claim_that_everything_fires(rng):
    fired, units = rng.integers(1, 50, 30).astype(np.float64), np.full(30, 60.0)
    assert np.allclose(lift(np.ones(30), fired, units), 1)
    everything = metrics(fired, units, fired, units).f1
    assert np.allclose(everything, constant_f1(fired, units)) and np.allclose(lift(everything, fired, units), 0)
    assert (lift(everything - 0.1, fired, units) < 0).all()


def test_intervals_hold_the_point_and_are_the_same_on_every_call(rng):
    counts, _ = random_counts(rng)
    point, intervals = point_metrics(counts), bootstrap_intervals(counts)
    for name, interval in intervals.items():
        assert interval.shape == (20, 2) and (interval[:, 0] <= interval[:, 1]).all()
        inside = (interval[:, 0] - 0.05 <= getattr(point, name)) & (getattr(point, name) <= interval[:, 1] + 0.05)
        assert inside.all()
        assert (bootstrap_intervals(counts)[name] == interval).all()


def test_intervals_agree_with_a_bootstrap_written_as_a_loop(rng):
    counts, _ = random_counts(rng, features=4, documents=40)
    found = bootstrap_intervals(counts, draws=2000)["f1"]
    drawn = []
    for _ in range(2000):
        at = rng.integers(0, 40, 40)
        hits, claimed, fired = (part[:, at].sum(1) for part in (counts.true_positive, counts.claimed, counts.fired))
        drawn.append(2 * hits / np.maximum(claimed + fired, 1))
    assert np.allclose(found, np.percentile(drawn, [2.5, 97.5], axis=0).T, atol=0.03)


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
    few = DocumentCounts(*(part[:, order].reshape(1, 10, 20).sum(2) for part in (hits, hits, many.fired, many.units)))
    assert np.ptp(bootstrap_intervals(few)["recall"]) > 1.5 * np.ptp(bootstrap_intervals(many)["recall"])
    assert point_metrics(few).recall == pytest.approx(point_metrics(many).recall)
