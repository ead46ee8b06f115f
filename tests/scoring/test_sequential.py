import math

import numpy as np
import pytest
from scipy import stats

from scopeatlas.scoring.sequential import GRID, confidence_sequence, decide, q_values

STEP = 1 / GRID


def beta(generator, mean, size):
    return generator.beta(2 * mean, 2 * (1 - mean), size)


def bernoulli(generator, mean, size):
    return (generator.random(size) < mean).astype(float)


def of_three(generator, mean, size):
    """What three windows of a document give: thirds."""
    return generator.binomial(3, mean, size) / 3


@pytest.mark.parametrize("draw", [beta, bernoulli, of_three])
@pytest.mark.parametrize("mean", [0.1, 0.5, 0.8, 0.97])
def test_the_mean_stays_within_all_bounds_in_95_of_100_runs_however_often_one_looks(draw, mean):
    values = draw(np.random.default_rng(7), mean, (300, 60))
    missed = 0
    for row in values:
        bounds = confidence_sequence(row)
        missed += not ((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])).all()
    assert missed / len(values) <= 0.05


def capital(values, mean: float, alpha: float) -> tuple[float, float]:
    """The two capitals at one mean after all values, spelled out from the paper's equations."""
    above = below = 1.0
    for t in range(1, len(values) + 1):
        past = values[: t - 1]
        averages = [(0.5 + sum(past[: i + 1])) / (i + 2) for i in range(len(past))]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(past, averages, strict=True))) / t
        bet = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(t + 1)))
        above *= 1 + min(bet, 0.75 / mean) * (values[t - 1] - mean)
        below *= 1 - min(bet, 0.75 / (1 - mean)) * (values[t - 1] - mean)
    return above, below


def test_a_mean_is_kept_as_long_as_betting_against_it_has_not_paid(rng):
    for size in (1, 5, 23):
        values = rng.choice([0.0, 0.25, 0.5, 1.0], size)
        low, high = confidence_sequence(values, alpha=0.1)[-1]
        for bound, inside in ((low, low + 2 * STEP), (high, high - 2 * STEP)):
            if STEP < bound < 1 - STEP:
                outside, kept = (max(max(capital(values[:t], m, 0.1)) for t in range(1, size + 1)) for m in (bound, inside))
                assert outside / 2 >= 10 > kept / 2


def test_bounds_never_widen_and_begin_with_everything(rng):
    bounds = confidence_sequence(rng.random(80))
    assert bounds.shape == (81, 2) and bounds[0].tolist() == [0, 1]
    assert (np.diff(bounds[:, 0]) >= 0).all() and (np.diff(bounds[:, 1]) <= 0).all()
    assert (bounds[:, 0] < bounds[:, 1]).all()


def test_bounds_close_in_on_the_mean(rng):
    bounds = confidence_sequence(bernoulli(rng, 0.7, 4000))
    assert np.ptp(bounds[-1]) < 0.15 < np.ptp(bounds[60])


def test_values_that_never_vary_do_not_break_it():
    for constant in (0.0, 0.5, 1.0):
        low, high = confidence_sequence(np.full(2000, constant))[-1]
        assert low <= constant <= high and high - low < 0.01


def verdicts(generator, accuracy: float, *, size: int = 100, per_document: int = 1):
    """A judge that is right with a probability, on windows of which half fire."""
    fires = generator.permutation(np.arange(size) % 2 == 0)
    right = generator.random(size) < accuracy
    return np.arange(size) // per_document, fires, np.where(right, fires, ~fires).astype(float)


def stopped(document, fires, verdict, every: int = 20):
    for seen in range(every, len(fires) + 1, every):
        decision = decide(document[:seen], fires[:seen], verdict[:seen], used_up=seen == len(fires))
        if decision.stop:
            return seen, decision
    raise AssertionError("it never stopped")


def test_a_good_label_is_settled_early_and_a_useless_one_looked_at_to_the_end():
    generator = np.random.default_rng(3)
    good = [stopped(*verdicts(generator, 0.95)) for _ in range(40)]
    useless = [stopped(*verdicts(generator, 0.5)) for _ in range(40)]
    assert all(decision.reason == "above_chance" for _, decision in good)
    assert np.mean([seen for seen, _ in good]) <= 40
    assert sum(decision.reason in {"used_up", "not_useful"} for _, decision in useless) >= 38


def test_a_label_that_is_worse_than_chance_is_given_up():
    seen, decision = stopped(*verdicts(np.random.default_rng(0), 0.05))
    assert decision.reason == "not_useful" and decision.high < 0.6 and seen < 100


def test_chance_is_called_skill_in_at_most_5_of_100_runs_when_asked_after_every_document():
    """Three windows a document that are right or wrong together, and half the documents on which the judge is lucky."""
    generator = np.random.default_rng(11)
    called = 0
    for _ in range(100):
        document = np.arange(90) // 3
        fires = generator.random(90) < 0.5
        says = np.repeat(generator.random(30) < 0.5, 3).astype(float)  # one answer for a whole document
        called += any(decide(document[:n], fires[:n], says[:n], used_up=False).reason == "above_chance" for n in range(3, 91, 3))
    assert called <= 5


def test_bounds_of_balanced_accuracy_hold_a_lopsided_judge(rng):
    """One that always says yes is at 0.5, whatever the share of windows that fire."""
    fires = rng.random(200) < 0.9
    decision = decide(np.arange(200), fires, np.ones(200), used_up=True)
    assert decision.low <= 0.5 <= decision.high and decision.reason == "used_up"
    assert (decision.documents_positive, decision.documents_negative) == (fires.sum(), (~fires).sum())


def test_many_windows_of_one_document_count_as_one():
    fires = np.repeat([True, False], 50)
    alone = decide(np.repeat([0, 1], 50), fires, fires.astype(float), used_up=False)
    apart = decide(np.arange(100), fires, fires.astype(float), used_up=False)
    assert not alone.stop and alone.high - alone.low > 0.7
    assert apart.stop and apart.documents_positive == 50 and alone.documents_positive == 1


def test_without_windows_of_a_kind_nothing_is_known_of_it():
    decision = decide(np.arange(30), np.ones(30, bool), np.ones(30), used_up=True)
    assert decision.documents_negative == 0 and decision.low < 0.5 and decision.high == 1


def step_up(p: np.ndarray, level: float) -> np.ndarray:
    """Benjamini and Hochberg's procedure itself: which tests are rejected at a level."""
    order = np.argsort(p)
    passes = [rank for rank, i in enumerate(order, 1) if p[i] <= rank * level / len(p)]
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: max(passes, default=0)]] = True
    return rejected


def test_q_values_are_the_levels_at_which_the_step_up_procedure_rejects(rng):
    p = np.r_[rng.random(60), rng.random(20) / 500, 0.25, 0.25]
    q = q_values(p)
    np.testing.assert_allclose(q, stats.false_discovery_control(p))
    for level in (0.01, 0.05, 0.3):
        assert (step_up(p, level) == (q <= level)).all()


def test_tests_that_were_not_made_do_not_count():
    q = q_values(np.array([np.nan, 0.01, np.nan, 0.04]))
    assert np.isnan(q[[0, 2]]).all()
    np.testing.assert_allclose(q[[1, 3]], [0.02, 0.04])
    assert len(q_values(np.array([]))) == 0
