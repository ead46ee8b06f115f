"""Where a tested label was right and where it was not, as text: hits, misses and false alarms on report documents.

What belongs here: choosing a few of each and cutting the text around them. What does not: metrics, or showing them
(`rendering/`, the previews of the pipeline).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units, claims, claims_at, is_among
from scopeatlas.mining.windows import mark
from scopeatlas.scoring.execution import TILE_LABELS
from scopeatlas.scoring.places import of_rows, strata
from scopeatlas.scoring.table import Scorer
from scopeatlas.scoring.trials import Trial

PER_OUTCOME = 3
BEFORE, AFTER = 20, 12
"""Tokens that are shown around a place."""

OUTCOME_SCHEMA = {
    "feature": pl.UInt32,
    "label_id": pl.String,
    "label": pl.String,
    "scorer": pl.String,
    "outcome": pl.String,  # hit, miss or false_alarm
    "text": pl.String,  # «» around the tokens that fire or, in a false alarm, around what was claimed to
}


def rule_outcomes(units: Units, firings: Firings, labels: Sequence[Label]) -> pl.DataFrame:
    """At most PER_OUTCOME hits, misses and false alarms of every label that has a rule: OUTCOME_SCHEMA."""
    ruled = [label for label in labels if label.rule]
    parts = [pl.DataFrame(schema=OUTCOME_SCHEMA)]
    for start in range(0, len(ruled), TILE_LABELS):
        tile = ruled[start : start + TILE_LABELS]
        rules = [Rule.from_json(label.rule) for label in tile]
        fires = of_rows(firings.within(units, "report"), np.array([label.feature for label in tile], dtype=np.int64))
        by_context = np.array([rule.unit == "context" for rule in rules], dtype=bool)
        chosen = _chosen(units, pl.concat([_positives(units, fires, rules, by_context), _false_alarms(units, fires, rules)]))
        parts.append(_cut(units, fires, tile, chosen))
    return pl.concat(parts)


def verdict_outcomes(scorer: Scorer, trials: Sequence[Trial]) -> pl.DataFrame:
    """The same of labels that a judge has read: whole windows, of those that were shown."""
    rows = []
    for trial in trials:
        verdicts = [float(v) >= 0.5 for one in trial.answers.get("own", [])[: trial.played] for v in one]  # type: ignore[arg-type]
        left: dict[str, int] = {"hit": PER_OUTCOME, "miss": PER_OUTCOME, "false_alarm": PER_OUTCOME} if trial.is_scored else {}
        for row, claimed in zip(trial.rows_shown(), verdicts, strict=False):
            window = trial.windows.row(row, named=True)
            outcome = _outcome(window["kind"] == "positive", claimed)
            if left.get(outcome, 0):
                left[outcome] -= 1
                text = mark(window["texts"], window["activations"])
                rows.append((trial.label.feature, trial.label.label_id, trial.label.label, scorer, outcome, text))
    return pl.DataFrame(rows, schema=OUTCOME_SCHEMA, orient="row")


def _outcome(fires: bool, claimed: bool) -> str:
    return ("hit" if claimed else "miss") if fires else ("false_alarm" if claimed else "")


def _positives(units: Units, fires: Firings, rules: Sequence[Rule], by_context: np.ndarray) -> pl.DataFrame:
    """Every unit that fires: row, position, outcome."""
    peaks, _ = strata(units, fires, by_context)
    hit = claims_at(units, dict(enumerate(rules)), peaks.feature, peaks.position)
    outcome = np.where(hit, "hit", "miss")
    return pl.DataFrame({"row": peaks.feature.astype(np.int64), "position": peaks.position, "outcome": outcome}, _PLACES)


def _false_alarms(units: Units, fires: Firings, rules: Sequence[Rule]) -> pl.DataFrame:
    """Every unit that is claimed and silent, a context by its first token: row, position, outcome."""
    row, position = claims(units, rules, "report")
    counted = units.counted.reshape(units.contexts, units.length)
    contexts = np.flatnonzero((units.context_split == SPLITS.index("report")) & counted.any(axis=1))
    topics = np.array([i for i, rule in enumerate(rules) if rule.unit == "context"], dtype=np.int64)
    topic, place = (
        np.repeat(topics, len(contexts)),
        np.tile(contexts * units.length + counted[contexts].argmax(axis=1), len(topics)),
    )
    claimed = claims_at(units, dict(enumerate(rules)), topic, place) if len(topics) else np.zeros(0, dtype=bool)
    size = len(units.split)
    silent = ~is_among(row * size + position, fires.packed(units))
    quiet = ~np.isin(topic * size + place // units.length, fires.feature.astype(np.int64) * size + fires.position // units.length)
    rows, places = np.r_[row[silent], topic[claimed & quiet]], np.r_[position[silent], place[claimed & quiet]]
    return pl.DataFrame({"row": rows, "position": places, "outcome": ["false_alarm"] * len(rows)}, _PLACES)


_PLACES: Mapping[str, type[pl.DataType]] = {"row": pl.Int64, "position": pl.Int64, "outcome": pl.String}


def _chosen(units: Units, places: pl.DataFrame) -> pl.DataFrame:
    """At most PER_OUTCOME of each row and outcome, of different documents as far as there are any, at random."""
    draw = (places["position"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
    table = places.with_columns(document=pl.Series(units.document[places["position"].to_numpy()]), draw=pl.Series(draw))
    table = table.sort("row", "outcome", "draw")
    table = table.with_columns(turn=pl.int_range(pl.len()).over("row", "outcome", "document"))
    return table.sort("row", "outcome", "turn", "draw").group_by("row", "outcome", maintain_order=True).head(PER_OUTCOME)


def _cut(units: Units, fires: Firings, labels: Sequence[Label], places: pl.DataFrame) -> pl.DataFrame:
    size, packed = len(units.split), fires.packed(units)
    rows = []
    for row, position, outcome in places.select("row", "position", "outcome").iter_rows():
        context, at = divmod(position, units.length)
        start, stop = max(0, at - BEFORE), min(units.length, at + AFTER)
        window = context * units.length + np.arange(start, stop)
        marked = is_among(row * size + window, packed)
        if outcome == "false_alarm":
            marked = window == position
        label = labels[row]
        text = mark(units.text_of(context, start, stop), marked.astype(np.float32).tolist())
        rows.append((label.feature, label.label_id, label.label, "rule_execution", outcome, text))
    return pl.DataFrame(rows, schema=OUTCOME_SCHEMA, orient="row")
