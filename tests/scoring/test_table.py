import polars as pl
import pytest

from scopeatlas.hypotheses.labels import LABEL_SCHEMA, Label, label_table
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.scoring.table import SCORE_SCHEMA, arm, own, published, score_table

RULE = Rule("token", (" the",))


def row(label: Label, scorer: str, arm: str, **more) -> dict:
    named = {"feature": label.feature, "label_id": label.label_id, "method": label.method, "claim": "reads"}
    return named | {"scorer": scorer, "arm": arm, "status": "scored", "unit": "token", "documents": 9} | more


def test_a_table_depends_on_its_rows_and_not_on_their_order(rng):
    labels = [Label(int(f), "rule", "ok", version=str(i)) for i, f in enumerate(rng.integers(0, 5, 30))]
    rows = [row(label, scorer, arm) for label in labels for scorer in ("detection", "retrieval") for arm in ("own", "shuffled")]
    table = score_table(rows)
    assert table.schema == pl.Schema(SCORE_SCHEMA)
    assert score_table([rows[i] for i in rng.permutation(len(rows))]).equals(table)
    assert len(own(table)) == len(arm(table, "shuffled")) == 60


def test_what_is_published_of_a_rule_is_its_execution_beside_the_shuffled_control():
    label = Label(3, "rule", "ok", "the", rule=RULE.to_json())
    metrics = {"f1": 0.8, "f1_low": 0.7, "f1_high": 0.9, "balanced_accuracy": 0.85, "lift": 0.35, "q_value": 0.01}
    rows = [
        row(label, "rule_execution", "own", **metrics),
        row(label, "rule_execution", "shuffled", f1=0.1, balanced_accuracy=0.5),
        row(label, "detection", "own", f1=0.6),
        row(label, "steering", "own", auroc=0.9) | {"claim": "writes"},
    ]
    (found,) = published(score_table(rows), label_table([label])).iter_rows(named=True)
    assert (found["scorer"], found["unit"], found["documents"], found["feature"]) == ("rule_execution", "token", 9, 3)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    assert (found["shuffled_f1"], found["shuffled_balanced_accuracy"]) == pytest.approx((0.1, 0.5))


def test_a_text_label_is_published_with_its_detection_and_never_with_its_retrieval():
    judged, retrieved = (Label(f, "llm", "ok", "ships", "Words for ships.") for f in (1, 2))
    rows = [
        row(judged, "detection", "own", f1=0.7),
        row(judged, "retrieval", "own", auroc=0.9, auprc=0.8),
        row(retrieved, "retrieval", "own", auroc=0.9, auprc=0.8),
    ]
    found = published(score_table(rows), label_table([judged, retrieved]))
    assert found["feature"].to_list() == [1, 2] and found["scorer"].to_list() == ["detection", None]
    assert found["f1"].to_list() == [pytest.approx(0.7), None] and found["auprc"].to_list() == [None, None]


def test_only_current_labels_that_are_ok_are_published():
    labels = [
        Label(1, "rule", "ok", rule=RULE.to_json(), current=False),
        Label(1, "llm", "ok", "ships", "Words for ships."),
        Label(2, "rule", "incoherent"),
        Label(3, "rule", "ok", rule=RULE.to_json()),
    ]
    rows = [row(labels[0], "rule_execution", "own", f1=0.9), row(labels[1], "detection", "own", f1=0.4)]
    rows.append(row(labels[3], "rule_execution", "own") | {"status": "too_few_documents"})
    found = published(score_table(rows), label_table(labels))
    assert found.select("feature", "scorer").rows() == [(1, "detection"), (3, "rule_execution")]
    assert found["f1"].to_list() == [pytest.approx(0.4), None]


def test_what_is_published_has_the_same_columns_where_there_is_nothing():
    none = published(score_table([]), pl.DataFrame(schema=LABEL_SCHEMA))
    label = Label(1, "rule", "ok", rule=RULE.to_json())
    some = published(score_table([row(label, "rule_execution", "own")]), label_table([label]))
    assert none.schema == some.schema and none.is_empty()
