import math

import numpy as np
import pytest
from scipy import stats

from scopeatlas.scoring.sequential import GRID, accuracy_bounds, decide, q_values


def alike(generator, recall, rejecting, documents):
    """A judge's answers on one window of each kind a document: right or wrong together wherever that can be."""
    luck = generator.random(documents)
    return (luck < recall).astype(float), (luck < rejecting).astype(float)


def of_three(generator, recall, rejecting, documents):
    """Three windows of each kind a document, fewer than half of the documents having both kinds."""
    hits, rejections = generator.binomial(3, recall, documents) / 3, generator.binomial(3, rejecting, documents) / 3
    kind = generator.random(documents)
    return np.where(kind < 0.35, np.nan, hits), np.where(kind > 0.75, np.nan, rejections)


def graded(generator, recall, rejecting, documents):
    """Verdicts anywhere between no and yes."""
    return tuple(generator.beta(2 * mean, 2 * (1 - mean), documents) for mean in (recall, rejecting))


@pytest.mark.parametrize("draw", [alike, of_three, graded])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.97, 0.2), (0.8, 0.7)])
def test_balanced_accuracy_is_within_all_bounds_in_95_of_100_runs_however_often_one_looks(draw, rates):
    """Bounds after all documents are those that held after each of them: what was once out stays out."""
    generator = np.random.default_rng(7)
    missed = 0
    for _ in range(100):
        low, high = accuracy_bounds(*draw(generator, *rates, 30))
        missed += not low <= np.mean(rates) <= high
    assert missed <= 5


def fortunes(hits, rejections, recall: float, rejecting: float, alpha: float) -> float:
    """The most that either gambler ever had against one pair of means, spelled out."""
    above = below = best = 1.0
    values, true, seen = (hits, rejections), (recall, rejecting), ([], [])
    bets_made = 0
    for document in range(len(hits)):
        there = [of for of in (0, 1) if not math.isnan(values[of][document])]
        bets_made += len(there)
        up = down = 1.0
        for of in there:
            averages = [(0.5 + sum(seen[of][: i + 1])) / (i + 2) for i in range(len(seen[of]))]
            variance = (0.25 + sum((x - m) ** 2 for x, m in zip(seen[of], averages, strict=True))) / (len(seen[of]) + 1)
            bet = math.sqrt(2 * math.log(2 / alpha) / (variance * bets_made * math.log(bets_made + 1)))
            gain = values[of][document] - true[of]
            up += min(bet, 0.75 / len(there) / true[of]) * gain
            down -= min(bet, 0.75 / len(there) / (1 - true[of])) * gain
            seen[of].append(values[of][document])
        above, below = above * up, below * down
        best = max(best, above, below)
    return best


def test_a_pair_of_rates_is_out_once_betting_against_it_has_paid(rng):
    """The bounds are those of the pairs on a grid that are left, one step wider."""
    for documents in (1, 6, 17):
        hits, rejections = of_three(rng, 0.9, 0.8, documents)
        grid = np.arange(1, GRID, 7) / GRID
        left = [(r + t) / 2 for r in grid for t in grid if fortunes(hits.tolist(), rejections.tolist(), r, t, 0.1) / 2 < 10]
        low, high = accuracy_bounds(hits, rejections, alpha=0.1)
        assert low - 1e-9 <= min(left) <= low + 8 / GRID and high - 8 / GRID <= max(left) <= high + 1e-9


def test_bounds_never_widen_and_begin_with_everything(rng):
    hits, rejections = of_three(rng, 0.8, 0.6, 40)
    bounds = np.array([accuracy_bounds(hits[:n], rejections[:n]) for n in range(41)])
    assert bounds[0].tolist() == [0, 1]
    assert (np.diff(bounds[:, 0]) >= 0).all() and (np.diff(bounds[:, 1]) <= 0).all()
    assert (bounds[:, 0] < bounds[:, 1]).all()


def test_bounds_close_in_on_balanced_accuracy(rng):
    hits, rejections = graded(rng, 0.9, 0.5, 600)
    few, many = (np.ptp(accuracy_bounds(hits[:n], rejections[:n])) for n in (10, 600))
    assert many < 0.2 and few > 0.35  # 0.11 and 0.47, each give or take 0.02


def test_values_that_never_vary_do_not_break_it():
    for recall, rejecting in ((0, 0), (1, 1), (1, 0), (0.5, 0.5)):
        low, high = accuracy_bounds(np.full(400, recall), np.full(400, rejecting))
        assert low <= (recall + rejecting) / 2 <= high and high - low < (0.25 if recall != rejecting else 0.1)


def test_nothing_answered_leaves_everything_open():
    assert accuracy_bounds(np.array([np.nan]), np.array([np.nan])) == (0, 1)


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
    """Three windows a document, for all of which the judge says the same. Bounds never widen, so the last look counts."""
    generator = np.random.default_rng(11)
    called = 0
    for _ in range(200):
        document = np.arange(90) // 3
        fires = generator.random(90) < 0.5
        says = np.repeat(generator.random(30) < 0.5, 3).astype(float)
        called += decide(document, fires, says, used_up=False).reason == "above_chance"
    assert called <= 10


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
