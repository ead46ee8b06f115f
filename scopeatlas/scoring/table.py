"""The one table of scores: a row for each label, scorer and arm, the label's own arm beside its controls.

What belongs here: the schema, and reading rows back out of the table. What does not: making rows (`execution.py`,
`judged.py`, `retrieval.py`, `writes.py`), or saying what they show (`report.py`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import polars as pl

Scorer = Literal["rule_execution", "detection", "fuzzing", "intruder", "simulation", "retrieval", "steering"]
Arm = Literal["own", "shuffled", "constant", "trigger_tokens", "random_direction", "random_model", "second_judge"]
ScoreStatus = Literal["scored", "too_few_documents", "unanswered", "not_applicable"]
Cell = str | int | float | list[float | None] | None

METRICS = ("precision", "recall", "f1", "balanced_accuracy", "auprc", "auroc", "correlation")

SCORE_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "feature": pl.UInt32,
    "label_id": pl.String,
    "method": pl.String,
    "claim": pl.String,  # reads, or writes
    "scorer": pl.String,
    "arm": pl.String,
    "status": pl.String,
    "unit": pl.String,  # token, context, window or prompt
    "documents": pl.Int32,  # report documents that the feature fires in, or whose text was used where it need not fire
    "positives": pl.Int64,
    "negatives_random": pl.Int64,
    "negatives_trigger": pl.Int64,
    "negatives_neighbour": pl.Int64,
    **{f"{name}{part}": pl.Float32 for name in METRICS for part in ("", "_low", "_high")},
    "first_round": pl.Float32,  # where testing may stop early: the main metric on the first round alone, which no stop selects
    "against": pl.Float32,  # trigger_tokens arm only: the own arm's main metric on its windows (of first_round, if that is there)
    "specificity_random": pl.Float32,
    "specificity_trigger": pl.Float32,
    "specificity_neighbour": pl.Float32,
    "recall_by_decile": pl.List(pl.Float32),  # weakest firings first
    "lift": pl.Float32,  # own arm only, as are the four below: its main metric less the shuffled arm's
    "lift_low": pl.Float32,
    "lift_high": pl.Float32,
    "p_value": pl.Float32,
    "q_value": pl.Float32,
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "usd": pl.Float32,
    "note": pl.String,
}

MAIN_METRIC: dict[str, str] = {
    "rule_execution": "balanced_accuracy",
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "intruder": "balanced_accuracy",
    "simulation": "correlation",
    "retrieval": "auroc",
    "steering": "auroc",
}
"""What a scorer's `lift` and `p_value` are about. Chance is 0.5, of a correlation 0."""

_PUBLISHED = (
    *("f1", "f1_low", "f1_high", "precision", "recall"),
    *("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "auprc"),
    *("lift", "lift_low", "lift_high", "q_value"),
)


def score_table(rows: Iterable[Mapping[str, Cell]]) -> pl.DataFrame:
    """Rows as a table of SCORE_SCHEMA, what a row leaves out being null; sorted, so that it depends on the rows alone."""
    table = pl.DataFrame([dict(row) for row in rows], schema=SCORE_SCHEMA)
    return table.sort("feature", "label_id", "scorer", "arm")


def number(value: float) -> float | None:
    """A measured number as a cell: null where it is not defined."""
    return None if math.isnan(value) else float(value)


def own(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of labels themselves."""
    return arm(table, "own")


def arm(table: pl.DataFrame, name: Arm) -> pl.DataFrame:
    """The rows of one arm."""
    return table.filter(pl.col("arm") == name)


def published(table: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """What is shown beside each label in use: one row per feature whose current label is ok, by feature.

    Columns: feature, scorer (rule_execution for a label with a rule, else detection; null where that did not test it, as
    retrieval is no accuracy), unit, documents, own metrics with intervals, lift, q_value, and shuffled_f1 and
    shuffled_balanced_accuracy, the control. labels: LABEL_SCHEMA.
    """
    shown = labels.filter(pl.col("current") & (pl.col("status") == "ok"))
    scorer = pl.when(pl.col("rule") != "").then(pl.lit("rule_execution")).otherwise(pl.lit("detection"))
    wanted = shown.select("feature", "label_id", wanted=scorer)
    tests = table.filter((pl.col("claim") == "reads") & pl.col("arm").is_in(["own", "shuffled"]))
    mine = own(tests).select("label_id", "scorer", "unit", "documents", *_PUBLISHED)
    control = arm(tests, "shuffled").select(
        "label_id", "scorer", shuffled_f1="f1", shuffled_balanced_accuracy="balanced_accuracy"
    )
    tested = mine.join(control, on=["label_id", "scorer"], how="left").with_columns(wanted="scorer")
    return wanted.join(tested, on=["label_id", "wanted"], how="left").drop("label_id", "wanted").sort("feature")
