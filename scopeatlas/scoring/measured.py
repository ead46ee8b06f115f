"""What answers about windows amount to: the metrics of one label in one arm, and its lift over another arm.

What belongs here: from numbers per window (or token) to cells of the score table. What does not: getting the numbers
(`judged.py`, `retrieval.py`), or the formulas (`hypotheses/metrics.py`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from scopeatlas.hypotheses.metrics import (
    CLAIM_METRICS,
    auprc,
    auroc,
    correlation,
    interval,
    lift_of,
    metrics,
    unit_weights,
)
from scopeatlas.scoring.table import Cell, number

DECILES = 10
NO_FAIR_WINDOWS: dict[str, Cell] = {"status": "not_applicable", "note": "every negative was drawn for its trigger token"}
"""Of a trigger_tokens row (`Sample.fair_to_triggers`)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The units one arm is tested on, each array [n]. truth: bool, whether it is positive. document: int. kind: str, of the
    window. decile: int, of the activation, -1 in negatives."""

    truth: np.ndarray
    document: np.ndarray
    kind: np.ndarray
    decile: np.ndarray

    @property
    def documents(self) -> int:
        """Documents with a positive."""
        return len(np.unique(self.document[self.truth]))

    def at(self, units: np.ndarray) -> "Sample":
        """Some of the units. units: bool [n]."""
        return Sample(self.truth[units], self.document[units], self.kind[units], self.decile[units])

    @property
    def fair_to_triggers(self) -> np.ndarray:
        """bool [n]: all but the negatives that were drawn because they hold a trigger token. A control that claims these
        tokens is always wrong there, so it is compared on the others alone."""
        return self.truth | (self.kind != "trigger")

    def cells(self) -> dict[str, Cell]:
        """What was tested on, as cells."""
        negatives = {
            f"negatives_{kind}": int((~self.truth & (self.kind == kind)).sum()) for kind in ("random", "trigger", "neighbour")
        }
        return {"documents": self.documents, "positives": int(self.truth.sum()), **negatives}


@dataclass(frozen=True, eq=False)
class Measured:
    """cells: every metric that has a meaning. drawn: float64 [1 + B], the main one of the sample itself and of each
    bootstrap draw of its documents; two arms on one sample share their draws."""

    cells: dict[str, Cell]
    drawn: np.ndarray


def sample_of(windows: pl.DataFrame) -> Sample:
    """Windows (WINDOW_SCHEMA) as what a claim is tested on: positive where the feature fires."""
    kind = windows["kind"].to_numpy()
    return Sample(kind == "positive", windows["document"].to_numpy(), kind, windows["decile"].to_numpy())


def measure_claims(sample: Sample, verdict: np.ndarray, *, seed: int) -> Measured:
    """Verdicts in [0, 1] as claims: yes from 0.5. The main metric is balanced accuracy.

    AUPRC and AUROC rank by the verdicts themselves; AUROC is null where these are all 0 or 1, as it is balanced accuracy then.
    """
    claimed = verdict >= 0.5
    weights = unit_weights(sample.document, seed=seed)
    parts = (claimed & sample.truth, claimed, sample.truth, np.ones(len(claimed), dtype=bool))
    sums = [part.astype(np.float64) @ weights for part in parts]
    drawn = metrics(*sums)
    both_there = (sums[2] > 0) & (sums[2] < sums[3])  # a draw without positives or without negatives says nothing
    values = {name: np.where(both_there, getattr(drawn, name), np.nan) for name in CLAIM_METRICS}
    if not np.isin(verdict, (0, 1)).all():
        values |= {"auprc": auprc(verdict, sample.truth, weights), "auroc": auroc(verdict, sample.truth, weights)}
    cells = _cells(values)
    for kind in ("random", "trigger", "neighbour"):
        negatives = ~sample.truth & (sample.kind == kind)
        if negatives.any():
            cells[f"specificity_{kind}"] = float((~claimed[negatives]).mean())
    cells["recall_by_decile"] = [_share(claimed[sample.truth & (sample.decile == d)]) for d in range(DECILES)]
    return Measured(cells, values["balanced_accuracy"])


def accuracy_at(sample: Sample, verdict: np.ndarray, units: np.ndarray) -> Cell:
    """Balanced accuracy of verdicts on some units (bool [n]): null without positives or without negatives among them."""
    right, truth = (verdict[units] >= 0.5) == sample.truth[units], sample.truth[units]
    return float((right[truth].mean() + right[~truth].mean()) / 2) if truth.any() and not truth.all() else None


def measure_ranking(sample: Sample, score: np.ndarray, *, seed: int) -> Measured:
    """Numbers that rank units, of no scale of their own. The main metric is AUROC."""
    weights = unit_weights(sample.document, seed=seed)
    values = {"auroc": auroc(score, sample.truth, weights), "auprc": auprc(score, sample.truth, weights)}
    return Measured(_cells(values), values["auroc"])


def measure_correlation(predicted: np.ndarray, activation: np.ndarray, document: np.ndarray, *, seed: int) -> Measured:
    """Predicted activations of tokens against the real ones. A prediction that never changes correlates with nothing: 0."""
    values = correlation(predicted, activation, unit_weights(document, seed=seed))
    if np.ptp(predicted) == 0:
        values = np.zeros_like(values)
    return Measured(_cells({"correlation": values}), values)


def measure_mean(name: str, values: np.ndarray, document: np.ndarray, *, seed: int) -> Measured:
    """The mean of a metric that each unit has a value of, float [n]."""
    weights = unit_weights(document, seed=seed)
    drawn = values.astype(np.float64) @ weights / weights.sum(axis=0)
    return Measured(_cells({name: drawn}), drawn)


def lift_cells(own: Measured, control: Measured, *, documents: int, looks: int = 1) -> dict[str, Cell]:
    """lift, its interval and its p-value: own less control, draw by draw.

    looks: at how many points testing might have stopped; the p-value is multiplied by it (a union bound), so that stopping
    at the best of them gains nothing.
    """
    gained = own.drawn - control.drawn
    found = lift_of(gained[:1], gained[None, 1:], documents=np.array([documents]))
    p_value = np.minimum(found.p_value * looks, 1)
    names = {"lift": found.value, "lift_low": found.low, "lift_high": found.high, "p_value": p_value}
    return {name: number(value[0]) for name, value in names.items()}


def _cells(values: dict[str, np.ndarray]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, drawn in values.items():
        low, high = interval(drawn[None, 1:])[0]
        cells |= {name: number(drawn[0]), f"{name}_low": number(low), f"{name}_high": number(high)}
    return cells


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
