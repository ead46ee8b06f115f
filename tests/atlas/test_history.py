"""Rolling an SAE back, and what is remembered of its features. Two generations, by two settings of the labels."""

import json

import pytest
from click.testing import CliRunner

from scopeatlas.api import open_atlas
from scopeatlas.atlas.history import roll_back
from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.search import open_reader
from scopeatlas.atlas.stage import index_features
from scopeatlas.atlas.tables import FEATURES, open_table
from scopeatlas.cli import cli
from scopeatlas.errors import NotReadyError, UnknownSaeError
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.upkeep import prune
from tests.atlas.conftest import MLP, feature_rows
from tests.planted import Planted, planted_chain

FIRST, SECOND = (LabelSettings(RuleSettings(min_lift=lift)) for lift in (0.2, 0.9))
THIRD, FOURTH = (LabelSettings(RuleSettings(min_lift=0.9, min_contexts=contexts)) for contexts in (40, 80))
SCORES = ScoreSettings()


@pytest.fixture(scope="module")
def twice(medium, subject, embedder, tmp_path_factory) -> Planted:
    """An SAE published with two settings, one after the other, and another SAE beside it."""
    planted = planted_chain(medium, subject, tmp_path_factory.mktemp("twice") / "store")
    there = planted.store, planted.corpus, planted.entry, subject
    for labels in (FIRST, SECOND):
        label_features(*there, settings=labels)
        score_labels(*there, labels=labels, settings=SCORES)
        index_features(*there, embedder=embedder, labels=labels, scores=SCORES)
    return planted


@pytest.fixture
def store(twice, tmp_path) -> Planted:
    return twice.copy(tmp_path / "store")


@pytest.fixture
def run(subject, embedder):
    """What a nightly run does."""

    def run(planted: Planted, labels: LabelSettings):
        there = planted.store, planted.corpus, planted.entry, subject
        label_features(*there, settings=labels)
        score_labels(*there, labels=labels, settings=SCORES)
        return index_features(*there, embedder=embedder, labels=labels, scores=SCORES)

    return run


def live(planted: Planted) -> set[str]:
    rows = open_table(planted.store.root, FEATURES).to_arrow().to_pylist()
    return {row["generation"] for row in rows if row["sae"] == planted.entry.key}


def a_label_that_changed(planted: Planted) -> int:
    """A feature that the second settings refuse and the first do not."""
    atlas = open_atlas(planted.store.root)
    for feature in range(atlas.rows(planted.entry.key)[1].height):
        methods = atlas.history(planted.entry.key, feature).published["status"].to_list()
        if len(set(methods)) == 2:
            return feature
    raise AssertionError("both settings gave every feature the same status")


def test_history_tells_what_each_publication_said(store):
    found = open_atlas(store.store.root).history(store.entry.key, a_label_that_changed(store))
    assert found.published["status"].to_list() == ["ok", "incoherent"]
    assert found.published["live"].to_list() == [False, True]
    assert found.published["published_at"].is_sorted() and found.published["f1"].null_count() == 1


def test_history_keeps_every_label_with_its_test(store):
    found = open_atlas(store.store.root).history(store.entry.key, a_label_that_changed(store))
    assert set(found.labels["status"]) == {"ok", "incoherent"}
    given = found.labels.filter(status="ok")
    assert given["label"].item() and given["f1"].item() > 0 and not given["current"].item()
    assert found.labels.filter("current")["status"].to_list() == ["incoherent"]


def test_rolling_back_brings_the_previous_generation_and_touches_no_other_sae(store, embedder, vectors_of):
    rows = feature_rows(MLP)
    publish(rows, vectors_of(rows), root=store.store.root, folder=store.store.root / "saes" / MLP, embedder=embedder)
    before = open_reader(store.store.root).rows(MLP)[1]
    feature = a_label_that_changed(store)
    was = open_reader(store.store.root).feature(store.entry.key, feature)
    made = roll_back(store.store, store.entry.key)
    now = open_reader(store.store.root).feature(store.entry.key, feature)
    assert live(store) == {made.generation} and (was.status, now.status) == ("incoherent", "ok")
    assert open_reader(store.store.root).rows(MLP)[1].equals(before)


