import json

import numpy as np
import polars as pl
import pytest

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.hypotheses.labels import Label, label_table
from scopeatlas.scoring.controls import REQUIRED, with_q_values
from scopeatlas.scoring.report import SHOWN, RandomDirections, compare, read_report, report
from scopeatlas.scoring.table import METRICS, score_table
from scopeatlas.storage.files import write_json

DOCUMENTS = {"explain": 60, "select": 20, "report": 20}
LABELS = [Label(f, "rule", "ok", str(f), rule="{}") for f in range(40)]
REFUSED = [Label(f, "rule", "rare") for f in range(40, 47)] + [Label(47, "rule", "dense")]


def rows_of(rng, scorer: str = "rule_execution", arms=None, metric: str = "balanced_accuracy", **more) -> list[dict]:
    """Rows with random values of one metric: higher in the own arm."""
    arms = ("own", *REQUIRED[scorer]) if arms is None else arms
    return [
        {
            "feature": label.feature,
            "label_id": label.label_id,
            "method": "rule",
            "claim": "reads",
            "scorer": scorer,
            "arm": arm,
            "status": "scored",
            "unit": "token",
            "documents": 5 + label.feature,
            metric: float(rng.uniform(0.7, 1) if arm == "own" else rng.uniform(0.4, 0.6)),
            **({"p_value": 0.001} if arm == "own" else {}),
        }
        | more
        for label in LABELS
        for arm in arms
    ]


def test_every_metric_stands_beside_every_control(rng):
    table = score_table(rows_of(rng))
    found = compare(table, "rule_execution", "balanced_accuracy")
    assert {c.control for c in found} == {"shuffled", "constant", "trigger_tokens"}
    for comparison in found:
        own, control = (
            table.filter(pl.col("arm") == arm).sort("label_id")["balanced_accuracy"].to_numpy().astype(np.float64)
            for arm in ("own", comparison.control)
        )
        assert (comparison.own.value, comparison.controlled.value) == pytest.approx((own.mean(), control.mean()))
        assert comparison.lift.value == pytest.approx((own - control).mean()) and comparison.labels == 40
        half = 1.96 * (own - control).std() / np.sqrt(40)
        expected = (comparison.lift.value - half, comparison.lift.value + half)
        assert (comparison.lift.low, comparison.lift.high) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("scorer", REQUIRED)
def test_no_metric_is_given_without_the_controls_that_it_must_have(rng, scorer):
    metric = SHOWN[scorer][0]
    whole = rows_of(rng, scorer, metric=metric)
    for missing in REQUIRED[scorer]:
        table = score_table([row for row in whole if row["arm"] != missing])
        with pytest.raises(NotReadyError, match=f"{metric} of {scorer} is not shown without its controls"):
            compare(table, scorer, metric)
        made = report(table, label_table(LABELS), documents=DOCUMENTS)
        (summary,) = made.scorers
        assert summary.missing == (missing,) and summary.comparisons == ()
        assert f"  no metric is shown: no {missing} beside it" in made.lines()


def test_the_text_never_states_a_metric_without_a_lift_over_a_control(rng):
    rows = [row for scorer in REQUIRED for row in rows_of(rng, scorer, metric=SHOWN[scorer][0])]
    made = report(with_q_values(score_table(rows)), label_table([*LABELS, *REFUSED]), documents=DOCUMENTS)
    for line in made.lines():
        if any(line.strip().startswith(metric) for metric in METRICS):
            assert " beside " in line and "lift" in line and line.count("[") == 3


def test_controls_that_were_refused_count_as_missing(rng):
    rows = [row | ({"status": "unanswered"} if row["arm"] == "shuffled" else {}) for row in rows_of(rng, "detection")]
    with pytest.raises(NotReadyError):
        compare(score_table(rows), "detection", "balanced_accuracy")


def test_labels_without_a_control_that_they_must_have_are_in_no_mean(rng):
    rows = [
        row | ({"status": "not_applicable", "f1": None} if row["arm"] == "shuffled" and row["feature"] < 15 else {})
        for row in rows_of(rng, "detection", metric="f1")
    ]
    for found in compare(score_table(rows), "detection", "f1"):
        mine = [row["f1"] for row in rows if row["arm"] == "own" and row["feature"] >= 15]
        assert found.labels == 25 and found.own.value == pytest.approx(np.mean(mine))


def test_where_testing_may_stop_early_means_are_over_first_rounds_alone(rng):
    rows = [row | {"first_round": float(rng.uniform()), "f1": 0.9, "auprc": 0.9} for row in rows_of(rng, "detection")]
    table = score_table(rows)
    (summary,) = report(table, label_table(LABELS), documents=DOCUMENTS).scorers
    assert {c.metric for c in summary.comparisons} == {"balanced_accuracy"} and compare(table, "detection", "f1") == ()
    for found in summary.comparisons:
        means = [np.mean([row["first_round"] for row in rows if row["arm"] == arm]) for arm in ("own", found.control)]
        assert (found.own.value, found.controlled.value) == pytest.approx(tuple(means))
        assert found.basis == "first round of about 20 windows"


