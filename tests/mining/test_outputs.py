import shutil
from dataclasses import replace

import numpy as np
import pytest

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.mining import outputs
from scopeatlas.mining.outputs import feature_outputs, outputs_identity
from scopeatlas.mining.promoted import promoted_tokens
from scopeatlas.storage.store import Store
from tests.conftest import WIDTH


@pytest.fixture(scope="module")
def made(two_saes, subject, tmp_path_factory):
    """A store with the outputs of one SAE, and those."""
    store = Store(tmp_path_factory.mktemp("outputs"))
    return store, feature_outputs(store, two_saes[0], subject)


@pytest.fixture
def untouched(monkeypatch):
    """Whatever opens a dictionary fails."""
    monkeypatch.delattr(outputs, "open_dictionary")


def test_each_feature_has_its_place_norms_and_promoted_tokens(made, two_saes, subject):
    dictionary, table = open_dictionary(two_saes[0]), made[1]
    found = promoted_tokens(dictionary, subject)
    assert table["feature"].to_list() == table["index"].to_list() == list(range(WIDTH)) and set(table["layer"]) == {1}
    assert np.allclose(table["decoder_norms"].to_list(), dictionary.layers[0].w_dec.norm(dim=2).numpy())
    for name, expected in (("promoted", found.promoted), ("suppressed", found.suppressed), ("promoted_strength", found.strength)):
        assert (np.array(table[name].to_list()) == expected).all()


def test_what_was_made_once_is_read_whatever_the_corpus(made, two_saes, subject, untouched):
    store, table = made
    assert feature_outputs(store, two_saes[0], subject).equals(table)
    assert not store.corpora_of(two_saes[0].key)


def test_parts_make_the_same_table(made, two_saes, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PART_FEATURES", 32)
    store = Store(tmp_path)
    parts = feature_outputs(store, two_saes[0], subject)
    assert parts.drop("promoted_strength").equals(made[1].drop("promoted_strength"))
    assert [record.key.name for record in store.outputs(two_saes[0].key).records()] == ["features"]


def test_a_run_continues_where_another_ended(two_saes, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PART_FEATURES", 32)
    store, done = Store(tmp_path), []
    whole = outputs.promotion

    def until(limit):
        def promotion(*args):
            def promoted(rows):
                if len(done) == limit:
                    raise KeyboardInterrupt
                done.append(len(rows))
                return whole(*args)(rows)

            return promoted

        return promotion

    monkeypatch.setattr(outputs, "promotion", until(2))
    with pytest.raises(KeyboardInterrupt):
        feature_outputs(store, two_saes[0], subject)
    monkeypatch.setattr(outputs, "promotion", until(3))
    assert len(feature_outputs(store, two_saes[0], subject)) == WIDTH and done == [32, 32, 32]


def test_another_sae_or_subject_model_has_outputs_of_its_own(two_saes, subject):
    one, other = two_saes
    assert len({outputs_identity(one, subject), outputs_identity(other, subject)}) == 2
    assert outputs_identity(one, replace(subject, random_seed=0)) != outputs_identity(one, subject)


def test_a_damaged_table_is_made_again(made, two_saes, subject, tmp_path):
    shutil.copytree(made[0].root, tmp_path / "store")
    store = Store(tmp_path / "store")
    (path,) = store.outputs(two_saes[0].key).root.glob("*.parquet")
    path.write_bytes(b"")
    assert feature_outputs(store, two_saes[0], subject).equals(made[1])
