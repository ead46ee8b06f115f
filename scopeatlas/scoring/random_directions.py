"""What rules explain of random directions: the control for the rule labeller itself.

What belongs here: its rows. What does not: drawing the directions and encoding them (`activations/nulls.py`), or reading their
firings back (`hypotheses/nulls.py`).
"""

import numpy as np

from scopeatlas.hypotheses.counts import firing_counts
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.labels.rule_labeller import RuleSettings, propose_rules, refusals
from scopeatlas.scoring.execution import execute_rules
from scopeatlas.scoring.table import Cell

_OF_THE_OWN_ARM = {"arm", "lift", "lift_low", "lift_high", "p_value"}


def random_direction_rows(
    units: Units, nulls: Firings, matched: np.ndarray, *, rules: RuleSettings, min_documents: int, seed: int
) -> list[dict[str, Cell]]:
    """Random directions of the same norm and density as features, labelled by the same labeller under the same refusals and
    tested on their own firings: one row for each, in arm "random_direction"; not_applicable where it has no rule.

    nulls: their firings. matched: uint32 [nulls.width], the feature that each is matched to, which is the row's feature.
    """
    labels = propose_rules(units, nulls, refusals(firing_counts(units, nulls), rules), rules)
    executed = execute_rules(units, nulls, labels, neighbours=None, min_documents=min_documents, seed=seed)
    scored = {row["label_id"]: row for row in executed if row["arm"] == "own"}
    rows: list[dict[str, Cell]] = []
    for label in labels:
        without: dict[str, Cell] = {"status": "not_applicable", "note": f"no rule: {label.status}"}
        row = {name: cell for name, cell in scored.get(label.label_id, without).items() if name not in _OF_THE_OWN_ARM}
        named = {"feature": int(matched[label.feature]), "label_id": label.label_id, "method": "rule", "claim": "reads"}
        rows.append({**row, **named, "scorer": "rule_execution", "arm": "random_direction"})
    return rows
