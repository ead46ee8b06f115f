"""From a list of numbers or a text to features of an SAE."""

import numpy as np
import pytest
import torch

from scopeatlas.activations.probe import Probe
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.rows import feature_vectors
from scopeatlas.dictionaries.releases import load_folder, open_dictionary
from scopeatlas.errors import ConfigError
from scopeatlas.selection import Wanted, features_of_query, features_of_text, features_wanted, parse_features
from tests.atlas.conftest import MLP, RES, feature_rows
from tests.conftest import WIDTH
from tests.multi_layer import multi_layer_tensors, write_multi_layer

TEXT = "The ferry left the harbour at noon because of high winds."


@pytest.fixture
def dictionary(small):
    return open_dictionary(small.entry)


@pytest.mark.parametrize(
    ("text", "features"),
    [("7", [7]), ("12,40-43", [12, 40, 41, 42, 43]), (" 3 , 1-2,2 ", [1, 2, 3]), ("", []), (f"{WIDTH - 1}", [WIDTH - 1])],
)
def test_a_list_of_numbers_and_ranges_is_read(dictionary, text, features):
    assert parse_features(text, dictionary) == features


@pytest.mark.parametrize("text", ["x", "-3", "1-", "3-1", "1;2", f"{WIDTH}", f"1-{WIDTH}", "1.2", "9" * 30])
def test_what_is_no_feature_of_the_sae_is_named(dictionary, text):
    with pytest.raises(ConfigError):
        parse_features(text, dictionary)


def test_the_features_of_a_text_are_those_of_the_highest_peaks_in_it(dictionary, subject):
    probe = Probe(dictionary, subject)
    (found,) = probe.activations([TEXT])
    peaks = {int(f): found.value[found.feature == f].max() for f in np.unique(found.feature)}
    best = sorted(peaks, key=lambda feature: (-peaks[feature], feature))
    assert features_of_text(probe, TEXT, count=5) == best[:5]
    assert features_of_text(probe, TEXT, count=10**6) == best


def test_nothing_wanted_is_none_and_not_no_features(small, subject):
    assert features_wanted(Wanted(features=" ", text="\n"), small.store, small.entry, subject) is None


def test_numbers_and_a_text_are_wanted_together(small, subject, dictionary):
    wanted = features_wanted(Wanted(features="3-4", text=TEXT, count=2), small.store, small.entry, subject)
    assert wanted == sorted({3, 4, *features_of_text(Probe(dictionary, subject), TEXT, count=2)})


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    shards = multi_layer_tensors([torch.randn(50, 640), torch.randn(50, 640)], width=8)
    return load_folder(write_multi_layer(tmp_path_factory.mktemp("cross") / "layers", "crosscoder", [3, 7], shards))


def test_features_of_several_layers_are_named_by_layer_and_index_too(two_layers):
    assert parse_features("2,3.2,7.0,7.2-7.4", two_layers) == [2, 8, 10, 11, 12]


@pytest.mark.parametrize("text", ["5.1", "7.8", "16"])
def test_a_layer_or_index_that_is_not_there_is_named(two_layers, text):
    with pytest.raises(ConfigError):
        parse_features(text, two_layers)


@pytest.mark.slow
def test_the_features_of_a_query_are_those_that_a_search_of_the_sae_finds(tmp_path):
    embedder = Embedder()
    for sae in (RES, MLP):
        rows = feature_rows(sae)
        vectors = feature_vectors(rows, EmbeddingCache(tmp_path, embedder))
        publish(rows, vectors, root=tmp_path, folder=tmp_path / "saes" / sae, embedder=embedder)
    texts = dict(feature_rows(RES).select("feature", "label").rows())
    found = features_of_query(tmp_path, RES, "puppies", count=3)
    assert len(found) == 3 and texts[found[0]] == "dogs, puppies and their training"
