"""Rule execution: rules run on report documents, against where their features fire. No judge is needed.

What belongs here: the rows of scorer "rule_execution". What does not: counting hits (`hypotheses/units.py`), the arithmetic
(`hypotheses/metrics.py`), or which rule stands in for which (`controls.py`).

A rule is tested at the natural rate of firing, on every token (or, for a topic, every context) of the report documents. A
unit is positive where the feature's value is above 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.metrics import (
    CLAIM_METRICS,
    DocumentCounts,
    Lift,
    bootstrap_intervals,
    paired_lift,
    point_metrics,
)
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import trigger_tokens
from scopeatlas.hypotheses.surface import word_of
from scopeatlas.hypotheses.units import Firings, Units, claims_at, document_counts
from scopeatlas.scoring.controls import NO_PARTNER, partners
from scopeatlas.scoring.places import DECILES, list_places, of_rows, silent_places, strata
from scopeatlas.scoring.table import Arm, Cell, number

TILE_LABELS = 2048


@dataclass(frozen=True)
class _Tested:
    """Some labels on report documents. Row i is label i: its feature's firings, and places where the feature is silent.

    fires: every firing. peaks: the positive units, a context by its peak; decile: int [n] of each. trigger, neighbour:
    negatives, the first where one of the feature's trigger tokens stands, the second where the nearest other feature fires.
    All are `Firings` whose features are row numbers. alone: bool [n], whether no rule can stand in for it.
    """

    labels: Sequence[Label]
    alone: np.ndarray
    fires: Firings
    peaks: Firings
    decile: np.ndarray
    trigger: Firings
    neighbour: Firings


@dataclass(frozen=True)
class _Outcome:
    """What the rules of one arm claim, by row: counts by document, recall by decile float64 [rows, DECILES], and specificity
    at trigger and neighbour places [rows]; NaN where there is nothing to claim."""

    units: tuple[str, ...]
    counts: DocumentCounts
    recall: np.ndarray
    trigger: np.ndarray
    neighbour: np.ndarray


def execute_rules(
    units: Units, firings: Firings, labels: Sequence[Label], *, neighbours: Neighbours | None, min_documents: int, seed: int
) -> list[dict[str, Cell]]:
    """Rows of every label that has a rule: its own arm and the shuffled, constant and trigger-token ones.

    firings: of every split (a feature's trigger tokens are those of explain). A label whose feature fires in fewer than
    `min_documents` report documents is refused; where no rule says anything else, the shuffled arm does not apply.
    """
    ruled = [label for label in labels if label.rule]
    rules = [Rule.from_json(label.rule) for label in ruled]
    other = partners(ruled, [label.rule for label in ruled], [rule.unit for rule in rules], seed=seed)
    rows: list[dict[str, Cell]] = []
    for start in range(0, len(ruled), TILE_LABELS):
        tile = range(start, min(start + TILE_LABELS, len(ruled)))
        mine = [rules[i] for i in tile]
        lists = trigger_rules(units, firings, [ruled[i].feature for i in tile], mine)
        tested = _tested(units, firings, [ruled[i] for i in tile], mine, lists, neighbours)
        tested = replace(tested, alone=np.array([other[i] == i for i in tile], dtype=bool))
        arms: dict[Arm, list[Rule]] = {"own": mine, "shuffled": [rules[other[i]] for i in tile], "trigger_tokens": lists}
        rows += _score(units, tested, arms, min_documents=min_documents, seed=seed)
    return rows


def trigger_rules(units: Units, firings: Firings, features: Sequence[int], rules: Sequence[Rule]) -> list[Rule]:
    """For each rule the bare list of the tokens its feature most often fires on in explain documents, untuned: as a token
    rule, or where contexts are the unit, as the words that a context may hold."""
    table = trigger_tokens(units, firings, features)
    texts = units.column("token")[1]
    keys: dict[int, list[str]] = {}
    for feature, key in table.select("feature", "key").iter_rows():
        keys.setdefault(feature, []).append(texts[key])
    lists = []
    for feature, rule in zip(features, rules, strict=True):
        mine = keys.get(feature, [])
        words = tuple(dict.fromkeys(word for text in mine if (word := word_of(text))))
        lists.append(Rule("topic", words) if rule.unit == "context" else Rule("token", tuple(mine)))
    return lists


def _tested(
    units: Units,
    firings: Firings,
    labels: Sequence[Label],
    rules: Sequence[Rule],
    lists: Sequence[Rule],
    neighbours: Neighbours | None,
) -> _Tested:
    report = firings.within(units, "report")
    features = np.array([label.feature for label in labels], dtype=np.int64)
    by_context = np.array([rule.unit == "context" for rule in rules], dtype=bool)
    fires = of_rows(report, features)
    nearest = np.full(len(labels), -1)
    if neighbours is not None:
        cosine, coactive = neighbours.cosine[features, 0], neighbours.coactive[features, 0]
        nearest = np.where(cosine >= 0, cosine, coactive)
    return _Tested(
        labels,
        np.zeros(len(labels), dtype=bool),
        fires,
        *strata(units, fires, by_context),
        silent_places(units, list_places(units, lists), fires, by_context),
        silent_places(units, of_rows(report, nearest), fires, by_context),
    )


def _score(
    units: Units, tested: _Tested, arms: Mapping[Arm, list[Rule]], *, min_documents: int, seed: int
) -> list[dict[str, Cell]]:
    outcomes: dict[Arm, _Outcome] = {arm: _outcome(units, tested, rules) for arm, rules in arms.items()}
    own = outcomes["own"]
    silent = np.zeros(len(tested.labels))
    outcomes["constant"] = replace(
        own, counts=own.counts.constant(), recall=np.ones_like(own.recall), trigger=silent, neighbour=silent
    )
    lift = paired_lift(own.counts, outcomes["shuffled"].counts, seed=seed)
    return [row for arm, outcome in outcomes.items() for row in _rows(tested, arm, outcome, lift, min_documents, seed)]


def _outcome(units: Units, tested: _Tested, rules: Sequence[Rule]) -> _Outcome:
    numbered = dict(enumerate(rules))
    rows = len(rules)
    counts = document_counts(units, tested.fires, numbered, list(numbered), split="report")
    hits = [
        claims_at(units, numbered, places.feature, places.position) for places in (tested.peaks, tested.trigger, tested.neighbour)
    ]
    stratum = tested.peaks.feature.astype(np.int64) * DECILES + tested.decile
    return _Outcome(
        tuple(rule.unit for rule in rules),
        counts,
        _shares(stratum, hits[0], rows * DECILES).reshape(rows, DECILES),
        1 - _shares(tested.trigger.feature, hits[1], rows),
        1 - _shares(tested.neighbour.feature, hits[2], rows),
    )


def _rows(tested: _Tested, arm: Arm, outcome: _Outcome, lift: Lift, min_documents: int, seed: int) -> list[dict[str, Cell]]:
    """The rows of one arm. Metrics are null where the label is refused."""
    counts = outcome.counts
    point, bounds = point_metrics(counts), bootstrap_intervals(counts, seed=seed)
    measured = {"specificity_trigger": outcome.trigger, "specificity_neighbour": outcome.neighbour}
    fired, units = counts.fired.sum(axis=1), counts.units.sum(axis=1)
    wrong = counts.claimed.sum(axis=1) - counts.true_positive.sum(axis=1)
    measured["specificity_random"] = 1 - np.divide(wrong, units - fired, out=np.full(len(fired), np.nan), where=units > fired)
    for name in CLAIM_METRICS:
        measured |= {name: getattr(point, name), f"{name}_low": bounds[name][:, 0], f"{name}_high": bounds[name][:, 1]}
    if arm == "own":
        lifts = {"lift": lift.value, "lift_low": lift.low, "lift_high": lift.high, "p_value": lift.p_value}
        measured |= {name: np.where(tested.alone, np.nan, values) for name, values in lifts.items()}
    documents = (counts.fired > 0).sum(axis=1)
    places = [np.bincount(of.feature, minlength=len(fired)) for of in (tested.trigger, tested.neighbour)]
    rows: list[dict[str, Cell]] = []
    for i, label in enumerate(tested.labels):
        row: dict[str, Cell] = {
            "feature": label.feature,
            "label_id": label.label_id,
            "method": label.method,
            "claim": "reads",
            "scorer": "rule_execution",
            "arm": arm,
            "status": "scored" if documents[i] >= min_documents else "too_few_documents",
            "unit": outcome.units[i],
            "documents": int(documents[i]),
            "positives": int(fired[i]),
            "negatives_random": int(units[i] - fired[i]),
            "negatives_trigger": int(places[0][i]),
            "negatives_neighbour": int(places[1][i]),
        }
        if row["status"] == "scored" and arm == "shuffled" and tested.alone[i]:
            row |= NO_PARTNER
        if row["status"] == "scored":
            row |= {name: number(values[i]) for name, values in measured.items()}
            row["recall_by_decile"] = [number(share) for share in outcome.recall[i]]
        rows.append(row)
    return rows


def _shares(group: np.ndarray, hits: np.ndarray, groups: int) -> np.ndarray:
    """The share of hits in each group: float64 [groups], NaN where a group has no member."""
    members = np.bincount(group, minlength=groups)
    found = np.bincount(group, weights=hits, minlength=groups)
    return np.divide(found, members, out=np.full(groups, np.nan), where=members > 0)
