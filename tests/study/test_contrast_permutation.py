"""The permutation test, against formulations that enumerate and loop in float64."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array
from scipy.stats import binom

from scopeatlas.errors import ConfigError
from scopeatlas.study.permutation import Design, effects, max_t, statistic, worth_testing


def sparse_values(rng: np.random.Generator, documents: int, columns: int, density: float = 0.5) -> np.ndarray:
    return np.where(rng.random((documents, columns)) < density, rng.lognormal(size=(documents, columns)), 0.0)


def all_differences(values: np.ndarray, design: Design) -> np.ndarray:
    """The difference of means of every column under every arrangement, the observed one first: [arrangements, F]."""
    a, n = design.a, design.documents
    if design.pairs:
        moved = values[:a] - values[a:]
        return np.array([(moved * np.array(signs)[:, None]).mean(0) for signs in product((1, -1), repeat=a)])
    others = [[i for i in range(n) if i not in chosen] for chosen in combinations(range(n), a)]
    return np.array([np.delete(values, rest, 0).mean(0) - values[rest].mean(0) for rest in others])


def by_hand(values: np.ndarray, design: Design, *, tie: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, p and step-down adjusted p as defined: z in units of the difference's own standard deviation over all arrangements,
    two of which are as large if they are within `tie`."""
    every = all_differences(values, design)
    z = np.abs(every / every.std(0))
    p = (z >= z[0] - tie).mean(0)
    order, adjusted, so_far = np.argsort(-z[0]), np.empty(len(p)), 0.0
    for place, column in enumerate(order):
        largest = z[:, order[place:]].max(1)
        so_far = max(so_far, (largest >= z[0, column] - tie).mean())
        adjusted[column] = so_far
    return (every / every.std(0))[0], p, adjusted


@pytest.mark.parametrize("design", [Design(4, 4), Design(3, 6), Design(8, 8, pairs=True)], ids=["even", "uneven", "pairs"])
def test_few_documents_are_tested_exactly(design, rng):
    values = sparse_values(rng, design.documents, 300)
    values = values[:, np.ptp(all_differences(values, design), axis=0) > 0]
    found = max_t(csr_array(values), design)
    z, *least = by_hand(values, design, tie=1e-9)
    _, *most = by_hand(values, design, tie=2e-4)  # float32 is given so much
    assert np.allclose(found["z"], z, atol=1e-5)
    for name, low, high in zip(("p", "p_adjusted"), least, most, strict=True):
        assert (low - 1e-9 <= found[name].to_numpy()).all() and (found[name].to_numpy() <= high + 1e-9).all()
    assert np.mean(np.concatenate(most) - np.concatenate(least)) < 1e-3


def test_random_permutations_come_close_to_all(rng):
    design, values = Design(6, 6), sparse_values(rng, 12, 5)
    exact = max_t(csr_array(values), design)
    drawn = max_t(csr_array(values), design, permutations=800)  # of 923
    for name in ("p", "p_adjusted"):
        share = exact[name].to_numpy()
        assert (np.abs(drawn[name].to_numpy() - share) < 6 * np.sqrt(share / 800) + 2 / 800).all()


def test_a_column_that_never_varies_does_not_differ(rng):
    values = np.concatenate([np.full((20, 1), 0.1), np.zeros((20, 1)), rng.lognormal(size=(20, 1))], axis=1)
    for design in (Design(10, 10), Design(10, 10, pairs=True)):
        found = max_t(csr_array(values), design, permutations=200)
        assert found["z"].to_list()[:2] == [0, 0] and found["p"].to_list()[:2] == [1, 1]


@pytest.mark.parametrize("design", [Design(3, 3), Design(2, 5), Design(4, 2), Design(5, 5, pairs=True)])
def test_no_column_can_have_a_smaller_p_value_than_is_said(design, rng):
    for units in range(1, design.units + 1):
        bound = design.smallest_p(units)
        least = 1.0
        for _ in range(20):
            values = np.zeros((design.documents, 8))
            for column in values.T:
                column[rng.permutation(design.units)[:units]] = rng.lognormal(size=units)
            every = np.abs(all_differences(values, design))
            least = min(least, (every >= every.max(0) - 1e-9).mean(0).min())
        assert least >= bound - 1e-9
        if units <= min(design.a, design.b):
            assert least == pytest.approx(bound)