def test_history_shows_a_roll_back_as_the_last_line(store):
    feature = a_label_that_changed(store)
    roll_back(store.store, store.entry.key)
    found = open_atlas(store.store.root).history(store.entry.key, feature)
    assert found.published["status"].to_list() == ["ok", "incoherent", "ok"]
    assert found.published["live"].to_list() == [False, False, True]


def test_a_run_does_not_bring_back_what_was_rolled_back(store, run):
    made = roll_back(store.store, store.entry.key)
    again = run(store, SECOND)
    assert again.reused and again.generation == made.generation and live(store) == {made.generation}


def test_a_run_with_other_labels_publishes_them_after_a_roll_back(store, run):
    made = roll_back(store.store, store.entry.key)
    newer = run(store, THIRD)
    assert not newer.reused and live(store) == {newer.generation} != {made.generation}


def test_what_was_rolled_back_can_be_called_for(store, run):
    second = next(iter(live(store)))
    roll_back(store.store, store.entry.key)
    roll_back(store.store, store.entry.key, to=second[:6])
    assert live(store) == {second} and run(store, SECOND).generation == second


def test_before_the_first_generation_there_is_none(store):
    roll_back(store.store, store.entry.key)
    with pytest.raises(NotReadyError, match="has no generation before .*others: "):
        roll_back(store.store, store.entry.key)
    with pytest.raises(NotReadyError, match="has no generations that begin with 'zzz'"):
        roll_back(store.store, store.entry.key, to="zzz")
    with pytest.raises(UnknownSaeError, match="was never published"):
        roll_back(store.store, "nobody")


def test_rolling_back_a_newer_one_does_not_bring_back_what_was_rolled_back_before(store, run):
    first = roll_back(store.store, store.entry.key)
    run(store, THIRD)
    assert roll_back(store.store, store.entry.key).generation == first.generation


def test_the_same_rows_under_another_key_stay_away_too(store, run, monkeypatch):
    made = roll_back(store.store, store.entry.key)
    monkeypatch.setattr("scopeatlas.atlas.stage.STAGE_VERSION", -1)  # as a change that makes no other rows would
    again = run(store, SECOND)
    assert again.generation == made.generation and live(store) == {made.generation}
    assert run(store, SECOND).reused


def test_the_test_of_a_label_is_that_which_is_published(store):
    atlas = open_atlas(store.store.root)
    shown = 0
    for row in atlas.rows(store.entry.key)[1].filter(status="ok").iter_rows(named=True):
        label = atlas.history(store.entry.key, row["feature"]).labels.filter(label_id=row["label_id"])
        assert (label["scorer"].item(), label["f1"].item()) == (row["scorer"], row["f1"])
        shown += 1
    assert shown


def test_a_generation_that_is_gone_cannot_be_called_for_and_what_is_live_stays(store, run):
    now = next(iter(live(store)))
    first = roll_back(store.store, store.entry.key)
    first.path.unlink()
    roll_back(store.store, store.entry.key, to=now)
    with pytest.raises(NotReadyError, match="was pruned"):
        roll_back(store.store, store.entry.key, to=first.generation)
    assert live(store) == {now} and run(store, SECOND).generation == now


def test_pruning_keeps_the_generation_that_was_rolled_back_to(store, run):
    first = roll_back(store.store, store.entry.key)
    for labels in (THIRD, FOURTH):
        run(store, labels)
    roll_back(store.store, store.entry.key, to=first.generation)
    prune(store.store)
    assert first.path.exists()
    assert open_atlas(store.store.root).show(store.entry.key, 0).evidence.labels.height


def test_the_shell_rolls_back_and_shows_the_history(store):
    feature = str(a_label_that_changed(store))

    def shell(*arguments: str):
        done = CliRunner().invoke(cli, ["--store", str(store.store.root), *arguments], catch_exceptions=False)
        return done.exit_code, done.output

    code, said = shell("rollback", store.entry.key)
    assert code == 0 and next(iter(live(store))) in said
    code, said = shell("history", store.entry.key, feature)
    assert code == 0 and said.count(next(iter(live(store)))) == 2 and "every label" in said
    code, said = shell("history", store.entry.key, feature, "--json")
    assert [line["live"] for line in json.loads(said)["published"]] == [False, False, True]
    code, said = shell("rollback", store.entry.key)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
