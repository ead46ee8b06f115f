"""Opening an SAE of the atlas for questions about new text."""

import json

import pytest

from scopeatlas.api import open_atlas
from scopeatlas.atlas.tables import FEATURES, open_table
from scopeatlas.errors import AtlasError, NotReadyError, UnknownSaeError
from tests.conftest import WIDTH


def test_an_sae_is_opened_with_the_subject_model_that_it_was_mined_with(published, subject):
    opened = open_atlas(published.store.root).open("toy")
    assert opened.subject.recipe() == subject.recipe()
    assert (opened.key, opened.corpus) == (published.entry.key, published.corpus.id)


def test_it_has_a_row_for_every_feature_in_order(published):
    opened = open_atlas(published.store.root).open(published.entry.key)
    assert opened.rows["feature"].to_list() == list(range(WIDTH)) and opened.dictionary.width == WIDTH


def test_it_is_opened_once(published):
    atlas = open_atlas(published.store.root)
    assert atlas.open("toy") is atlas.open(published.entry.key)


def test_what_is_published_meanwhile_is_seen_and_the_weights_stay_loaded(published, tmp_path):
    planted = published.copy(tmp_path / "store")
    atlas = open_atlas(planted.store.root)
    before = atlas.open("toy")
    dictionary = before.dictionary
    table = open_table(planted.store.root, FEATURES)
    table.update(where="feature = 3", values={"label": "another label"})
    after = atlas.open("toy")
    assert after.rows["label"][3] == "another label" != before.rows["label"][3] and after.dictionary is dictionary


def test_a_model_that_is_given_is_taken(published, subject):
    assert open_atlas(published.store.root, subject=subject).open("toy").subject is subject


def test_a_publication_that_does_not_name_its_model_says_so(published, tmp_path):
    planted = published.copy(tmp_path / "store")
    for record in (planted.store.root / "saes").rglob("source-*.commit.json"):
        body = json.loads(record.read_text())
        del body["facts"]["subject"]
        record.write_text(json.dumps(body))
    with pytest.raises(NotReadyError, match="does not say which subject model it is of; publish it again"):
        open_atlas(planted.store.root).open("toy")


def test_an_sae_that_is_not_there_is_named(published):
    with pytest.raises(UnknownSaeError, match="matches 'gpt2'"):
        open_atlas(published.store.root).open("gpt2")
    with pytest.raises(AtlasError, match="no atlas"):
        open_atlas(published.store.root / "elsewhere")