def test_columns_that_could_not_reach_alpha_are_not_tested():
    values = np.zeros((20, 10))
    for column in range(10):
        values[: column + 1, column] = 1.0
    # 2 * C(20 - 5, 10 - 5) / C(20, 10) = 0.033, and with four documents 0.087
    assert worth_testing(csr_array(values), Design(10, 10), 0.05).tolist() == [4, 5, 6, 7, 8, 9]
    same = np.concatenate([values[:10], values[:10]])  # nothing differs within a pair
    assert not len(worth_testing(csr_array(same), Design(10, 10, pairs=True), 0.05))
    # pairs: 2 * 2^-6 = 0.031, and with five that differ 0.063
    assert worth_testing(csr_array(values), Design(10, 10, pairs=True), 0.05).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("pairs", [False, True])
def test_of_sets_that_do_not_differ_few_report_anything(pairs, rng):
    design, reported, uncorrected = Design(14, 14, pairs), 0, 0
    for _ in range(200):
        shared = rng.lognormal(size=(28, 4)) @ rng.random((4, 150))  # columns that depend on each other
        values = csr_array(np.concatenate([sparse_values(rng, 28, 150, 0.3), shared * sparse_values(rng, 28, 150)], axis=1))
        chosen = worth_testing(values, design, 0.05)
        found = max_t(csr_array(values[:, chosen]), design, permutations=199, seed=int(rng.integers(1 << 30)))
        reported += found["p_adjusted"].min() <= 0.05
        uncorrected += found["p"].min() <= 0.05
    assert reported <= binom.isf(1e-5, 200, 0.05) and uncorrected > 190


def test_planted_differences_are_found_among_16384_features(rng):
    design = Design(40, 40)
    values = random_array((80, 16_384), density=0.1, rng=rng, data_sampler=rng.standard_exponential).tolil()
    for column in range(10):
        fires = np.concatenate([rng.random(40) < 0.8, rng.random(40) < 0.05])
        values[:, [column]] = (fires * rng.uniform(0.5, 1.5, 80))[:, None]
    values = csr_array(values)
    chosen = worth_testing(values, design, 0.05)
    found = max_t(csr_array(values[:, chosen]), design, permutations=2000)
    adjusted = dict(zip(chosen.tolist(), found["p_adjusted"], strict=True))
    assert len(chosen) > 10_000 and all(adjusted[column] <= 0.05 for column in range(10))


def test_a_feature_of_one_document_cannot_blow_up(rng):
    values = np.zeros((60, 1))
    values[0] = 1e6
    assert abs(statistic(csr_array(values), Design(30, 30))[0]) == pytest.approx(1, abs=1e-3)
    assert abs(statistic(csr_array(values), Design(30, 30, pairs=True))[0]) == pytest.approx(1)


@pytest.mark.parametrize("pairs", [False, True])
def test_effects_and_their_intervals_are_those_of_a_bootstrap_over_documents(pairs, rng):
    design, values = Design(30, 30, pairs), rng.lognormal(size=(60, 3)) + np.arange(60)[:, None] * 0.01
    if pairs:
        values[30:] += 2 * values[:30]  # what a bootstrap that breaks the pairs would not see
    found = effects(csr_array(values), design)

    def effect(rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        a, b = values[rows_a], values[rows_b]
        return (a.mean(0) - b.mean(0)) / np.concatenate([a, b]).std(0, ddof=1)

    assert np.allclose(found["effect"], effect(np.arange(30), np.arange(30, 60)))
    draws = []
    for _ in range(2000):
        first, second = rng.integers(0, 30, 30), rng.integers(30, 60, 30)
        draws.append(effect(first, first + 30 if pairs else second))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    for name, bound in (("low", low), ("high", high)):
        assert (np.abs(found[name].to_numpy() - bound) < 0.25 * (high - low)).all()


def test_two_sets_wholly_apart_differ_by_two_standard_deviations():
    values = np.array([[1.0]] * 50 + [[0.0]] * 50)
    row = effects(csr_array(values), Design(50, 50)).row(0, named=True)
    assert row["effect"] == pytest.approx(2, rel=0.01) and (row["mean_a"], row["mean_b"]) == (1, 0)
    assert (row["docs_a"], row["docs_b"]) == (50, 0) and row["low"] == pytest.approx(row["high"])


def test_a_seed_gives_the_same_answer_again(rng):
    values, design = csr_array(sparse_values(rng, 40, 30)), Design(20, 20)
    assert max_t(values, design, permutations=100, seed=3).equals(max_t(values, design, permutations=100, seed=3))
    assert not max_t(values, design, permutations=100, seed=3).equals(max_t(values, design, permutations=100, seed=4))


def test_designs_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="two documents in each set at least, not 1 and 5"):
        Design(1, 5)
    with pytest.raises(ConfigError, match="two sets of one length, not 4 and 5"):
        Design(4, 5, pairs=True)
