"""Words as a baseline, and features at matched vocabulary, against loops over tokens."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import binom

from scopeatlas.activations.probe import TextActivations
from scopeatlas.study.keywords import at_matched_vocabulary, per_token, word_counts
from scopeatlas.study.permutation import Design, max_t


def reading(tokens: list[str], values: np.ndarray, roles: list[str] | None = None) -> TextActivations:
    """values: [tokens, F], 0 where nothing fires."""
    position, feature = values.nonzero()
    says = tuple(roles or ["text"] * len(tokens))
    return TextActivations(
        tokens, says, feature.astype(np.uint32), position.astype(np.int32), values[position, feature].astype(np.float32)
    )


def random_readings(rng: np.random.Generator, documents: int, features: int) -> list[TextActivations]:
    """Tokens of a few kinds, some of which are the chat template's."""
    found = []
    for _ in range(documents):
        tokens = rng.choice(list("abcdefgh"), rng.integers(3, 15)).tolist()
        roles = ["user", *rng.choice(["user", "template"], len(tokens) - 1).tolist()]
        values = np.where(rng.random((len(tokens), features)) < 0.4, rng.lognormal(size=(len(tokens), features)), 0)
        values[[role == "template" for role in roles]] = 0
        found.append(reading(tokens, values, roles))
    return found


def by_hand(readings: list[TextActivations], design: Design, feature: int) -> float:
    """The Mantel-Haenszel difference over tokens as strata, a token of a text of n weighing 1 / n."""
    sums: dict[tuple[str, bool], list[float]] = {}
    for number, one in enumerate(readings):
        fired = {int(p): float(v) for f, p, v in zip(one.feature, one.position, one.value, strict=True) if f == feature}
        weight = 1 / sum(role != "template" for role in one.roles)
        for place, (token, role) in enumerate(zip(one.tokens, one.roles, strict=True)):
            if role != "template":
                cell = sums.setdefault((token, number < design.a), [0.0, 0.0])
                cell[0] += weight
                cell[1] += weight * fired.get(place, 0.0)
    total = 0.0
    for token in {token for token, _ in sums}:
        if (token, True) in sums and (token, False) in sums:
            (n_a, s_a), (n_b, s_b) = sums[token, True], sums[token, False]
            total += n_a * n_b / (n_a + n_b) * (s_a / n_a - s_b / n_b)
    return total * (1 / design.a + 1 / design.b)


@pytest.mark.parametrize("design", [Design(6, 6), Design(3, 8)])
def test_what_is_left_at_equal_words_is_the_mantel_haenszel_difference(design, rng):
    readings = random_readings(rng, design.documents, 7)
    features = rng.permutation(7)[:4]
    left = at_matched_vocabulary(readings, design, features).toarray()
    difference = left[: design.a].mean(0) - left[design.a :].mean(0)
    assert np.allclose(difference, [by_hand(readings, design, feature) for feature in features], atol=1e-9)


def test_a_feature_that_only_reads_a_word_has_nothing_left(rng):
    tokens = [["bank", *rng.choice(["a", "b"], 5).tolist()] if i < 5 or i == 9 else list("abab") for i in range(10)]
    values = [np.array([[1.3, float(rng.lognormal())] if token == "bank" else [0.0, 0.0] for token in text]) for text in tokens]
    left = at_matched_vocabulary([reading(*both) for both in zip(tokens, values, strict=True)], Design(5, 5), np.array([0, 1]))
    assert not left.toarray()[:, 0].any() and left.toarray()[:, 1].any()


def test_a_feature_that_reads_a_word_now_and_then_differs_and_has_nothing_left_that_is_significant(rng):
    design, raw, left = Design(12, 12), 0, 0
    for seed in range(100):
        tokens = [
            ["bank" if rng.random() < (0.6 if i < 12 else 0.1) else "a" for _ in range(rng.integers(6, 20))] for i in range(24)
        ]
        fires = [
            np.array([[rng.lognormal() if token == "bank" and rng.random() < 0.7 else 0.0] for token in text]) for text in tokens
        ]
        readings = [reading(*both) for both in zip(tokens, fires, strict=True)]
        whole = csr_array(np.array([of_text.mean(axis=0) for of_text in fires]))
        rest = at_matched_vocabulary(readings, design, np.array([0]))
        raw, left = (
            count + (max_t(values, design, permutations=99, seed=seed)["p"][0] <= 0.05)
            for count, values in ((raw, whole), (left, rest))
        )
    assert raw > 80 and left <= binom.isf(1e-5, 100, 0.05)


def test_a_feature_that_fires_on_the_same_words_in_one_set_only_keeps_its_difference(rng):
    tokens = [list("abcd")] * 12
    values = [np.full((4, 1), float(rng.lognormal()) if i < 6 else 0.0) for i in range(12)]
    readings = [reading(*both) for both in zip(tokens, values, strict=True)]
    left = at_matched_vocabulary(readings, Design(6, 6), np.array([0])).toarray()[:, 0]
    means = np.array([of_text.mean() for of_text in values])
    assert left[:6].mean() - left[6:].mean() == pytest.approx(means[:6].mean() - means[6:].mean(), rel=1e-6)


def test_words_that_only_one_set_has_say_nothing(rng):
    tokens = [["x"]] * 4 + [["y"]] * 4
    readings = [reading(text, rng.lognormal(size=(1, 1))) for text in tokens]
    assert not at_matched_vocabulary(readings, Design(4, 4), np.array([0])).nnz


def test_words_are_counted_with_punctuation_and_case():
    words, counts = word_counts(
        ["Is it? It is.", [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Why"}], ""]
    )
    assert words == [".", "?", "Is", "It", "Why", "is", "it"]
    assert counts.toarray().tolist() == [[1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert per_token(counts).toarray()[1].tolist() == [0, pytest.approx(1 / 3), 0, 0, pytest.approx(2 / 3), 0, 0]
    assert not per_token(counts).toarray()[2].any()
