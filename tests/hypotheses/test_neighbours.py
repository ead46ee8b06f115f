from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.hypotheses import neighbours
from scopeatlas.hypotheses.neighbours import Neighbours, nearest_features
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from tests.conftest import WIDTH


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def real(medium, units, subject) -> Firings:
    """The firings of a real SAE, but for those of features 3 and 4, and of feature 5 outside report documents."""
    firings = read_firings(medium.store, medium.corpus, medium.entry, subject, units, width=WIDTH)
    report = units.in_split("report")[firings.position]
    kept = ~np.isin(firings.feature, (3, 4)) & ((firings.feature != 5) | report)
    return Firings(firings.feature[kept], firings.position[kept], WIDTH, value=firings.value[kept])


@pytest.fixture(scope="module")
def dictionary(medium):
    return open_dictionary(medium.entry)


def held_in_explain(firings: Firings, units: Units) -> np.ndarray:
    held = np.zeros((firings.width, units.contexts), dtype=bool)
    explain = units.in_split("explain")[firings.position]
    held[firings.feature[explain], firings.position[explain] // units.length] = True
    return held


def assert_nearest(found: np.ndarray, similarity: np.ndarray) -> None:
    """The neighbours are those of highest similarity [F, F], down to rounding; -1 where no other has a positive one."""
    np.fill_diagonal(similarity, 0)
    for feature, near in enumerate(found):
        expected = np.sort(similarity[feature])[::-1][: len(near)]
        got = np.array([similarity[feature, n] if n >= 0 else 0.0 for n in near])
        np.testing.assert_allclose(got, np.maximum(expected, 0), atol=1e-6)
        chosen = near[near >= 0]
        assert len(set(chosen)) == len(chosen) and feature not in chosen


def expected_cosine(dictionary, alive: np.ndarray) -> np.ndarray:
    rows = torch.cat([layer.rows(slice(None)) for layer in dictionary.layers]).double().flatten(1).numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T * np.outer(alive, alive)


def expected_jaccard(held: np.ndarray) -> np.ndarray:
    similarity = np.zeros((len(held), len(held)))
    for i, one in enumerate(held):
        for j, other in enumerate(held):
            similarity[i, j] = (one & other).sum() / max((one | other).sum(), 1)
    return similarity


@pytest.mark.parametrize("tiles", [(2048, 64 << 20), (7, 1500)])
def test_neighbours_are_the_features_of_highest_cosine_and_jaccard(dictionary, real, units, monkeypatch, tiles):
    monkeypatch.setattr(neighbours, "TILE_ROWS", tiles[0])
    monkeypatch.setattr(neighbours, "TILE_BYTES", tiles[1])
    found = nearest_features(dictionary, real, units, k=4)
    held = held_in_explain(real, units)
    assert found.cosine.shape == found.coactive.shape == (WIDTH, 4)
    assert_nearest(found.cosine, expected_cosine(dictionary, held.any(axis=1)))
    assert_nearest(found.coactive, expected_jaccard(held))


def test_a_feature_that_fires_in_no_explain_document_neither_has_nor_is_a_neighbour(dictionary, real, units):
    found = nearest_features(dictionary, real, units)
    for table in (found.cosine, found.coactive):
        assert (table[3:6] == -1).all() and not np.isin(table, (3, 4, 5)).any()


def test_the_decoder_rows_of_all_outputs_count(dictionary, real, units):
    """Features 0 and 1 agree at one output and are opposite at the other, 0 and 2 agree a little at both."""
    rows = torch.zeros(WIDTH, 2, 8)
    rows[torch.arange(WIDTH), :, torch.arange(WIDTH) % 5 + 3] = 1
    rows[:2] = 0
    rows[0, :, 0], rows[1, 0, 0], rows[1, 1, 0] = 1, 1, -1
    rows[2, :, 0] = 0.5
    two_outputs = replace(dictionary, layers=(replace(dictionary.layers[0], w_dec=rows),))
    found = nearest_features(two_outputs, real, units, k=1)
    assert_nearest(found.cosine, expected_cosine(two_outputs, held_in_explain(real, units).any(axis=1)))
    assert found.cosine[0, 0] == 2


def test_co_activation_is_measured_on_evenly_spread_contexts_of_a_large_corpus(dictionary, real, units, monkeypatch):
    monkeypatch.setattr(neighbours, "COACTIVATION_CONTEXTS", 30)
    contexts = np.flatnonzero(units.context_split == 0)
    chosen = contexts[np.linspace(0, len(contexts) - 1, 30).astype(int)]
    held = held_in_explain(real, units)
    assert_nearest(nearest_features(dictionary, real, units).coactive, expected_jaccard(held[:, chosen]))


def test_neighbours_hold_their_ids_as_int32(dictionary, real, units):
    found = nearest_features(dictionary, real, units)
    assert isinstance(found, Neighbours) and found.cosine.dtype == found.coactive.dtype == np.int32
