import numpy as np
import pytest

from scopeatlas.atlas.ranking import fused, ranked


def test_equals_share_a_rank_and_come_by_key():
    places = ranked([("b", 0.5, 0.0), ("c", 0.9, 0.0), ("a", 0.5, 0.0), ("d", 0.1, 0.0), ("e", 0.5, 1.0)])
    assert [(key, place.rank) for key, place in places.items()] == [("c", 1), ("e", 2), ("a", 3), ("b", 3), ("d", 5)]
    assert places["e"].value == 0.5


def test_fusion_adds_reciprocal_ranks(rng):
    keys = [f"k{n}" for n in range(40)]
    scores = rng.integers(0, 12, (3, len(keys)))
    present = rng.random((3, len(keys))) < 0.6
    rankings = {str(i): ranked((key, float(scores[i, n]), 0.0) for n, key in enumerate(keys) if present[i, n]) for i in range(3)}
    expected = np.zeros(len(keys))
    for i in range(3):
        for n in range(len(keys)):
            better = sum(present[i, m] and scores[i, m] > scores[i, n] for m in range(len(keys)))
            expected[n] += present[i, n] / (60 + better + 1)
    found = dict(fused(rankings))
    assert found == pytest.approx({key: value for key, value in zip(keys, expected, strict=True) if value})
    assert list(found) == sorted(found, key=lambda key: (-found[key], key))
