"""Embedding retrieval: whether a label's text is nearer to the windows its feature fires in than to the others.

What belongs here: the rows of scorer "retrieval". What does not: the embedder (the caller gives it), or drawing windows
(`hypotheses/samples.py`).

This is no accuracy and is never called one: an embedder knows topics, not tokens, and agrees with people only so far. It
is delphi's embedding protocol (EleutherAI/delphi, scorers/embedding), with the shuffled labels beside it that it lacks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.samples import Windows, require
from scopeatlas.scoring.controls import NO_PARTNER, partners
from scopeatlas.scoring.measured import NO_FAIR_WINDOWS, Sample, lift_cells, measure_ranking, sample_of
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
    of a text (trigger_tokens); triggers[i] are those of labels[i]. Where no label says anything else, the shuffled arm does not
    apply.

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
        said: dict[Arm, str] = {"own": texts[i], "trigger_tokens": triggers[i]}
        if other[i] != i:
            said["shuffled"] = texts[other[i]]
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
        return [named | {"arm": arm, "status": "too_few_documents"} for arm in ("own", "shuffled", "trigger_tokens")]
    scores: dict[Arm, np.ndarray] = {arm: shown @ vector for arm, vector in claims.items()}
    own = measure_ranking(sample, scores["own"], seed=seed)
    rows = [named | {"arm": "own", "status": "scored"} | own.cells]
    if "shuffled" in scores:
        shuffled = measure_ranking(sample, scores["shuffled"], seed=seed)
        rows[0] |= lift_cells(own, shuffled, documents=sample.documents)
        rows.append(named | {"arm": "shuffled", "status": "scored"} | shuffled.cells)
    else:
        rows.append(named | {"arm": "shuffled"} | NO_PARTNER)
    return [*rows, named | {"arm": "trigger_tokens"} | _triggers(sample, scores, seed=seed)]


def _triggers(sample: Sample, scores: Mapping[Arm, np.ndarray], *, seed: int) -> dict[str, Cell]:
    """The trigger tokens, and the own text beside them, without the windows that were drawn because they hold one."""
    fair = sample.fair_to_triggers
    some = sample.at(fair)
    if some.truth.all():
        return NO_FAIR_WINDOWS
    own, triggers = (measure_ranking(some, scores[arm][fair], seed=seed).cells for arm in ("own", "trigger_tokens"))
    return some.cells() | {"status": "scored", "against": own["auroc"]} | triggers


def _embedded(embed: Embed, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The vector of each distinct text."""
    distinct = sorted(set(texts))
    return dict(zip(distinct, embed(distinct), strict=True)) if distinct else {}
