import shutil
from dataclasses import replace

import pytest

from scopeatlas.atlas.search import open_reader
from scopeatlas.atlas.stage import index_features
from scopeatlas.atlas.tables import FEATURES, database_folder, newest_publications, open_table
from scopeatlas.errors import NotReadyError
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from tests.conftest import WIDTH
from tests.planted import Planted, planted_chain

LABELS, SCORES = LabelSettings(), ScoreSettings()
STRICT = LabelSettings(RuleSettings(min_lift=0.9))


@pytest.fixture(scope="module")
def scored(medium, subject, tmp_path_factory) -> Planted:
    """Labelled and scored with two settings, so that there are two generations to publish."""
    planted = planted_chain(medium, subject, tmp_path_factory.mktemp("scored") / "store")
    for labels in (LABELS, STRICT):
        label_features(planted.store, planted.corpus, planted.entry, subject, settings=labels)
        score_labels(planted.store, planted.corpus, planted.entry, subject, labels=labels, settings=SCORES)
    return planted


@pytest.fixture
def fresh(scored, tmp_path) -> Planted:
    return scored.copy(tmp_path / "store")


@pytest.fixture
def index(subject, embedder):
    def index(planted: Planted, labels: LabelSettings = LABELS):
        there = planted.store, planted.corpus, planted.entry, subject
        return index_features(*there, embedder=embedder, labels=labels, scores=SCORES)

    return index


def rows_of(planted: Planted) -> list[dict]:
    return open_table(planted.store.root, FEATURES).to_arrow().sort_by("feature").to_pylist()


def test_features_are_published_and_then_reused(fresh, index):
    first, second = index(fresh), index(fresh)
    assert (first.reused, second.reused, first.rows) == (False, True, WIDTH)
    assert replace(second, reused=False) == first
    assert [row["feature"] for row in rows_of(fresh)] == list(range(WIDTH))


def test_a_reused_publication_writes_nothing(fresh, index):
    index(fresh)
    before = {path: path.stat().st_mtime_ns for path in fresh.store.root.rglob("*") if path.is_file()}
    index(fresh)
    assert {path: path.stat().st_mtime_ns for path in fresh.store.root.rglob("*") if path.is_file()} == before


def test_after_the_database_was_deleted_the_same_rows_are_published_again(fresh, index):
    first = index(fresh)
    before = rows_of(fresh)
    shutil.rmtree(database_folder(fresh.store.root))
    again = index(fresh)
    assert (again.reused, again.generation, again.path) == (False, first.generation, first.path)
    assert rows_of(fresh) == before and index(fresh).reused


def test_after_its_rows_were_deleted_they_are_published_again(fresh, index):
    index(fresh)
    before = rows_of(fresh)
    open_table(fresh.store.root, FEATURES).delete("feature < 5")
    assert not index(fresh).reused
    assert rows_of(fresh) == before


def test_after_its_generation_was_deleted_it_is_published_again(fresh, index):
    first = index(fresh)
    first.path.unlink()
    assert index(fresh).path.exists()
    assert index(fresh).reused


def test_new_labels_are_published_as_a_new_generation(fresh, index):
    first, second = index(fresh), index(fresh, STRICT)
    assert not second.reused and second.generation != first.generation
    assert {row["generation"] for row in rows_of(fresh)} == {second.generation}
    assert first.path.exists() and second.path.exists()


def test_going_back_to_earlier_settings_brings_their_rows_back(fresh, index):
    first = index(fresh)
    before = rows_of(fresh)
    index(fresh, STRICT)
    again = index(fresh)
    assert (again.reused, again.generation) == (False, first.generation)
    assert rows_of(fresh) == before and index(fresh).reused


def test_two_stores_publish_the_same_rows(scored, index, tmp_path):
    one, two = scored.copy(tmp_path / "one"), scored.copy(tmp_path / "two")
    assert index(one).generation == index(two).generation
    assert rows_of(one) == rows_of(two)


def test_what_is_published_can_be_found(fresh, index, embedder):
    index(fresh)
    atlas = open_reader(fresh.store.root, embedder=embedder)
    hits = atlas.search("words that end in -ing", k=3)
    assert "-ing" in [hit.label for hit in hits]
    assert newest_publications(open_table(fresh.store.root, "publications"))["corpus"].to_list() == [fresh.corpus.id]


@pytest.mark.parametrize("stage", ["labels", "scores"])
def test_features_are_not_ready_to_be_published_without_labels_and_scores(fresh, index, stage):
    folder = fresh.store.stage(fresh.entry.key, fresh.corpus.id, stage)
    for record in list(folder.records()):
        folder.discard(record)
    with pytest.raises(NotReadyError, match=f"has no {stage} made with these settings"):
        index(fresh)
