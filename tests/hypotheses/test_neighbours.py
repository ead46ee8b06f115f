import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations.cache import cache_activations
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.hypotheses import neighbours
from scopeatlas.hypotheses.neighbours import Neighbours, nearest_features
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.mining.examples import FeatureExamples, mine_examples
from scopeatlas.storage.store import Store
from tests.conftest import WIDTH, entry_of, sae_tensors, write_sae


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def entry(residual, tmp_path_factory):
    """A random SAE of which features 3 to 5 never fire."""
    tensors = sae_tensors(residual)
    tensors["threshold"][3:6] = 1e6
    return entry_of(write_sae(tmp_path_factory.mktemp("three-dead"), tensors))


@pytest.fixture(scope="module")
def store(medium_corpus, tmp_path_factory) -> Store:
    return Store(shutil.copytree(medium_corpus.store.root, tmp_path_factory.mktemp("neighbours") / "store"))


@pytest.fixture(scope="module")
def examples(store, medium_corpus, entry, subject) -> FeatureExamples:
    cache_activations(store, medium_corpus.corpus, [entry], subject)
    return mine_examples(store, medium_corpus.corpus, entry, subject)[0]


@pytest.fixture(scope="module")
def held(store, medium_corpus, entry, units, subject, examples) -> np.ndarray:
    """Which features fire on which explain tokens: bool [WIDTH, N]."""
    firings = read_firings(store, medium_corpus.corpus, entry, subject, units, width=WIDTH)
    return held_in_explain(firings, units)


@pytest.fixture(scope="module")
def dictionary(entry):
    return open_dictionary(entry)


def held_in_explain(firings: Firings, units: Units) -> np.ndarray:
    held = np.zeros((firings.width, units.contexts * units.length), dtype=bool)
    explain = units.in_split("explain")[firings.position]
    held[firings.feature[explain], firings.position[explain]] = True
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


@pytest.mark.parametrize("tile", [2048, 7])
def test_neighbours_are_the_features_of_highest_cosine_and_jaccard(dictionary, examples, held, monkeypatch, tile):
    monkeypatch.setattr(neighbours, "TILE_ROWS", tile)
    found = nearest_features(dictionary, examples, k=4)
    assert found.cosine.shape == found.coactive.shape == (WIDTH, 4)
    assert_nearest(found.cosine, expected_cosine(dictionary, held.any(axis=1)))
    assert_nearest(found.coactive, expected_jaccard(held))


def test_a_feature_that_fires_in_no_explain_document_neither_has_nor_is_a_neighbour(dictionary, examples, held):
    found = nearest_features(dictionary, examples)
    silent = np.flatnonzero(~held.any(axis=1))
    assert {3, 4, 5} <= set(silent)
    for table in (found.cosine, found.coactive):
        assert (table[silent] == -1).all() and not np.isin(table, silent).any()


def test_the_decoder_rows_of_all_outputs_count(dictionary, examples, held):
    """Features 0 and 1 agree at one output and are opposite at the other, 0 and 2 agree a little at both."""
    rows = torch.zeros(WIDTH, 2, 8)
    rows[torch.arange(WIDTH), :, torch.arange(WIDTH) % 5 + 3] = 1
    rows[:2] = 0
    rows[0, :, 0], rows[1, 0, 0], rows[1, 1, 0] = 1, 1, -1
    rows[2, :, 0] = 0.5
    two_outputs = replace(dictionary, layers=(replace(dictionary.layers[0], w_dec=rows),))
    found = nearest_features(two_outputs, examples, k=1)
    assert_nearest(found.cosine, expected_cosine(two_outputs, held.any(axis=1)))
    assert found.cosine[0, 0] == 2


def test_neighbours_hold_their_ids_as_int32(dictionary, examples):
    found = nearest_features(dictionary, examples)
    assert isinstance(found, Neighbours) and found.cosine.dtype == found.coactive.dtype == np.int32
