"""The labels stage on features whose firings are known, with an LLM on loopback where one is asked."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import polars as pl
import pytest

from scopeatlas.corpus.leakage import find_leaks
from scopeatlas.errors import ConfigError, ExplainerError, NotReadyError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.labels.annotations import annotate, retract
from scopeatlas.labels.outputs import writes_claims
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import FeatureLabels, LabelSettings, documents_read, estimate_labels, label_features, labels_key
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import read_journal
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH
from tests.explainer_brain import ExplainerBrain, evidence_of, explanation
from tests.llm_server import Server
from tests.planted import (
    DEAD,
    DENSE,
    EXACT,
    NO_REPORT,
    OTHER_RANDOM,
    RANDOM,
    RARE,
    Planted,
    elsewhere,
    mined_again,
    plant,
    silent_in,
)

RULES = LabelSettings()
STRICT = LabelSettings(RuleSettings(min_lift=0.9))
ASKED = [feature for feature in range(DEAD) if feature not in (RARE, DENSE)]
Label = Callable[..., FeatureLabels]


def config(server: Server, **changes) -> ServerConfig:
    return ServerConfig(**{"model": "m", "base_url": server.url, "max_attempts": 2, **changes})


@pytest.fixture
def label(subject) -> Label:
    def label(planted: Planted, settings: LabelSettings = RULES, **options) -> FeatureLabels:
        return label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings, **options)[0]

    return label


@pytest.fixture
def asking(server) -> LabelSettings:
    """Rules, and the LLM of the loopback server."""
    return LabelSettings(explainer=config(server), method="contrastive")


@pytest.fixture
def judging(asking) -> LabelSettings:
    """The same, and that LLM is the judge too."""
    return replace(asking, judge=asking.explainer)


def by_llm(labels: FeatureLabels) -> pl.DataFrame:
    return labels.table.filter(pl.col("method") == "llm")


def provenance_of(labels: FeatureLabels, feature: int, method: str) -> dict:
    is_it = (pl.col("feature") == feature) & (pl.col("method") == method)
    return json.loads(labels.table.row(by_predicate=is_it, named=True)["provenance"])


def current_of(labels: FeatureLabels, feature: int) -> dict:
    return labels.current.row(by_predicate=pl.col("feature") == feature, named=True)


# Rules -----------------------------------------------------------------------------------------------------------------


def test_labels_are_reused_when_nothing_changed(planted, subject, label):
    first = label(planted)
    again, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=RULES)
    assert reused and again.table.equals(first.table) and again.key == first.key


def test_labels_made_twice_are_byte_identical(mined, tmp_path, label):
    files = []
    for name in ("one", "two"):
        copy = mined.copy(tmp_path / name)
        found = label(copy)
        files.append(copy.store.stage(copy.entry.key, copy.corpus.id, "labels").data_path(found.key, ".parquet").read_bytes())
    assert files[0] == files[1]


def test_new_settings_write_a_new_generation_and_keep_the_old(planted, subject, label):
    first, second = label(planted), label(planted, STRICT)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    assert {record.key for record in stage.records() if record.key.name == "labels"} == {first.key, second.key}
    again, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=RULES)
    assert reused and again.table.equals(first.table) and not second.table.equals(first.table)


def test_every_feature_has_exactly_one_current_label(planted, label):
    found = label(planted)
    assert found.current["feature"].to_list() == list(range(WIDTH))
    assert dict(found.table.schema) == LABEL_SCHEMA


def test_features_are_explained_or_refused_as_their_firings_say(planted, label):
    found = label(planted)
    status = dict(found.current.select("feature", "status").rows())
    refused = {RANDOM: "incoherent", OTHER_RANDOM: "incoherent", RARE: "rare", DENSE: "dense", DEAD: "dead"}
    assert {feature: status[feature] for feature in refused} == refused
    assert sum(found.by_status().values()) == WIDTH
    assert found.coverage == found.by_status()["ok"] / WIDTH
    assert Rule.from_json(current_of(found, EXACT)["rule"]) == Rule("token", (" the",))


def test_a_refusal_carries_neither_rule_nor_text(planted, label):
    refused = label(planted).table.filter(pl.col("status") != "ok")
    assert refused.filter((pl.col("label") != "") | (pl.col("reads") != "") | (pl.col("rule") != "")).is_empty()


def test_promoted_tokens_are_claimed_only_where_they_stand_out(mined, subject):
    table = pl.DataFrame(
        {"feature": [0, 1], "promoted": [[10, 11, 12, 13, 14, 15], [20, 21]], "promoted_strength": [[6.5, 2.0], [5.9, 5.8]]}
    )
    texts = token_texts(subject.tokenizer, [10, 11, 12, 13, 14])
    assert writes_claims(table, subject) == {0: "raises " + ", ".join(f'"{text}"' for text in texts)}


def test_labels_are_not_ready_while_examples_are_missing(medium, mined, subject, tmp_path, label):
    bare = plant(medium, subject, mined.units, mined.firings, tmp_path / "bare")
    with pytest.raises(NotReadyError, match="examples shard .* is not done"):
        label(bare)


def test_a_feature_that_never_fires_in_report_documents_is_labelled_all_the_same(planted, label):
    row = current_of(label(planted), NO_REPORT)
    assert (row["status"], row["label"]) == ("ok", "of")


# An LLM ----------------------------------------------------------------------------------------------------------------


def test_no_request_is_sent_while_no_model_is_named(planted, server, label):
    label(planted, replace(RULES, explainer=config(server, model="")))
    assert server.requests == [] and server.probes == []


def test_without_a_judge_an_llms_label_is_current_only_where_no_rule_explains(planted, asking, label):
    found = label(planted, asking)
    explained = found.table.filter((pl.col("status") == "ok") & (pl.col("method") == "rule"))["feature"].to_list()
    current = found.current.filter(pl.col("method") == "llm")
    assert current["feature"].to_list() == [RANDOM, OTHER_RANDOM]
    kept = by_llm(found).filter(pl.col("feature").is_in(explained))
    assert kept["feature"].to_list() == explained and not kept["current"].any()
    assert found.current["feature"].to_list() == list(range(WIDTH))


def test_an_llm_that_declines_replaces_nothing(planted, serve, label):
    server = serve(brain=ExplainerBrain(explains=lambda evidence: explanation("x", status="unclear")))
    found = label(planted, LabelSettings(explainer=config(server), method="contrastive"))
    assert found.current.equals(label(planted).current)
    assert set(by_llm(found)["status"]) == {"unclear"} and set(by_llm(found)["label"]) == {""}


def test_features_refused_for_want_of_evidence_are_not_asked_about(planted, server, asking, label):
    assert by_llm(label(planted, asking))["feature"].to_list() == ASKED
    assert len(server.requests) == len(ASKED)


def test_the_features_seen_in_most_explain_documents_are_asked_about_first(planted, asking, subject, label):
    table = label(planted, replace(asking, llm_features=2)).table
    key = examples_key(planted.corpus, planted.entry, subject)
    features = open_examples(planted.store, planted.corpus.id, planted.entry.key, key).features
    counts = dict(features.select("feature", "explain_documents").rows())
    asked = table.filter(pl.col("method") == "llm")["feature"].to_list()
    others = [feature for feature in ASKED if feature not in asked]
    assert len(asked) == 2 and min(counts[f] for f in asked) >= max(counts[f] for f in others)


def test_labels_say_where_they_came_from(planted, server, asking, label, medium):
    found = label(planted, asking)
    row = by_llm(found).row(by_predicate=pl.col("feature") == RANDOM, named=True)
    said = json.loads(row["provenance"])
    assert row["version"] == f"llm:contrastive:m:{said['prompt']}" and said["prompt"].startswith("explain_v2@")
    assert (said["model"], said["model_said"], said["method"], said["rung"]) == ("m", "m", "contrastive", "json_schema")
    entry = read_journal(planted.store.root).entry(said["request_key"])
    assert entry is not None and (entry.time, entry.charge.prompt_tokens) == (said["time"], said["prompt_tokens"])
    splits = dict(medium.corpus.documents.select("document_id", "split").rows())
    assert len(said["windows"]) >= 20 and {splits[document] for document, _, _ in said["windows"]} == {"explain"}


def test_the_tally_is_what_the_journal_books(planted, judging, label):
    tally, spent = label(planted, judging).tally, read_journal(planted.store.root).spent_by_purpose()
    booked = spent["explain"] + spent["detection"]
    assert (tally.prompt_tokens, tally.completion_tokens) == (booked.prompt_tokens, booked.completion_tokens)
    assert (tally.asked, tally.invalid, tally.unanswered) == (booked.answers, 0, 0)


def test_a_server_that_cannot_be_reached_commits_no_labels(planted, server, asking, label):
    server.close()
    with pytest.raises(ExplainerError):
        label(planted, asking)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    assert {record.key.name for record in stage.records()} <= {"counts", "rules"}


# What an LLM is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "split"), [(elsewhere, "select"), (elsewhere, "report"), (silent_in, "report")])
def test_what_an_explainer_is_shown_does_not_depend_on_held_out_documents(
    medium, mined, subject, serve, tmp_path, label, changed, split
):
    sent = []
    for name, firings in {"as they are": mined.firings, "changed": changed(mined.units, mined.firings, split)}.items():
        server = serve()
        copy = mined_again(medium, subject, mined.units, firings, tmp_path / name)
        settings = LabelSettings(explainer=config(server), method="contrastive")
        label(copy, settings, only=[EXACT, RANDOM])
        sent.append(sorted(json.dumps(body["messages"]) for body in server.requests))
    assert sent[0] == sent[1] and len(sent[0]) == 2


def test_every_document_that_labels_name_is_of_the_split_it_was_read_as(planted, judging, label):
    read = documents_read(label(planted, judging).table)
    assert Counter(split for _, split in read).keys() == {"explain", "select"}
    assert not find_leaks(planted.corpus, read).found


def test_a_document_read_as_of_another_split_is_a_leak(planted, judging, label):
    read = documents_read(label(planted, judging).table)
    assert find_leaks(planted.corpus, [(document, "report") for document, _ in read[:1]]).found


def test_each_request_is_about_one_feature_and_marks_what_fires(planted, server, asking, label):
    label(planted, asking, only=[EXACT])
    (body,) = server.requests
    examples = evidence_of(body)["ACTIVATING EXAMPLES"]
    assert len(examples) == 20 and all("<<the>>" in example["text"] for example in examples)


def test_the_documents_that_edits_are_of_are_read_as_select(planted, label):
    found = label(planted)
    tried = pl.DataFrame({"document_id": ["", "doc-b", "doc-a", "doc-b"]})
    assert documents_read(found.table, tried) == [("doc-a", "select"), ("doc-b", "select")]


# Going on --------------------------------------------------------------------------------------------------------------


def test_a_second_run_after_its_labels_were_deleted_sends_nothing(planted, server, asking, label):
    first = label(planted, asking)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    stage.discard(stage.record(first.key))
    again = label(planted, asking)
    assert len(server.requests) == len(ASKED)
    assert again.table.equals(first.table)


def test_finished_labels_are_reused_when_the_firings_they_were_made_from_are_pruned(planted, subject, server, judging, label):
    first = label(planted, judging)
    asked = len(server.requests)
    activations = planted.store.stage(planted.entry.key, planted.corpus.id, "activations")
    assert sum(activations.prune(record) for record in list(activations.records())) > 0
    again, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=judging)
    assert reused and again.key == first.key and again.table.equals(first.table) and len(server.requests) == asked


def test_a_run_without_room_in_the_budget_says_so_and_the_next_one_goes_on(planted, subject, serve, label):
    server = serve()
    settings = LabelSettings(explainer=config(server, max_tokens_total=26_000), method="contrastive")
    first, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings)
    unasked = by_llm(first).filter(pl.col("status") == "error")
    assert 0 < len(unasked) == first.tally.unanswered < len(ASKED) and not reused
    assert all("max_tokens_total" in json.loads(text)["error"] for text in unasked["provenance"])
    assert not unasked["current"].any() and first.current["feature"].to_list() == list(range(WIDTH))
    again, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings)
    assert again.key == first.key == labels_key(planted.store, planted.corpus, planted.entry, subject, settings)

    more = replace(settings, explainer=config(server))
    done, reused = label_features(planted.store, planted.corpus, planted.entry, subject, settings=more)
    assert (reused, done.tally.unanswered, len(server.requests)) == (False, 0, len(ASKED))
    assert set(by_llm(done)["status"]) == {"ok"} and done.key != first.key
    assert labels_key(planted.store, planted.corpus, planted.entry, subject, more) == done.key
    assert label_features(planted.store, planted.corpus, planted.entry, subject, settings=more)[1]


def test_an_answer_that_never_came_is_asked_for_again_by_the_next_run(planted, serve, label):
    server = serve(faults=["500", "500"])
    settings = LabelSettings(explainer=config(server, max_attempts=1, max_concurrency=1), method="contrastive")
    first = label(planted, settings)
    assert first.tally.unanswered == 2 and Counter(by_llm(first)["status"]) == {"error": 2, "ok": len(ASKED) - 2}
    assert set(by_llm(label(planted, settings))["status"]) == {"ok"}
    assert len(server.requests) == len(ASKED) + 2


def test_a_reply_that_is_no_label_is_an_error_and_kept(planted, serve, label):
    server = serve(
        brain=ExplainerBrain(explains=lambda evidence: explanation("x", label="one two three four five six seven eight nine"))
    )
    found = label(planted, LabelSettings(explainer=config(server), method="contrastive"))
    assert set(by_llm(found)["status"]) == {"error"} and set(by_llm(found)["label"]) == {""}
    assert found.tally.invalid == len(ASKED) and found.tally.unanswered == 0
    said = provenance_of(found, EXACT, "llm")
    assert "more than 8 words" in said["error"]
    entry = read_journal(planted.store.root).entry(said["request_key"])
    assert entry is not None and "eight nine" in entry.reply.text


def test_an_error_is_not_paid_for_again_unless_asked_to(planted, serve, label):
    brain = ExplainerBrain(explains=lambda evidence: explanation("x", label=""))
    server = serve(brain=brain)
    settings = LabelSettings(explainer=config(server), method="contrastive")
    label(planted, settings)
    brain.explains = ExplainerBrain().explains
    assert set(by_llm(label(planted, settings))["status"]) == {"error"} and len(server.requests) == len(ASKED)
    again = label(planted, settings, retry_errors=True)
    assert set(by_llm(again)["status"]) == {"ok"} and len(server.requests) == 2 * len(ASKED)
    assert label(planted, settings).table.equals(again.table) and len(server.requests) == 2 * len(ASKED)


def test_features_asked_for_by_name_are_added_to_those_before(planted, server, asking, label):
    first = label(planted, asking, only=[RANDOM])
    assert by_llm(first)["feature"].to_list() == [RANDOM]
    second = label(planted, asking, only=[EXACT])
    assert by_llm(second)["feature"].to_list() == [EXACT, RANDOM] and len(server.requests) == 2
    third = label(planted, asking)
    assert by_llm(third)["feature"].to_list() == ASKED and len(server.requests) == len(ASKED)


def test_a_feature_refused_for_want_of_evidence_is_not_asked_about_by_name_either(planted, server, asking, label):
    said: list[str] = []
    found = label(planted, asking, only=[DENSE, DEAD, EXACT], log=said.append)
    assert by_llm(found)["feature"].to_list() == [EXACT] and len(server.requests) == 1
    assert any(f"{DENSE} (dense), {DEAD} (dead)" in line for line in said)


def test_features_that_cannot_be_asked_about_are_named(planted, asking, label):
    with pytest.raises(ConfigError, match=f"has no feature {WIDTH}"):
        label(planted, asking, only=[WIDTH])
    with pytest.raises(ConfigError, match="none is configured"):
        label(planted, RULES, only=[EXACT])


def test_another_models_labels_stay_and_are_not_current_for_it(planted, server, asking, label):
    label(planted, asking)
    other = replace(asking, explainer=config(server, model="m-2"), llm_features=1)
    found = label(planted, other)
    versions = Counter(by_llm(found)["version"].str.split(":").list.get(2))
    assert versions == {"m": len(ASKED), "m-2": 1}
    assert label(planted, other).table.equals(found.table)
    assert len(server.requests) == len(ASKED) + 1


def test_labels_that_were_paid_for_outlive_the_explainer(planted, asking, label):
    paid = label(planted, asking)
    without = label(planted)
    assert current_of(without, RANDOM)["label_id"] == current_of(paid, RANDOM)["label_id"]
    assert current_of(without, EXACT)["method"] == "rule"


def test_the_estimate_bounds_what_is_then_spent(planted, subject, judging, label):
    priced = replace(judging.explainer, usd_per_million_input=1.0, usd_per_million_output=2.0)
    settings = replace(judging, explainer=priced, judge=priced)
    before = estimate_labels(planted.store, planted.corpus, planted.entry, subject, settings=settings)
    assert before.answered == 0 and before.usd is not None
    found = label(planted, settings)
    assert 0 < found.tally.asked <= before.requests
    assert found.tally.prompt_tokens <= before.prompt_tokens and found.tally.completion_tokens <= before.max_output_tokens
    assert found.tally.usd is not None and found.tally.usd <= before.usd
    after = estimate_labels(planted.store, planted.corpus, planted.entry, subject, settings=settings)
    assert (after.requests, after.answered, after.prompt_tokens) == (found.tally.asked, found.tally.asked, 0)


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


@pytest.mark.parametrize("split", ["report", "explain"])
def test_the_judge_is_shown_select_documents_alone(medium, mined, subject, serve, tmp_path, label, split):
    sent = []
    for name, firings in {"as they are": mined.firings, "changed": elsewhere(mined.units, mined.firings, split)}.items():
        server = serve(brain=ExplainerBrain(explains=lambda evidence: explanation("of")))
        copy = mined_again(medium, subject, mined.units, firings, tmp_path / name)
        settings = LabelSettings(explainer=config(server), judge=config(server), method="max_activating")
        label(copy, settings, only=[EXACT])
        texts = [evidence_of(body)["TEXTS"] for body in server.requests if "DESCRIPTION" in evidence_of(body)]
        sent.append({text for round in texts for _, text in round})
    assert len(sent[0]) > 10
    assert (sent[0] == sent[1]) == (split == "report")  # what is a trigger, and who the neighbours are, is known from explain


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
