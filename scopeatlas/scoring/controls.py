"""The controls that stand beside every score, and what is counted as a discovery.

What belongs here: which controls a scorer must have, whose label stands in for whose, and false discovery over features.
What does not: scoring an arm (`execution.py`, `judged.py`, `retrieval.py`, `writes.py`), or showing it (`report.py`).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.scoring.sequential import q_values
from scopeatlas.scoring.table import Arm, Scorer

REQUIRED: dict[Scorer, tuple[Arm, ...]] = {
    "rule_execution": ("shuffled", "constant", "trigger_tokens"),
    "detection": ("shuffled", "constant", "trigger_tokens"),
    "fuzzing": ("shuffled", "constant"),
    "intruder": ("constant",),  # no label is shown, so there is none to shuffle
    "simulation": ("shuffled", "trigger_tokens"),  # a constant correlates with nothing
    "retrieval": ("shuffled", "trigger_tokens"),  # a constant ranks nothing
    "steering": ("shuffled", "random_direction"),
}
"""Without these no metric of a scorer is shown."""


def partners(labels: Sequence[Label], claims: Sequence[str], groups: Sequence[str], *, seed: int) -> list[int]:
    """For each label the one that stands in for it where labels are shuffled: int, an index into `labels`.

    It is another feature's, of the same group (the unit it is tested on) if there is one, so that both count the same
    things, and never one of the same claim unless all are the same: then it is the label itself.
    """
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    turn: dict[str, list[int]] = {group: [i for i in order if groups[i] == group] for group in sorted(set(groups))}
    chosen = list(range(len(labels)))
    for candidates in (turn, {group: order for group in turn}):
        for group, members in candidates.items():
            place = {index: at for at, index in enumerate(members)}
            for index in turn[group]:
                if chosen[index] == index:
                    after = (members[(place[index] + step) % len(members)] for step in range(1, len(members)))
                    mine = labels[index].feature, claims[index]
                    others = (i for i in after if labels[i].feature != mine[0] and claims[i] != mine[1])
                    chosen[index] = next(others, index)
    return chosen


def with_q_values(table: pl.DataFrame) -> pl.DataFrame:
    """The table with q_value for every p_value: the false discovery rate over the labels of one scorer (Benjamini and
    Hochberg 1995)."""
    numbered = table.drop("q_value").with_row_index("row")
    tested = numbered.drop_nulls("p_value")
    parts = [
        part.select("row", q_value=pl.Series(q_values(part["p_value"].to_numpy().astype(np.float64)), dtype=pl.Float32))
        for part in tested.partition_by("scorer", maintain_order=True)
    ]
    found = pl.concat([pl.DataFrame(schema={"row": pl.UInt32, "q_value": pl.Float32}), *parts])
    return numbered.join(found, on="row", how="left").sort("row").select(table.columns)
