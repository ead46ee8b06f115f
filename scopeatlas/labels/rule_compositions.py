"""Candidate rules made of two, proposed from `explain` documents.

What belongs here: what to add to a simple rule so that it says better where a feature fires. What does not: simple rules
(`rule_candidates.py`) or the choice among candidates (`rule_labeller.py`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from scopeatlas.hypotheses.columns import COLUMNS, kind_of
from scopeatlas.hypotheses.rules import Rule, RuleKind
from scopeatlas.hypotheses.units import Firings, Units, claims, count_keys, is_among, key_totals
from scopeatlas.labels.rule_candidates import RuleSettings, best_sets, worth_proposing

BASES_PER_FEATURE = 3
COMPOSITIONS_PER_FEATURE = 4
BASE_VALUES = (0.15, 0.9)
"""The F1 on explain documents between which a second rule may help: below, what a rule claims is long and no second one
makes it pass; above, it needs none."""
BASES_AT_ONCE = 1024


@dataclass(frozen=True)
class _Places:
    """Where some base rules claim their feature fires, and where it fires that they miss: base numbers and positions,
    int64; `hit` says which claims fire."""

    claimed: np.ndarray
    claimed_at: np.ndarray
    hit: np.ndarray
    missed: np.ndarray
    missed_at: np.ndarray


def base_rules(units: Units, candidates: pl.DataFrame) -> list[tuple[int, Rule]]:
    """The best few simple rules of each feature that a second rule may help: no two of one kind."""
    kind = pl.col("column").str.split(":").list.first().replace("token", "word")  # a token and its word say the same
    good = candidates.filter(pl.col("value").is_between(*BASE_VALUES)).with_columns(kind=kind)
    grouped = good.group_by("candidate", "feature", "column", "kind", maintain_order=True).agg("key")
    best = grouped.unique(["feature", "kind"], keep="first", maintain_order=True)
    best = best.filter(pl.int_range(pl.len()).over("feature") < BASES_PER_FEATURE)
    return [(row["feature"], rule_of(units, row["column"], row["key"])) for row in best.iter_rows(named=True)]


def rule_of(units: Units, column: str, keys: list[int]) -> Rule:
    """The rule that looks for some keys of a column."""
    texts = units.column(column)[1]
    return Rule(kind_of(column), tuple(texts[key] for key in keys))


def compositions(units: Units, explain: Firings, bases: list[tuple[int, Rule]], settings: RuleSettings) -> list[tuple[int, Rule]]:
    """The best rules of two for each feature, as (feature, rule), sorted: each adds to one of its `bases` the keys of one
    column that narrow it (and), widen it (or) or are its exceptions (and_not), chosen by F1 on explain documents."""
    packed = explain.packed(units)
    fired = np.bincount(explain.feature, minlength=explain.width)
    found = []
    for start in range(0, len(bases), BASES_AT_ONCE):
        tile = bases[start : start + BASES_AT_ONCE]
        places = _places(units, packed, tile)
        hits = np.bincount(places.claimed[places.hit], minlength=len(tile))
        table = pl.DataFrame(
            {
                "group": np.arange(len(tile)),
                "feature": [feature for feature, _ in tile],
                "kind": [rule.kind for _, rule in tile],
                "fired": fired[[feature for feature, _ in tile]],
                "hits_before": hits,
                "total_before": np.bincount(places.claimed, minlength=len(tile)),
                "base_cost": [settings.cost(rule) for _, rule in tile],
            },
            schema_overrides={"kind": pl.String},
        )
        second = pl.concat([_second_rules(units, places, table, column, settings) for column in COLUMNS])
        second = second.sort("feature", "value", "group", "how", "column", descending=[False, True, False, False, False])
        second = second.filter(pl.int_range(pl.len()).over("feature") < COMPOSITIONS_PER_FEATURE)
        for row in second.iter_rows(named=True):
            feature, base = tile[row["group"]]
            found.append((feature, Rule(row["how"], parts=(base, rule_of(units, row["column"], row["keys"])))))
    return found


def _places(units: Units, packed: np.ndarray, bases: list[tuple[int, Rule]]) -> _Places:
    size = len(units.split)
    claimed, at = claims(units, [rule for _, rule in bases], "explain")
    feature = np.array([feature for feature, _ in bases])
    hit = is_among(feature[claimed] * size + at, packed)
    starts = np.searchsorted(packed, feature * size)
    counts = np.searchsorted(packed, (feature + 1) * size) - starts
    base = np.repeat(np.arange(len(bases)), counts)
    fires_at = packed[np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + starts[base]] % size
    missed = ~is_among(base * size + fires_at, claimed * size + at)
    return _Places(claimed, at, hit, base[missed], fires_at[missed])


def _second_rules(units: Units, places: _Places, bases: pl.DataFrame, column: str, settings: RuleSettings) -> pl.DataFrame:
    """The best second rule from one column for each base and way of composing that is worth its cost: group, feature, how,
    column, keys, value."""
    inside = _counted(units, column, places.claimed, places.claimed_at, hits=places.hit).rename({"count": "total"})
    inside = inside.join(bases.filter(pl.col("kind") != kind_of(column)), on="group")
    outside = _counted(units, column, places.missed, places.missed_at).rename({"count": "hits"})
    outside = outside.join(bases.filter(pl.col("kind") != kind_of(column)), on="group")
    outside = outside.join(key_totals(units, "explain", column), on="key")
    outside = outside.join(inside.select("group", "key", claimed="total"), on=["group", "key"], how="left")
    outside = outside.with_columns(total=pl.col("total") - pl.col("claimed").fill_null(0))
    narrowed = inside.with_columns(hits_before=0, total_before=0)
    ways: list[tuple[RuleKind, pl.DataFrame, bool]] = [
        ("and", narrowed, False),
        ("or", outside, False),
        ("and_not", inside, True),
    ]
    cost = settings.composition_cost + settings.kind_cost(kind_of(column))
    parts = []
    for how, keys, remove in ways:
        sets = best_sets(keys, kind_of(column), cost_per_key=settings.cost_per_key, remove=remove)
        sets = sets.join(bases.select("group", "base_cost", "hits_before", "total_before"), on="group")
        before = 2 * pl.col("hits_before") / (pl.col("total_before") + pl.col("fired"))
        gained = pl.col("value") - cost > before
        sets = sets.filter(gained).with_columns(pl.col("value") - cost - pl.col("base_cost"))
        parts.append(sets.select("group", "feature", "keys", "value", how=pl.lit(how), column=pl.lit(column)))
    return pl.concat(parts)


def _counted(
    units: Units, column: str, group: np.ndarray, positions: np.ndarray, *, hits: np.ndarray | None = None
) -> pl.DataFrame:
    """`count_keys` of the keys that are worth proposing."""
    keys = units.keys_at(column, positions)
    keys[~worth_proposing(units, column)[keys]] = -1
    return count_keys(group, keys, hits=hits)
