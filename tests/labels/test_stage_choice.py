"""Which of a feature's labels the labels stage makes current: rules, an LLM's and people's."""

from dataclasses import replace

import polars as pl
import pytest

from scopeatlas.labels.annotations import annotate, retract
from scopeatlas.labels.stage import LabelSettings, estimate_labels
from scopeatlas.llm.config import ServerConfig
from tests.conftest import WIDTH
from tests.explainer_brain import ExplainerBrain, evidence_of
from tests.labels.staging import RULES, by_llm, config, current_of, provenance_of
from tests.planted import DEAD, EXACT, NO_REPORT, RANDOM, elsewhere, mined_again

# The choice ------------------------------------------------------------------------------------------------------------


def test_with_a_judge_the_label_that_does_best_on_select_documents_is_current(planted, judging, label):
    found = label(planted, judging)
    rule, text = provenance_of(found, EXACT, "rule")["choice"], provenance_of(found, EXACT, "llm")["choice"]
    assert (rule["by"], rule["balanced_accuracy"]) == ("execution", 1.0)
    assert text["by"] == "detection by m" and text["windows"] == rule["windows"] <= 20
    assert current_of(found, EXACT)["method"] == ("rule" if text["balanced_accuracy"] <= 1 else "llm")
    score = by_llm(found).row(by_predicate=pl.col("feature") == EXACT, named=True)["select_score"]
    assert score == pytest.approx(text["balanced_accuracy"])


def test_a_text_that_a_judge_finds_no_better_than_chance_is_not_current(planted, serve, label):
    says_no = ExplainerBrain(judges=lambda evidence: {str(number): 0 for number, _ in evidence["TEXTS"]})
    server = serve(brain=says_no)
    found = label(planted, LabelSettings(explainer=config(server), judge=config(server), method="contrastive"))
    assert not by_llm(found)["current"].any()
    assert current_of(found, RANDOM)["status"] == "incoherent"


def test_the_estimate_for_a_judge_alone_leaves_the_judges_budget(planted, subject, asking):
    annotate(planted.store, planted.corpus.id, planted.entry.key, EXACT, reads='The word " the".')
    settings = LabelSettings(judge=replace(asking.explainer, max_tokens_total=123_456))
    found = estimate_labels(planted.store, planted.corpus, planted.entry, subject, settings=settings)
    assert (found.requests, found.room) == (1, 123_456)


def test_a_server_with_more_room_for_reasoning_makes_other_labels():
    less, more = (LabelSettings(judge=ServerConfig("m", reasoning_tokens=tokens)) for tokens in (0, 1000))
    assert less.identity() != more.identity()


def test_firings_in_report_documents_change_no_choice(medium, mined, subject, serve, tmp_path, label):
    tables = []
    for name, firings in {"as they are": mined.firings, "changed": elsewhere(mined.units, mined.firings, "report")}.items():
        server = serve()
        copy = mined_again(medium, subject, mined.units, firings, tmp_path / name)
        found = label(copy, LabelSettings(explainer=config(server), judge=config(server), method="contrastive"))
        tables.append(found.table.drop("provenance"))
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_labels_of_firings_that_the_model_does_not_make_are_falsified_and_never_current_beside_an_ok_one(planted, asking, label):
    """The planted firings are no model's, so that whatever is said of them fails on the real one."""
    found = label(planted, replace(asking, falsified_features=3), only=[EXACT, RANDOM])
    tested = found.table.filter(pl.col("provenance").str.contains('"falsification"'))
    assert tested["feature"].n_unique() == 3 and {EXACT, RANDOM} <= set(tested["feature"])
    failed = found.table.filter(pl.col("status") == "falsified")
    assert EXACT in failed["feature"] and set(failed["label_id"]) <= set(found.falsification["label_id"])
    counterexamples = found.falsification.filter(~pl.col("passed"))
    assert set(failed["label_id"]) <= set(counterexamples["label_id"])
    rivals = found.table.filter(pl.col("feature").is_in(failed["feature"].implode()) & (pl.col("status") == "ok"))
    assert not failed.filter(pl.col("feature").is_in(rivals["feature"].implode()))["current"].any()
    assert label(planted, replace(asking, falsified_features=3), only=[EXACT]).falsification.equals(found.falsification)


# People ----------------------------------------------------------------------------------------------------------------


def test_a_persons_label_is_current_where_nobody_judges_and_gone_once_taken_back(planted, label):
    store, corpus, sae = planted.store, planted.corpus.id, planted.entry.key
    before = label(planted)
    made = annotate(store, corpus, sae, EXACT, reads="The definite article.", author="ann")
    found = label(planted)
    assert current_of(found, EXACT)["label_id"] == made.label_id and current_of(found, EXACT)["method"] == "human"
    assert found.table.filter(pl.col("method") == "rule")["feature"].to_list() == list(range(WIDTH))
    retract(store, corpus, sae, EXACT, author="ann")
    assert label(planted).table.equals(before.table)


def test_a_persons_label_wins_only_if_it_does_at_least_as_well(planted, judging, label):
    store, corpus, sae = planted.store, planted.corpus.id, planted.entry.key
    right = annotate(store, corpus, sae, EXACT, reads='The word " the".', author="ann")
    annotate(store, corpus, sae, NO_REPORT, reads='The word " zebra".', author="ann")
    found = label(planted, judging)
    assert current_of(found, EXACT)["label_id"] == right.label_id
    assert current_of(found, NO_REPORT)["method"] == "rule"
    rule = found.table.filter((pl.col("feature") == EXACT) & (pl.col("method") == "rule"))["label_id"][0]
    assert rule in provenance_of(found, EXACT, "human")["choice"]["tied_with"]


def test_a_person_cannot_make_a_dead_feature_speak(planted, judging, label):
    made = annotate(planted.store, planted.corpus.id, planted.entry.key, DEAD, reads='The word " the".', author="ann")
    for settings in (RULES, judging):
        found = label(planted, settings)
        assert current_of(found, DEAD)["status"] == "dead"
        assert found.current["feature"].to_list() == list(range(WIDTH))
        assert made.label_id in found.table["label_id"]


def test_an_annotation_changes_what_is_asked_of_its_own_feature_alone(planted, subject, server, judging, label):
    label(planted, judging)
    before = len(server.requests)
    claim = 'The word " zebra".'
    annotate(planted.store, planted.corpus.id, planted.entry.key, NO_REPORT, reads=claim, author="ann")
    estimated = estimate_labels(planted.store, planted.corpus, planted.entry, subject, settings=judging)
    label(planted, judging)
    new = server.requests[before:]
    assert len(new) == estimated.requests - estimated.answered == 1
    assert [evidence_of(body)["DESCRIPTION"] for body in new] == [[claim]]
