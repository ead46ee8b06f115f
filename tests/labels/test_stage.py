import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.errors import ExplainerError, NotReadyError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.labels.chat import ExplainerConfig
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import FeatureLabels, LabelSettings, label_features, writes_claims
from scopeatlas.mining.examples import examples_key, open_examples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH
from tests.labels.conftest import GOOD, completion
from tests.planted import (
    DEAD,
    DENSE,
    EXACT,
    NO_REPORT,
    OTHER_RANDOM,
    RANDOM,
    RARE,
    Planted,
    mined_again,
    plant,
    silent_in,
    values_of,
)

RULES = LabelSettings()
STRICT = LabelSettings(RuleSettings(min_lift=0.9))


@pytest.fixture
def label(subject):
    def label(planted: Planted, settings: LabelSettings = RULES) -> FeatureLabels:
        return label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings)[0]

    return label


@pytest.fixture
def asking(server) -> LabelSettings:
    """Rules, and the LLM of the loopback server where none explains."""
    return LabelSettings(explainer=ExplainerConfig("m", server.url))


@pytest.fixture
def windows(mined, subject) -> pl.DataFrame:
    key = examples_key(mined.corpus, mined.entry, subject)
    examples = open_examples(mined.store, mined.corpus.id, mined.entry.key, key)
    return read_examples(examples.examples)


def shown_texts(windows: pl.DataFrame) -> set[str]:
    """The windows as an LLM is shown them."""
    columns = windows.select("texts", "activations").iter_rows()
    return {mark(texts, activations, marks=("<<", ">>")) for texts, activations in columns}


def examples_in(body: dict) -> list[dict]:
    """The examples in one request's user message."""
    lines = body["messages"][1]["content"].splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"strength"')]


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
    assert {record.key for record in stage.records()} == {first.key, second.key}
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
    assert Rule.from_json(found.current.row(EXACT, named=True)["rule"]) == Rule("token", (" the",))


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


def test_no_request_is_sent_while_no_model_is_named(planted, server, label):
    label(planted, replace(RULES, explainer=ExplainerConfig("", server.url)))
    assert server.requests == []


def test_an_llms_label_is_current_only_where_no_rule_explains(planted, asking, label):
    found, rules = label(planted, asking), label(planted)
    explained = rules.table.filter(pl.col("status") == "ok")["feature"].to_list()
    by_llm = found.current.filter(pl.col("method") == "llm")
    assert by_llm["feature"].to_list() == [RANDOM, OTHER_RANDOM]
    assert by_llm["label"].unique().to_list() == [GOOD["label"]]
    kept = found.table.filter((pl.col("method") == "llm") & pl.col("feature").is_in(explained))
    assert kept["feature"].to_list() == explained and not kept["current"].any()
    assert found.current["feature"].to_list() == list(range(WIDTH))


def test_an_llm_that_declines_replaces_nothing(planted, server, asking, label):
    server.behave = lambda number, body: completion({**GOOD, "status": "unclear", "label": ""})
    found = label(planted, asking)
    assert found.current.drop("provenance").equals(label(planted).current.drop("provenance"))
    assert set(found.table.filter(pl.col("method") == "llm")["status"]) == {"unclear"}


def test_features_refused_for_want_of_evidence_are_not_asked_about(planted, server, asking, label):
    asked = label(planted, asking).table.filter(pl.col("method") == "llm")["feature"].to_list()
    assert asked == [feature for feature in range(DEAD) if feature not in (RARE, DENSE)]
    assert len(server.requests) == len(asked)


def test_the_features_seen_in_most_explain_documents_are_asked_about_first(planted, asking, subject, label):
    table = label(planted, replace(asking, llm_features=2)).table
    key = examples_key(planted.corpus, planted.entry, subject)
    features = open_examples(planted.store, planted.corpus.id, planted.entry.key, key).features
    counts = dict(features.select("feature", "explain_documents").rows())
    asked = table.filter(pl.col("method") == "llm")["feature"].to_list()
    others = [feature for feature in range(DEAD) if feature not in (*asked, RARE, DENSE)]
    assert len(asked) == 2 and min(counts[f] for f in asked) >= max(counts[f] for f in others)


