"""Embedding retrieval: whether a label's text is nearer to the windows its feature fires in than to the others.

What belongs here: the rows of scorer "retrieval". What does not: the embedder (the caller gives it), or drawing windows
(`hypotheses/samples.py`).

This is no accuracy and is never called one: an embedder knows topics, not tokens, and agrees with people only so far. It
is delphi's embedding protocol (EleutherAI/delphi, scorers/embedding), with the shuffled labels beside it that it lacks.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.samples import Windows, require
from scopeatlas.scoring.controls import partners
from scopeatlas.scoring.measured import lift_cells, measure_ranking, sample_of
from scopeatlas.scoring.table import Arm, Cell

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts into float32 [n, d], rows of length 1."""


def retrieve(
    labels: Sequence[Label],
    windows: Windows[Literal["report"]],
    triggers: Sequence[str],
    embed: Embed,
    *,
    min_documents: int,
    seed: int,
) -> list[dict[str, Cell]]:
    """Rows of every label: its own text (arm own), another feature's (shuffled), and its feature's trigger tokens instead
    of a text (trigger_tokens); triggers[i] are those of labels[i].

    The score of a window is the cosine of its text and the label's. Raises LeakError for windows of another split.
    """
    require(windows, "report")
    texts = [label.reads or label.label for label in labels]
    other = partners(labels, texts, [""] * len(labels), seed=seed)
    by_feature = {int(part["feature"][0]): part for part in windows.table.partition_by("feature", maintain_order=True)}
    spelled = {feature: ["".join(tokens) for tokens in part["texts"].to_list()] for feature, part in by_feature.items()}
    vectors = _embedded(embed, [*texts, *triggers, *(text for part in spelled.values() for text in part)])
    rows: list[dict[str, Cell]] = []
    for i, label in enumerate(labels):
        mine = by_feature.get(label.feature, windows.table.clear())
        said: dict[Arm, str] = {"own": texts[i], "shuffled": texts[other[i]], "trigger_tokens": triggers[i]}
        shown = np.array([vectors[text] for text in spelled.get(label.feature, [])])
        claims: dict[Arm, np.ndarray] = {arm: vectors[text] for arm, text in said.items()}
        rows += _rows(label, mine, shown, claims, min_documents=min_documents, seed=seed)
    return rows


def _rows(
    label: Label, windows: pl.DataFrame, shown: np.ndarray, claims: dict[Arm, np.ndarray], *, min_documents: int, seed: int
) -> list[dict[str, Cell]]:
    sample = sample_of(windows)
    named: dict[str, Cell] = {
        "feature": label.feature,
        "label_id": label.label_id,
        "method": label.method,
        "claim": "reads",
        "scorer": "retrieval",
        "unit": "window",
        **sample.cells(),
    }
    if sample.documents < min_documents or sample.truth.all():
        return [named | {"arm": arm, "status": "too_few_documents"} for arm in claims]
    measured = {arm: measure_ranking(sample, shown @ vector, seed=seed) for arm, vector in claims.items()}
    rows = [named | {"arm": arm, "status": "scored"} | found.cells for arm, found in measured.items()]
    rows[0] |= lift_cells(measured["own"], measured["shuffled"], documents=sample.documents)
    return rows


def _embedded(embed: Embed, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The vector of each distinct text."""
    distinct = sorted(set(texts))
    return dict(zip(distinct, embed(distinct), strict=True)) if distinct else {}
