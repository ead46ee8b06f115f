import json

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.errors import ConfigError, NotReadyError
from scopeatlas.labels.annotations import annotate
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.llm.config import ServerConfig
from scopeatlas.scoring.outcomes import OUTCOME_SCHEMA, PER_OUTCOME
from scopeatlas.scoring.report import read_report
from scopeatlas.scoring.stage import LabelScores, ScoreSettings, estimate_scores, score_labels, scores_key
from scopeatlas.scoring.table import METRICS, SCORE_SCHEMA
from tests.llm_server import Server
from tests.planted import EXACT, FEW_REPORT, NO_REPORT, SUFFIX, TOPIC, WORDS, Planted, planted_chain

SETTINGS = ScoreSettings()


@pytest.fixture(scope="module")
def labelled(medium, subject, tmp_path_factory) -> Planted:
    """Features whose firings are known, labelled by rules. Copy the store before changing it."""
    planted = planted_chain(medium, subject, tmp_path_factory.mktemp("scored") / "store")
    label_features(planted.store, planted.corpus, planted.entry, subject, settings=LabelSettings())
    return planted


def described(labelled: Planted, subject, root) -> Planted:
    """A copy in which a person has described some features too: only text is put before a judge."""
    copy = labelled.copy(root)
    for feature in (EXACT, WORDS, SUFFIX):
        annotate(copy.store, copy.corpus.id, copy.entry.key, feature, reads=f"whatever feature {feature} reads", author="ada")
    label_features(copy.store, copy.corpus, copy.entry, subject, settings=LabelSettings())
    return copy


def score(planted: Planted, subject, settings: ScoreSettings = SETTINGS, **more) -> tuple[LabelScores, bool]:
    return score_labels(planted.store, planted.corpus, planted.entry, subject, labels=LabelSettings(), settings=settings, **more)


@pytest.fixture(scope="module")
def found(labelled, subject) -> LabelScores:
    return score(labelled, subject)[0]


@pytest.fixture(scope="module")
def scores(found) -> dict[tuple[int, str], dict]:
    """The rows of each tested label, by feature and arm."""
    return {(row["feature"], row["arm"]): row for row in found.table.iter_rows(named=True)}


def test_a_feature_that_fires_exactly_on_its_token_scores_one(scores):
    exact = scores[EXACT, "own"]
    assert (exact["status"], exact["scorer"], exact["specificity_random"]) == ("scored", "rule_execution", 1)
    for name in ("precision", "recall", "f1", "balanced_accuracy", "auprc"):
        assert [exact[f"{name}{part}"] for part in ("", "_low", "_high")] == [1, 1, 1]
    assert exact["lift"] == pytest.approx(0.5, abs=0.02) and exact["p_value"] < 0.01
    assert scores[EXACT, "shuffled"]["f1"] < 0.05 and scores[EXACT, "constant"]["balanced_accuracy"] == 0.5


def test_features_that_mostly_follow_their_rule_score_high_and_their_controls_low(scores):
    assert all(scores[f, "own"]["f1"] > 0.8 and scores[f, "shuffled"]["f1"] < 0.2 for f in (WORDS, SUFFIX))
    assert all(scores[f, "own"]["q_value"] <= 0.05 for f in (EXACT, WORDS, SUFFIX))


def test_a_topic_is_tested_on_contexts(scores, labelled):
    topic, units = scores[TOPIC, "own"], labelled.units
    contexts = int((units.context_split == SPLITS.index("report")).sum())
    assert topic["unit"] == "context" and topic["positives"] + topic["negatives_random"] == contexts
    assert {row["unit"] for (feature, _), row in scores.items() if feature != TOPIC} == {"token"}


@pytest.mark.parametrize(("feature", "documents"), [(FEW_REPORT, 2), (NO_REPORT, 0)])
def test_a_feature_in_too_few_report_documents_is_refused(scores, feature, documents):
    for arm in ("own", "shuffled", "constant", "trigger_tokens"):
        row = scores[feature, arm]
        assert (row["status"], row["documents"]) == ("too_few_documents", documents)
        assert all(row[name] is None for name in row if name.startswith((*METRICS, "lift", "specificity", "recall", "p_", "q_")))


