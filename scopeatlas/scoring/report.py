"""What the scores of an SAE's labels show: coverage, refusals, and every metric beside its controls.

What belongs here: means, their intervals, and saying them. What does not: scoring, or choosing controls (`controls.py`). No
metric leaves this module without the controls that its scorer must have.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import TypeAdapter, ValidationError

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.hypotheses.metrics import BOOTSTRAP_DRAWS, interval
from scopeatlas.scoring.controls import REQUIRED
from scopeatlas.scoring.table import MAIN_METRIC, Arm, Scorer, arm, own
from scopeatlas.storage.files import read_json

SHOWN: dict[Scorer, tuple[str, ...]] = {
    "rule_execution": ("balanced_accuracy", "f1", "auprc", "specificity_trigger", "specificity_neighbour"),
    "detection": ("balanced_accuracy", "f1", "auprc", "specificity_random", "specificity_trigger", "specificity_neighbour"),
    "fuzzing": ("balanced_accuracy", "f1"),
    "intruder": ("balanced_accuracy",),
    "simulation": ("correlation",),
    "retrieval": ("auroc", "auprc"),
    "steering": ("auroc",),
}
DISCOVERY_RATE = 0.05
UNPAIRED = ("random_direction", "random_model")
"""Arms whose rows may be of other labels: there means are compared, elsewhere the differences of the same label."""


@dataclass(frozen=True)
class Mean:
    """A mean over labels with its 95 % interval, from a bootstrap over labels."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """One metric of one scorer beside one control. labels: that the own arm is the mean of."""

    scorer: Scorer
    metric: str
    control: Arm
    labels: int
    own: Mean
    controlled: Mean
    lift: Mean


@dataclass(frozen=True)
class ScorerSummary:
    """One scorer. statuses: rows of the own arm by status. documents: fewest, median and most report documents of a
    scored label. discoveries: labels above the shuffled arm at a false discovery rate of DISCOVERY_RATE. missing: required
    controls without a row, for want of which nothing is compared. tokens, usd: spent on all arms."""

    scorer: Scorer
    statuses: dict[str, int]
    units: dict[str, int]
    documents: tuple[int, int, int]
    discoveries: int
    missing: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    tokens: int
    usd: float | None


@dataclass(frozen=True)
class Report:
    """labelled of features have a current label; refusals: the others by reason. documents: of the corpus by split.
    random_directions: how many random directions the rule labeller was run on, and how many it labelled all the same."""

    features: int
    labelled: int
    methods: dict[str, int]
    refusals: dict[str, int]
    documents: dict[str, int]
    random_directions: tuple[int, int] | None
    scorers: tuple[ScorerSummary, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain data, as it is written to disk."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        refused = ", ".join(f"{status} {count:,}" for status, count in self.refusals.items()) or "none"
        methods = ", ".join(f"{method} {count:,}" for method, count in self.methods.items()) or "none"
        documents = ", ".join(f"{split} {count:,}" for split, count in self.documents.items())
        lines = [
            f"labelled: {self.labelled:,} of {self.features:,} features ({methods}); refused: {refused}",
            f"documents: {documents}",
        ]
        if self.random_directions:
            tried, found = self.random_directions
            lines.append(f"random directions of the same norm and density: {found:,} of {tried:,} labelled by a rule")
        else:
            lines.append("random directions of the same norm and density: not there")
        for summary in self.scorers:
            lines += _scorer_lines(summary)
        return lines


def read_report(path: Path) -> Report:
    """The report that was written as JSON. Raises StoreError if there is none, or it is damaged."""
    try:
        return TypeAdapter(Report).validate_python(read_json(path))
    except ValidationError as error:
        raise StoreError(f"{path} is no report of scores; delete it and score the labels again") from error


def report(scores: pl.DataFrame, labels: pl.DataFrame, *, documents: Mapping[str, int]) -> Report:
    """The report on a table of scores (SCORE_SCHEMA) and the labels it tests (LABEL_SCHEMA). documents: by split."""
    current = labels.filter(pl.col("current"))
    labelled = current.filter(pl.col("status") == "ok")
    refused = current.join(labelled, on="feature", how="anti").unique("feature", keep="first", maintain_order=True)
    nulls = arm(scores, "random_direction").filter(pl.col("scorer") == "rule_execution")
    return Report(
        features=labels["feature"].n_unique(),
        labelled=labelled["feature"].n_unique(),
        methods=_counts(labelled["method"]),
        refusals=_counts(refused["status"]),
        documents=dict(documents),
        random_directions=(len(nulls), int((nulls["status"] != "not_applicable").sum())) if len(nulls) else None,
        scorers=tuple(_summary(scores, scorer) for scorer in REQUIRED if (scores["scorer"] == scorer).any()),
    )


def compare(scores: pl.DataFrame, scorer: Scorer, metric: str) -> tuple[Comparison, ...]:
    """A metric of a scorer beside every control that was run. Raises NotReadyError if one that it must have was not."""
    missing = _missing(scores, scorer)
    if missing:
        raise NotReadyError(f"{metric} of {scorer} is not shown without its controls; score the labels again: no {missing} rows")
    tested = scores.filter((pl.col("scorer") == scorer) & (pl.col("status") == "scored")).drop_nulls(metric)
    mine = own(tested).select("feature", "label_id", own=metric)
    comparisons = []
    for name in tested["arm"].unique().sort():
        if name == "own":
            continue
        rows = tested.filter(pl.col("arm") == name).select("label_id", control=metric)
        paired = mine.join(rows, on="label_id")
        if len(paired):
            values = paired["own"].to_numpy(), paired["control"].to_numpy()
        elif name in UNPAIRED and len(mine) and len(rows):
            values = mine["own"].to_numpy(), rows["control"].to_numpy()
        else:
            continue
        comparisons.append(Comparison(scorer, metric, name, len(values[0]), *_means(*values, paired=len(paired) > 0)))
    return tuple(comparisons)


def _means(mine: np.ndarray, control: np.ndarray, *, paired: bool) -> tuple[Mean, Mean, Mean]:
    """Own, control and their difference; paired: by label, so that both are drawn together."""
    generator = np.random.default_rng(0)
    drawn_own = generator.integers(0, len(mine), (BOOTSTRAP_DRAWS, len(mine)))
    drawn_control = drawn_own if paired else generator.integers(0, len(control), (BOOTSTRAP_DRAWS, len(control)))
    draws = mine[drawn_own].mean(axis=1), control[drawn_control].mean(axis=1)
    one, other = float(mine.mean()), float(control.mean())
    return _mean(one, draws[0]), _mean(other, draws[1]), _mean(one - other, draws[0] - draws[1])


def _mean(value: float, drawn: np.ndarray) -> Mean:
    low, high = interval(drawn[None])[0]
    return Mean(value, float(low), float(high))


def _summary(scores: pl.DataFrame, scorer: Scorer) -> ScorerSummary:
    rows = scores.filter(pl.col("scorer") == scorer)
    mine = own(rows)
    scored = mine.filter(pl.col("status") == "scored")
    documents = scored["documents"]
    missing = _missing(scores, scorer)
    usd = rows["usd"].drop_nulls()
    return ScorerSummary(
        scorer=scorer,
        statuses=_counts(mine["status"]),
        units=_counts(scored["unit"]),
        documents=tuple(int(q) for q in np.quantile(documents, [0, 0.5, 1])) if len(documents) else (0, 0, 0),  # type: ignore[arg-type]
        discoveries=int((scored["q_value"] <= DISCOVERY_RATE).sum()),
        missing=missing,
        comparisons=() if missing else tuple(c for metric in SHOWN[scorer] for c in compare(scores, scorer, metric)),
        tokens=int(rows.select(pl.sum("prompt_tokens") + pl.sum("completion_tokens")).item()),
        usd=float(usd.sum()) if len(usd) else None,
    )


def _missing(scores: pl.DataFrame, scorer: Scorer) -> tuple[Arm, ...]:
    """The controls that a scorer must have and that no scored row of it stands beside."""
    there = set(scores.filter((pl.col("scorer") == scorer) & (pl.col("status") == "scored"))["arm"])
    return tuple(name for name in REQUIRED[scorer] if name not in there)


def _counts(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, most often first."""
    counted = values.value_counts().sort("count", values.name, descending=[True, False])
    return {str(value): int(count) for value, count in counted.iter_rows()}


def _scorer_lines(summary: ScorerSummary) -> list[str]:
    statuses = ", ".join(f"{status} {count:,}" for status, count in summary.statuses.items())
    units = ", ".join(f"{unit}s {count:,}" for unit, count in summary.units.items())
    fewest, median, most = summary.documents
    lines = [f"{summary.scorer}: {statuses}"]
    if summary.units:
        lines[0] += f" (units: {units}; report documents per label: {fewest} to {most}, median {median})"
        lines.append(
            f"  {summary.discoveries:,} above the control in {MAIN_METRIC[summary.scorer]} at a false discovery rate of {DISCOVERY_RATE:.0%}"
        )
    if summary.missing and summary.units:
        lines.append(f"  no metric is shown: no {', '.join(summary.missing)} beside it")
    for found in summary.comparisons:
        beside = f"{found.control} {found.controlled}, lift {found.lift}"
        lines.append(f"  {found.metric} {found.own} beside {beside} ({found.labels:,} labels)")
    if summary.tokens:
        cost = f" ({summary.usd:.2f} usd)" if summary.usd is not None else ""
        lines.append(f"  spent: {summary.tokens:,} tokens{cost}")
    return lines
