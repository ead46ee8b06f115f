"""The controls that stand beside every score, and what is counted as a discovery.

What belongs here: which controls a scorer must have, whose label stands in for whose, and false discovery over features.
What does not: scoring an arm (`execution.py`, `judged.py`, `retrieval.py`, `writes.py`), or showing it (`report.py`).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.scoring.sequential import q_values
from scopeatlas.scoring.table import Arm, Cell, Scorer
from scopeatlas.storage.files import unit_hash

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
NO_PARTNER: dict[str, Cell] = {"status": "not_applicable", "note": "no other feature's label says anything else"}
"""Of the shuffled row of a label that `partners` gives none."""


def partners(labels: Sequence[Label], claims: Sequence[str], groups: Sequence[str], *, seed: int) -> list[int]:
    """For each label the one that stands in for it where labels are shuffled: int, an index into `labels`.

    It is another feature's, of another claim, of the same group (the unit it is tested on) if there is one, so that both
    count the same things. Where there is none it is the label's own index, which is no control: its shuffled arm does not
    apply. Labels stand on a ring by a hash of their ids and take the next that fits, so that one label more gives about one
    other label another partner, and what was asked of the rest is not asked anew.
    """
    order = sorted(range(len(labels)), key=lambda i: unit_hash("partner", f"{seed}:{labels[i].label_id}"))
    chosen = list(range(len(labels)))
    for ring_of in (groups, [""] * len(labels)):
        rings: dict[str, list[int]] = {}
        for index in order:
            rings.setdefault(ring_of[index], []).append(index)
        for ring in rings.values():
            for place, index in enumerate(ring):
                if chosen[index] == index:
                    after = (ring[(place + step) % len(ring)] for step in range(1, len(ring)))
                    mine = labels[index].feature, claims[index]
                    chosen[index] = next((i for i in after if labels[i].feature != mine[0] and claims[i] != mine[1]), index)
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