def test_a_garbage_reply_is_an_error_and_no_label(planted, server, asking, label):
    server.behave = lambda number, body: completion("I would say ships, mostly")
    found = label(planted, asking)
    by_llm = found.table.filter(pl.col("method") == "llm")
    assert set(by_llm["status"]) == {"error"} and set(by_llm["label"]) == {""} and not by_llm["current"].any()
    assert all("breaks the schema" in json.loads(text)["error"] for text in by_llm["provenance"])


def test_an_llm_is_shown_examples_of_explain_documents_only(planted, server, asking, windows, label):
    label(planted, asking)
    explain, held_out = (
        shown_texts(windows.filter((pl.col("split") == "explain") == is_explain)) for is_explain in (True, False)
    )
    sent = {example["text"] for body in server.requests for example in examples_in(body)}
    assert sent <= explain and not sent & held_out and len(sent) > 50


def test_each_request_is_about_one_feature(planted, server, asking, windows, label):
    label(planted, asking)
    of_feature = {f: shown_texts(mine) for (f,), mine in windows.filter(pl.col("split") == "explain").group_by(["feature"])}
    for body in server.requests:
        texts = {example["text"] for example in examples_in(body)}
        assert texts and sum(texts <= known for known in of_feature.values()) >= 1


def test_what_an_llm_is_shown_does_not_depend_on_held_out_peaks(medium, mined, subject, server, asking, tmp_path, label):
    held_out = ~mined.units.in_split("explain")[mined.firings.position]
    values = values_of(mined.firings) * np.where(held_out, 100, 1).astype(np.float16)
    label(mined.copy(tmp_path / "as they are"), asking)
    before = sorted(json.dumps(body) for body in server.requests)
    label(mined_again(medium, subject, mined.units, mined.firings, tmp_path / "strong", values=values), asking)
    assert sorted(json.dumps(body) for body in server.requests[len(before) :]) == before


def test_what_an_llm_is_shown_does_not_depend_on_how_often_report_documents_fire(
    medium, mined, subject, server, asking, tmp_path, label
):
    label(mined.copy(tmp_path / "as they are"), asking)
    before = sorted(json.dumps(body) for body in server.requests)
    silent = silent_in(mined.units, mined.firings, "report")
    label(mined_again(medium, subject, mined.units, silent, tmp_path / "silent"), asking)
    assert sorted(json.dumps(body) for body in server.requests[len(before) :]) == before


def test_a_second_run_after_its_labels_were_deleted_sends_nothing(planted, server, asking, label):
    first = label(planted, asking)
    sent = len(server.requests)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    stage.discard(stage.record(first.key))
    again = label(planted, asking)
    assert (sent, len(server.requests)) == (8, 8)
    assert again.table.equals(first.table)


def test_a_server_that_cannot_be_reached_commits_nothing(planted, server, asking, label):
    server.close()
    with pytest.raises(ExplainerError, match="cannot reach the LLM"):
        label(planted, asking)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "labels")
    assert list(stage.records()) == [] and not list(stage.root.glob("*.parquet"))


def test_labels_say_where_they_came_from(planted, asking, subject, label):
    found = label(planted, asking).table.row(by_predicate=(pl.col("feature") == RANDOM) & (pl.col("method") == "llm"), named=True)
    provenance = json.loads(found["provenance"])
    assert provenance["model"] == "m" and provenance["request_key"] and provenance["predicted_positive"]
    key = examples_key(planted.corpus, planted.entry, subject)
    examples = open_examples(planted.store, planted.corpus.id, planted.entry.key, key)
    explain = read_examples(examples.examples, [RANDOM]).filter(pl.col("split") == "explain")
    assert set(provenance["example_ids"]) <= {str(i) for i in explain["context_id"]}


def test_a_feature_that_never_fires_in_report_documents_is_labelled_all_the_same(planted, label):
    row = label(planted).current.row(NO_REPORT, named=True)
    assert (row["status"], row["label"]) == ("ok", "of")
