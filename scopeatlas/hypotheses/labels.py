"""What a label is: a claim about a feature with its status, method and provenance, or a typed refusal.

What belongs here: the type and its table. What does not: proposing labels (`labels/`) or testing them (`scoring/`).
"""

from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from scopeatlas.storage.files import content_hash

Status = Literal["ok", "dead", "rare", "too_few_documents", "dense", "positional", "incoherent", "unclear", "falsified", "error"]
Method = Literal["rule", "llm", "imported", "human"]
Scope = Literal["", "token", "phrase", "document"]

LABEL_SCHEMA = {
    "label_id": pl.String,
    "feature": pl.UInt32,
    "method": pl.String,
    "version": pl.String,
    "status": pl.String,
    "label": pl.String,
    "reads": pl.String,
    "writes": pl.String,
    "scope": pl.String,
    "rule": pl.String,
    "confidence": pl.Float32,
    "predicted_positive": pl.List(pl.String),
    "predicted_negative": pl.List(pl.String),
    "select_score": pl.Float32,
    "current": pl.Boolean,
    "provenance": pl.String,
}


@dataclass(frozen=True)
class Label:
    """A claim about one feature, or why there is none.

    version: who proposed it, such as "rule:5", "llm:combined:MODEL:PROMPT@HASH", "human:AUTHOR". label: a few words,
    empty when refused. reads, writes: what it fires on and what it promotes, sentences that are tested apart. scope:
    what `reads` is about. rule: JSON of a `Rule`, or empty. predicted_positive, predicted_negative: sentences on which
    the feature should fire and stay silent. select_score: what it was chosen by, on select documents. provenance: JSON.
    """

    feature: int
    method: Method
    status: Status
    label: str = ""
    reads: str = ""
    writes: str = ""
    rule: str = ""
    version: str = ""
    scope: Scope = ""
    confidence: float | None = None
    predicted_positive: tuple[str, ...] = ()
    predicted_negative: tuple[str, ...] = ()
    select_score: float | None = None
    current: bool = True
    provenance: str = "{}"

    @property
    def label_id(self) -> str:
        """What the claim is, whatever became of it: scores are joined by it."""
        return content_hash(self.feature, self.method, self.version, self.label, self.reads, self.writes, self.rule)[:16]


def label_table(labels: list[Label]) -> pl.DataFrame:
    """Labels as a table, sorted by feature, method and version."""
    rows = [[_cell(getattr(label, name)) for name in LABEL_SCHEMA] for label in labels]
    return pl.DataFrame(rows, schema=LABEL_SCHEMA, orient="row").sort("feature", "method", "version", "label_id")


def labels_of(table: pl.DataFrame) -> list[Label]:
    """The labels that `label_table` was made of."""
    return [_label(row) for row in table.drop("label_id").iter_rows(named=True)]


def _label(row: dict[str, Any]) -> Label:
    arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Label(**arguments)


def _cell(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