def test_with_fewer_documents_asked_for_it_is_scored(labelled, subject, tmp_path):
    lenient = score(labelled.copy(tmp_path / "store"), subject, ScoreSettings(min_report_documents=2))[0]
    row = lenient.table.row(by_predicate=(pl.col("feature") == FEW_REPORT) & (pl.col("arm") == "own"), named=True)
    assert row["status"] == "scored" and row["recall"] == 1 and row["precision"] < 0.5


def test_every_label_that_is_ok_is_tested_current_or_not(labelled, subject, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    person = annotate(copy.store, copy.corpus.id, copy.entry.key, EXACT, reads="the definite article", author="ada")
    labels, _ = label_features(copy.store, copy.corpus, copy.entry, subject, settings=LabelSettings())
    embed = lambda texts: np.ones((len(texts), 4), dtype=np.float32) / 2  # noqa: E731
    table = score(copy, subject, ScoreSettings(retrieved_features=99), embed=embed)[0].table
    executed = table.filter(pl.col("scorer") == "rule_execution")
    assert set(executed["label_id"]) == set(labels.table.filter((pl.col("rule") != "") & (pl.col("status") == "ok"))["label_id"])
    retrieved = table.filter(pl.col("scorer") == "retrieval")
    assert set(retrieved["label_id"]) == set(labels.table.filter(pl.col("status") == "ok")["label_id"])
    assert person.label_id in set(retrieved["label_id"])


def test_retrieval_without_an_embedder_is_a_mistake_in_the_settings(labelled, subject, tmp_path):
    with pytest.raises(ConfigError, match="no embedder is given: set retrieved_features to 0"):
        score(labelled.copy(tmp_path / "store"), subject, ScoreSettings(retrieved_features=5))


def test_the_table_keeps_to_its_schema_and_the_report_lies_beside_it(found, labelled):
    stage = labelled.store.stage(labelled.entry.key, labelled.corpus.id, "scores")
    assert found.table.schema == pl.Schema(SCORE_SCHEMA)
    assert read_report(stage.data_path(found.key, ".report.json")) == found.report
    assert json.loads(stage.data_path(found.key, ".report.json").read_text()) == json.loads(json.dumps(found.report.as_dict()))
    assert sum(found.report.documents.values()) == len(labelled.units.documents)


def test_hits_misses_and_false_alarms_are_what_they_say(found, labelled):
    """Read back from the text: «» stands around " the" in every outcome of the feature that fires there and nowhere else."""
    outcomes = found.outcomes
    assert outcomes.schema == pl.Schema(OUTCOME_SCHEMA)
    assert outcomes.group_by("label_id", "outcome").len()["len"].max() <= PER_OUTCOME
    exact = outcomes.filter(pl.col("feature") == EXACT)
    assert exact["outcome"].to_list() == ["hit"] * PER_OUTCOME and all("«the»" in text for text in exact["text"])
    words = outcomes.filter(pl.col("feature") == WORDS)
    alarms = words.filter(pl.col("outcome") == "false_alarm")["text"]
    assert len(alarms) == PER_OUTCOME and all(
        any(f"«{w}»" in text.casefold() for w in ("was", "were", "is", "are")) for text in alarms
    )


def test_scores_are_reused_when_nothing_changed(labelled, subject, found):
    again, reused = score(labelled, subject)
    assert reused and again.table.equals(found.table) and again.report == found.report and again.outcomes.equals(found.outcomes)


def test_the_same_scores_are_made_again_byte_for_byte(labelled, subject, found, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "scores")
    before = {path.name: path.read_bytes() for path in stage.root.iterdir()}
    for record in list(stage.records()):
        stage.discard(record)
    assert not score(copy, subject)[1] and {path.name: path.read_bytes() for path in stage.root.iterdir()} == before


def test_new_settings_write_a_new_generation_and_keep_the_old(labelled, subject, found, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    other, reused = score(copy, subject, ScoreSettings(seed=1))
    names = {record.key.identity for record in copy.store.stage(copy.entry.key, copy.corpus.id, "scores").records()}
    assert not reused and {other.key.identity, found.key.identity} == names and score(copy, subject, ScoreSettings(seed=1))[1]


def test_what_changes_no_score_changes_no_key(labelled, subject):
    def key(**settings) -> str:
        args = labelled.store, labelled.corpus, labelled.entry, subject, LabelSettings()
        return scores_key(*args, ScoreSettings(**settings)).identity

    assert key() == key(judged_features=7) == key(embedder="another") == key(scorers=("detection",))  # nobody is asked
    assert len({key(), key(seed=1), key(min_report_documents=4), key(steered_features=1), key(retrieved_features=1)}) == 5


def test_scoring_changes_no_label(labelled, subject, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "labels")
    before = {path.name: path.read_bytes() for path in stage.root.iterdir()}
    score(copy, subject, ScoreSettings(seed=2))
    assert {path.name: path.read_bytes() for path in stage.root.iterdir()} == before


def test_scores_are_not_ready_while_labels_are_missing(labelled, subject, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "labels")
    for record in list(stage.records()):
        stage.discard(record)
    with pytest.raises(NotReadyError, match="has no labels to score with these settings"):
        score(copy, subject, ScoreSettings(seed=3))


def test_answers_that_are_missing_leave_a_generation_that_the_next_run_completes(labelled, subject, tmp_path, monkeypatch):
    """Without budget, then with it: what was answered is not asked again, and it comes to the same as a run in one go."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cut, whole = (described(labelled, subject, tmp_path / name) for name in ("cut", "whole"))
    with Server() as server:

        def scored(planted: Planted, **budget) -> tuple[LabelScores, int]:
            before = len(server.requests)
            judge = ServerConfig(model="m", base_url=server.url, **budget)
            settings = ScoreSettings(judge=judge, scorers=("detection",), stop_early=False)
            found, reused = score(planted, subject, settings)
            args = planted.store, planted.corpus, planted.entry, subject, LabelSettings(), settings
            assert not reused and scores_key(*args) == found.key  # what there is, is what the rest of the chain reads
            return found, len(server.requests) - before

        poor, first = scored(cut, max_tokens_total=20_000)
        rich, second = scored(cut)
        straight, all_of_them = scored(whole)
    assert "unanswered" in set(poor.table["status"]) and "unanswered" not in set(rich.table["status"])
    assert poor.key != rich.key == straight.key and rich.table.equals(straight.table)
    assert 0 < first < all_of_them == first + second
    assert rich.report.scorers[-1].scorer == "detection" and rich.report.scorers[-1].tokens > 0


def test_what_the_judge_would_be_asked_is_estimated_and_not_asked(labelled, subject, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    copy = described(labelled, subject, tmp_path / "store")
    with Server() as server:
        judge = ServerConfig(model="m", base_url=server.url)
        settings = ScoreSettings(judge=judge, scorers=("detection", "intruder"), stop_early=False)
        args = copy.store, copy.corpus, copy.entry, subject
        estimated = estimate_scores(*args, labels=LabelSettings(), settings=settings)
        assert server.requests == [] and estimated.requests > 0 == estimated.answered
        found, _ = score(copy, subject, settings)
        judged = found.table.filter(pl.col("scorer") == "detection")
        assert set(judged["method"]) == {"human"} and set(judged["feature"]) == {EXACT, WORDS, SUFFIX}
        assert len(server.requests) == estimated.requests
        spent = sum(summary.tokens for summary in found.report.scorers)
        assert 0 < spent <= estimated.prompt_tokens + estimated.max_output_tokens
        again = estimate_scores(*args, labels=LabelSettings(), settings=settings)
    assert again.answered == again.requests == estimated.requests
    assert estimate_scores(*args, labels=LabelSettings(), settings=SETTINGS).requests == 0


@pytest.mark.slow
def test_on_demand_the_chain_is_run_on_a_randomly_initialised_subject_model(labelled, subject, found, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    with_random, _ = score(copy, subject, ScoreSettings(random_model=True))
    added = with_random.table.filter(pl.col("arm") == "random_model")
    assert with_random.table.filter(pl.col("arm") != "random_model").equals(found.table)  # which stand as they were
    assert set(added["scorer"]) <= {"rule_execution"} and added["lift"].null_count() == len(added)
    chain = copy.store.root / "controls" / "random-model-0" / "saes" / copy.entry.key / copy.corpus.id
    assert sorted(path.name for path in chain.iterdir() if any(path.glob("*.commit.json"))) >= [
        "activations",
        "examples",
        "labels",
    ]
    assert found.table.filter(pl.col("arm") == "random_model").is_empty()
