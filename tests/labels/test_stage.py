"""The labels stage on features whose firings are known, with an LLM on loopback where one is asked."""

import json
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest

from scopeatlas.errors import ConfigError, ExplainerError, NotReadyError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.labels.outputs import writes_claims
from scopeatlas.labels.stage import LabelSettings, estimate_labels, label_features, labels_key
from scopeatlas.llm.journal import read_journal
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH
from tests.explainer_brain import ExplainerBrain, explanation
from tests.labels.staging import ASKED, RULES, STRICT, by_llm, config, current_of, provenance_of
from tests.planted import DEAD, DENSE, EXACT, NO_REPORT, OTHER_RANDOM, RANDOM, RARE, plant

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