def test_trigger_tokens_stand_beside_the_own_value_on_their_windows(rng):
    rows = [
        row | {"f1": 0.8} | ({"against": float(rng.uniform(0.8, 1))} if row["arm"] == "trigger_tokens" else {})
        for row in rows_of(rng, "detection")
    ]
    found = {c.control: c for c in compare(score_table(rows), "detection", "balanced_accuracy")}
    against = [row["against"] for row in rows if row["arm"] == "trigger_tokens"]
    assert found["trigger_tokens"].own.value == pytest.approx(np.mean(against)) != found["shuffled"].own.value
    assert found["trigger_tokens"].basis == "without windows drawn for a trigger token" and found["shuffled"].basis == ""
    assert {c.control for c in compare(score_table(rows), "detection", "f1")} == {"shuffled", "constant"}


def test_what_depends_on_the_share_of_positives_says_it_and_every_line_says_what_was_resampled(rng):
    rows = [row | {"unit": "window"} for row in rows_of(rng, "detection", metric="f1")]
    rows = [row | ({"precision": 0.5} if row["arm"] == "constant" else {}) for row in rows]
    lines = [line for line in report(score_table(rows), label_table(LABELS), documents=DOCUMENTS).lines() if " beside " in line]
    assert lines and all(line.startswith("  f1 (at 50 of 100 windows positive) ") for line in lines)
    assert all(line.endswith("(means of 40 labels, 95 % intervals over labels)") for line in lines)
    ranked = rows_of(rng, "retrieval", metric="auprc", unit="window", positives=30, negatives_random=50, negatives_neighbour=20)
    assert {c.basis for c in compare(score_table(ranked), "retrieval", "auprc")} == {"at 30 of 100 windows positive"}
    executed = rows_of(rng, metric="f1")
    assert {c.basis for c in compare(score_table(executed), "rule_execution", "f1")} == {""}


def test_random_directions_are_other_labels_so_their_mean_is_compared(rng):
    nulls = [Label(f, "rule", "ok", f"null {f}") for f in range(9)] + [Label(f, "rule", "incoherent") for f in range(9, 30)]
    rows = rows_of(rng)
    rows += [
        {"feature": label.feature, "label_id": label.label_id, "scorer": "rule_execution", "arm": "random_direction"}
        | ({"status": "scored", "balanced_accuracy": 0.7} if label.status == "ok" else {"status": "not_applicable"})
        for label in nulls
    ]
    people = [Label(f, "human", "ok", str(f), "ships") for f in range(20, 25)]
    labels = label_table([*LABELS[:20], *people])
    made = report(score_table(rows), labels, documents=DOCUMENTS, null_densities=(1e-4, 0.03))
    assert made.random_directions == RandomDirections(30, 9, 30, 20, (1e-4, 0.03))  # of 30 features people labelled 5
    said = "9 of 30 labelled by a rule, beside 20 of the 30 features, of density 1.0e-04 to 3.0e-02, that they are matched to"
    assert f"random directions of the same norm and density: {said}" in made.lines()
    (found,) = [c for c in made.scorers[0].comparisons if c.control == "random_direction"]
    assert found.controlled.value == pytest.approx(0.7) and found.lift.value == pytest.approx(found.own.value - 0.7)
    matched = [row["balanced_accuracy"] for row in rows if row["arm"] == "own" and row["feature"] < 30]
    assert found.labels == 30 and found.own.value == pytest.approx(np.mean(matched))


def test_without_random_directions_the_report_says_so(rng):
    made = report(score_table(rows_of(rng)), label_table(LABELS), documents=DOCUMENTS)
    assert made.random_directions is None
    assert "random directions of the same norm and density: not there" in made.lines()


def test_coverage_refusals_and_documents_are_stated(rng):
    other = Label(0, "llm", "ok", "ships", current=False)
    made = report(with_q_values(score_table(rows_of(rng))), label_table([*LABELS, *REFUSED, other]), documents=DOCUMENTS)
    assert (made.features, made.labelled, made.refusals, made.methods) == (48, 40, {"rare": 7, "dense": 1}, {"rule": 40})
    assert made.documents == DOCUMENTS and made.scorers[0].documents == (5, 24, 44)
    assert made.scorers[0].discoveries == 40
    assert made.lines()[:2] == [
        "labelled: 40 of 48 features (rule 40); refused: rare 7, dense 1",
        "documents: explain 60, select 20, report 20",
    ]


def test_costs_are_those_of_all_arms(rng):
    rows = rows_of(rng, "detection", prompt_tokens=100, completion_tokens=7, usd=0.5)
    (summary,) = report(score_table(rows), label_table(LABELS), documents=DOCUMENTS).scorers
    assert (summary.tokens, summary.usd) == (107 * len(rows), 0.5 * len(rows))


def test_a_report_is_read_back_as_it_was_written(rng, tmp_path):
    made = report(with_q_values(score_table(rows_of(rng))), label_table([*LABELS, *REFUSED]), documents=DOCUMENTS)
    write_json(tmp_path / "report.json", made.as_dict())
    assert read_report(tmp_path / "report.json") == made and json.loads((tmp_path / "report.json").read_text())["labelled"] == 40
    write_json(tmp_path / "report.json", {"labelled": 3})
    with pytest.raises(StoreError, match="is no report of scores"):
        read_report(tmp_path / "report.json")


def test_an_sae_without_a_label_has_a_report():
    made = report(score_table([]), label_table(REFUSED), documents=DOCUMENTS)
    assert (made.labelled, made.scorers) == (0, ()) and made.lines()
