"""Where the units lie that labels are tested on: positives by strength, and the kinds of negatives.

What belongs here: places, as `Firings` whose features are the rows of a test (a label each, so that several labels of one
feature can be tested side by side). What does not: what is claimed there (`execution.py`, `outcomes.py`).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import POOL
from scopeatlas.hypotheses.units import Firings, Units

DECILES = 10


def of_rows(firings: Firings, features: np.ndarray) -> Firings:
    """The firings of features[i] as those of feature i; none where it is -1."""
    rows = pl.DataFrame({"feature": features, "row": np.arange(len(features))}, schema={"feature": pl.Int64, "row": pl.UInt32})
    table = pl.DataFrame(
        {"feature": firings.feature.astype(np.int64), "position": firings.position, "value": firings.value},
        schema_overrides={"value": pl.Float32},
    )
    table = table.join(rows, on="feature", maintain_order="left")
    return as_firings(table, len(features))


def list_places(units: Units, lists: Sequence[Rule]) -> Firings:
    """Where each list's tokens (or, of contexts, words) stand in report documents: at most POOL places of each, evenly
    spread."""
    column_of = {"token": "token", "topic": "word"}
    inside = np.flatnonzero(units.in_split("report"))
    parts: list[pl.DataFrame] = []
    for kind, column in column_of.items():
        members = [(row, units.key_of(column, text)) for row, rule in enumerate(lists) if rule.kind == kind for text in rule.keys]
        wanted = pl.DataFrame(members, schema={"row": pl.UInt32, "key": pl.Int32}, orient="row")
        keys = units.column(column)[0][inside]
        pool = pl.DataFrame({"key": keys, "position": inside}, schema={"key": pl.Int32, "position": pl.Int64})
        pool = pool.join(wanted.select("key").unique(), on="key", how="semi")
        step = (pl.len().over("key") + POOL - 1) // POOL
        pool = pool.filter(pl.int_range(pl.len()).over("key") % step == 0)
        parts.append(wanted.join(pool, on="key").select("row", "position"))
    table = pl.concat(parts).unique(maintain_order=True)
    return as_firings(table.with_columns(value=pl.lit(0.0, dtype=pl.Float32)), len(lists))


def silent_places(units: Units, places: Firings, fires: Firings, by_context: np.ndarray) -> Firings:
    """Those places where the same row does not fire: at that token, or where by_context [rows] says so, in that context."""
    length = units.contexts * units.length

    def unit_of(of: Firings) -> np.ndarray:
        first = of.position - of.position % units.length
        return of.feature.astype(np.int64) * length + np.where(by_context[of.feature], first, of.position)

    mine = unit_of(places)
    _, first = np.unique(mine, return_index=True)  # one place stands for its context
    kept = np.intersect1d(first, np.flatnonzero(~np.isin(mine, unit_of(fires))))
    return Firings(places.feature[kept], places.position[kept], places.width, value=places.value[kept])


def strata(units: Units, fires: Firings, by_context: np.ndarray) -> tuple[Firings, np.ndarray]:
    """The positive units of each row (a context by its peak), and the decile of each among the row's, 0 weakest to 9."""
    table = pl.DataFrame({"row": fires.feature, "position": fires.position, "value": fires.value})
    context = pl.when(pl.Series(by_context).gather(fires.feature)).then(pl.col("position") // units.length).otherwise(-1)
    table = table.with_columns(unit=context).sort("row", "value", "position", descending=[False, True, False])
    one = table.filter((pl.col("unit") < 0) | (pl.int_range(pl.len()).over("row", "unit") == 0))
    rank, steps = pl.col("value").rank("max").over("row").cast(pl.Int64) - 1, pl.len().over("row").cast(pl.Int64) - 1
    one = one.with_columns(decile=(DECILES * rank // pl.max_horizontal(steps, 1)).clip(0, DECILES - 1))
    return as_firings(one, fires.width), one["decile"].to_numpy()


def as_firings(table: pl.DataFrame, width: int) -> Firings:
    """A table of row, position and value as the firings of features 0, 1, ...: the row numbers."""
    row = table["row"].cast(pl.UInt32).to_numpy()
    return Firings(row, table["position"].to_numpy(), width, value=table["value"].to_numpy())
