"""What the scores of an SAE's labels show: coverage, refusals, and every metric beside its controls.

What belongs here: means, their intervals, and saying them. What does not: scoring, or choosing controls (`controls.py`). No
metric leaves this module without the controls that its scorer must have.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from pydantic import TypeAdapter, ValidationError

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.hypotheses.metrics import BOOTSTRAP_DRAWS, interval
from scopeatlas.judges.rounds import WINDOWS_PER_REQUEST
from scopeatlas.scoring.controls import REQUIRED
from scopeatlas.scoring.table import MAIN_METRIC, Arm, Scorer, arm, own
from scopeatlas.storage.files import read_json
from scopeatlas.storage.uris import Location

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
"""Arms whose rows are of other rules: there means are compared, elsewhere the differences of the same label."""
SAMPLED = ("f1", "auprc")
"""What depends on the share of positives, which is drawn where the unit is a window."""


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
    """One metric of one scorer beside one control. labels: that the own arm is the mean of. basis: on what, where that is
    not everything at its natural rate."""

    scorer: Scorer
    metric: str
    control: Arm
    labels: int
    basis: str
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
class RandomDirections:
    """What the rule labeller makes of random directions, and of the features that these are like: how many it labelled.
    densities: lowest and highest of those features; None if unknown."""

    directions: int
    labelled: int
    features: int
    features_labelled: int
    densities: tuple[float, float] | None

    def __str__(self) -> str:
        spread = ", of density {:.1e} to {:.1e},".format(*self.densities) if self.densities else ""
        return (
            f"{self.labelled:,} of {self.directions:,} labelled by a rule, "
            f"beside {self.features_labelled:,} of the {self.features:,} features{spread} that they are matched to"
        )


@dataclass(frozen=True)
class Report:
    """labelled of features have a current label; refusals: the others by reason. documents: of the corpus by split.
    random_directions: None where there are none."""

    features: int
    labelled: int
    methods: dict[str, int]
    refusals: dict[str, int]
    documents: dict[str, int]
    random_directions: RandomDirections | None
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
            lines.append(f"random directions of the same norm and density: {self.random_directions}")
        else:
            lines.append("random directions of the same norm and density: not there")
        for summary in self.scorers:
            lines += _scorer_lines(summary)
        return lines


def read_report(path: Location) -> Report:
    """The report that was written as JSON. Raises StoreError if there is none, or it is damaged."""
    try:
        return TypeAdapter(Report).validate_python(read_json(path))
    except ValidationError as error:
        raise StoreError(f"{path} is no report of scores; delete it and score the labels again") from error


def report(
    scores: pl.DataFrame,
    labels: pl.DataFrame,
    *,
    documents: Mapping[str, int],
    null_densities: tuple[float, float] | None = None,
) -> Report:
    """The report on a table of scores (SCORE_SCHEMA) and the labels it tests (LABEL_SCHEMA). documents: by split.
    null_densities: the lowest and highest of the features that random directions are matched to."""
    current = labels.filter(pl.col("current"))
    labelled = current.filter(pl.col("status") == "ok")
    refused = current.join(labelled, on="feature", how="anti").unique("feature", keep="first", maintain_order=True)
    return Report(
        features=labels["feature"].n_unique(),
        labelled=labelled["feature"].n_unique(),
        methods=_counts(labelled["method"]),
        refusals=_counts(refused["status"]),
        documents=dict(documents),
        random_directions=_random_directions(scores, labels, null_densities),
        scorers=tuple(_summary(scores, scorer) for scorer in REQUIRED if (scores["scorer"] == scorer).any()),
    )


def _random_directions(
    scores: pl.DataFrame, labels: pl.DataFrame, densities: tuple[float, float] | None
) -> RandomDirections | None:
    nulls = arm(scores, "random_direction").filter(pl.col("scorer") == "rule_execution")
    if nulls.is_empty():
        return None
    matched = nulls.select("feature").unique()
    ruled = labels.filter((pl.col("method") == "rule") & (pl.col("status") == "ok")).select("feature").unique()
    found = int((nulls["status"] != "not_applicable").sum())
    return RandomDirections(len(nulls), found, len(matched), len(matched.join(ruled, on="feature")), densities)


def compare(scores: pl.DataFrame, scorer: Scorer, metric: str) -> tuple[Comparison, ...]:
    """A metric of a scorer beside every control that was run, over the labels that have every control that they must have.

    Where testing may stop early, of the main metric on the first round alone: a mean of estimates that were stopped when they
    were high is too high. There is none of any other metric then. Raises NotReadyError if a control that it must have was
    not run.
    """
    missing = _missing(scores, scorer)
    if missing:
        raise NotReadyError(f"{metric} of {scorer} is not shown without its controls; score the labels again: no {missing} rows")
    tested = scores.filter((pl.col("scorer") == scorer) & (pl.col("status") == "scored"))
    is_main, stops = metric == MAIN_METRIC[scorer], tested["first_round"].is_not_null().any()
    if stops and not is_main:
        return ()
    column = "first_round" if stops else metric
    mine = own(tested).select("feature", "label_id", "method", own=column)
    for name in REQUIRED[scorer]:
        mine = mine.join(arm(tested, name), on="label_id", how="semi")
    mine, tested = mine.drop_nulls(), tested.drop_nulls(column)
    comparisons = []
    for name in tested.filter(pl.col("arm") != "own")["arm"].unique().sort():
        rows = arm(tested, name).select("label_id", "against", control=column)
        basis = _bases(tested, metric, stops=stops)
        if scorer == "rule_execution" and name in UNPAIRED:
            beside = mine
            if name == "random_direction":
                matched = arm(scores, name).filter(pl.col("scorer") == scorer)
                beside = mine.filter(pl.col("method") == "rule").join(matched, on="feature", how="semi")
                basis.append("rules of the matched features")
            values, paired = (beside["own"].to_numpy(), rows["control"].to_numpy()), False
        else:
            pairs = mine.join(rows, on="label_id")
            if rows["against"].is_not_null().any():  # not on the windows of the own row
                if not is_main:
                    continue
                pairs = pairs.with_columns(own="against").drop_nulls("own")
                basis.append("without windows drawn for a trigger token")
            values, paired = (pairs["own"].to_numpy(), pairs["control"].to_numpy()), True
        if len(values[0]) and len(values[1]):
            means = _means(*values, paired=paired)
            comparisons.append(Comparison(scorer, metric, name, len(values[0]), ", ".join(basis), *means))
    return tuple(comparisons)


def _bases(tested: pl.DataFrame, metric: str, *, stops: bool) -> list[str]:
    """What a metric rests on, where that is not everything at its natural rate. tested: the scored rows of one scorer."""
    mine = own(tested)
    if stops:
        return [f"first round of about {WINDOWS_PER_REQUEST} windows"]
    if metric not in SAMPLED or mine.is_empty() or mine["unit"][0] != "window":
        return []
    constant = arm(tested, "constant").drop_nulls("precision")  # which is the share of positives
    shown = mine.select("positives", *(f"negatives_{kind}" for kind in ("random", "trigger", "neighbour"))).sum().row(0)
    share = constant["precision"].mean() if len(constant) else shown[0] / max(sum(n or 0 for n in shown), 1)
    return [f"at {100 * share:.0f} of 100 windows positive"]  # type: ignore[operator]


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
        basis = f" ({found.basis})" if found.basis else ""
        drawn = f"means of {found.labels:,} labels, 95 % intervals over labels"
        lines.append(f"  {found.metric}{basis} {found.own} beside {beside} ({drawn})")
    if summary.tokens:
        cost = f" ({summary.usd:.2f} usd)" if summary.usd is not None else ""
        lines.append(f"  spent: {summary.tokens:,} tokens{cost}")
    return lines
