"""How often features fire on the documents that labels are made from: what they are refused by before any is proposed.

What belongs here: counts over explain and select documents. What does not: what is refused (`labels/rule_labeller.py`), or
the counts over everything that a feature page shows (`mining/examples.py`).
"""

import numpy as np
import polars as pl

from scopeatlas.corpus.documents import Split
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.mining.sketches import EARLY_POSITIONS

SPLITS_READ: tuple[Split, ...] = ("explain", "select")


def firing_counts(units: Units, firings: Firings) -> pl.DataFrame:
    """One row per feature: tokens it fires on, density (share of the tokens) and early_share (of its firings) in explain and
    select documents together; tokens, contexts and documents in each of the two. Linear in the firings.

    Early are the first EARLY_POSITIONS tokens of a context that count: in a conversation those behind the template's.
    """
    read = {split: units.in_split(split) for split in SPLITS_READ}
    mine = np.logical_or.reduce(list(read.values()))[firings.position]
    feature, position, width = firings.feature[mine].astype(np.int64), firings.position[mine], firings.width
    counts = np.bincount(feature, minlength=width)
    first = units.counted.reshape(units.contexts, units.length).argmax(axis=1)
    early = position % units.length < first[position // units.length] + EARLY_POSITIONS
    columns: dict[str, np.ndarray] = {
        "feature": np.arange(width, dtype=np.uint32),
        "tokens": counts,
        "density": counts / max(sum(int(mask.sum()) for mask in read.values()), 1),
        "early_share": np.bincount(feature, weights=early, minlength=width) / np.maximum(counts, 1),
    }
    for split, mask in read.items():
        here = mask[position]
        columns[f"{split}_tokens"] = np.bincount(feature[here], minlength=width)
        for of, unit in (("contexts", position[here] // units.length), ("documents", units.document[position[here]])):
            distinct = np.unique(np.stack([feature[here], unit]), axis=1)[0]
            columns[f"{split}_{of}"] = np.bincount(distinct, minlength=width)
    return pl.DataFrame(columns)
