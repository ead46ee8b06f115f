"""What a label is: a claim about a feature with its status, method and provenance, or a typed refusal.

What belongs here: the type and its table. What does not: proposing labels (`labels/`) or testing them (`scoring/`).
"""

from dataclasses import dataclass
from typing import Literal

import polars as pl

Status = Literal["ok", "dead", "rare", "too_few_documents", "dense", "positional", "incoherent", "unclear", "error"]
Method = Literal["rule", "llm", "imported", "human"]

LABEL_SCHEMA = {
    "feature": pl.UInt32,
    "method": pl.String,
    "status": pl.String,
    "label": pl.String,
    "reads": pl.String,
    "writes": pl.String,
    "rule": pl.String,
    "select_lift": pl.Float32,
    "current": pl.Boolean,
    "provenance": pl.String,
}


@dataclass(frozen=True)
class Label:
    """A claim about one feature. label: a few words, empty when refused. reads, writes: sentences. rule: JSON of a
    `Rule`, or empty. select_lift: what it was chosen by, on select documents. provenance: JSON."""

    feature: int
    method: Method
    status: Status
    label: str = ""
    reads: str = ""
    writes: str = ""
    rule: str = ""
    select_lift: float | None = None
    current: bool = True
    provenance: str = "{}"


def label_table(labels: list[Label]) -> pl.DataFrame:
    """Labels as a table, sorted by feature and method."""
    rows = [[getattr(label, name) for name in LABEL_SCHEMA] for label in labels]
    return pl.DataFrame(rows, schema=LABEL_SCHEMA, orient="row").sort("feature", "method")
