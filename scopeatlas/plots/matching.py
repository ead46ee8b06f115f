"""Release matching: how well the features of two SAEs match beside chance, and what became of them.

What belongs here: drawing a `Matching`. What does not: finding it (`study/matching.py`).
"""

from typing import TYPE_CHECKING, get_args

import numpy as np
import polars as pl

from scopeatlas.plots.drawing import BLUE, FAINT, GREEN, INK, RED, figure
from scopeatlas.study.matching import KEPT, LEAST, Matching, Side, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[str, str] = {
    "kept": GREEN,
    "changed": BLUE,
    "split": "#8e44ad",
    "merged": "#b9770e",
    "vanished": RED,
    "appeared": "#16a085",
    "silent": FAINT,
}
BINS = [0.0, *np.linspace(LEAST, 1, 39).tolist()]
LABELLED_SHARE = 0.03
"""A block of less than so much of a bar is too thin to be written beside."""


def plot_matching(matching: Matching) -> "Figure":
    """Left: of each SAE's features, the correlation of the best match, with the same under shifted tokens and the two bars.
    Right: how many features of a (left bar) and of b (right bar) have each status, bands joining those that have partners."""
    drawn, (best, flow) = figure(10, 4, columns=2)
    _draw_best(best, matching)
    _draw_flow(flow, matching)
    return drawn


def _draw_best(axis: "Axes", matching: Matching) -> None:
    colours: dict[Side, str] = {"a": GREEN, "b": BLUE}
    for side, colour in colours.items():
        mine = matching.of(side).filter(pl.col("status") != "silent")["correlation"].fill_null(0.0).to_numpy()
        axis.hist(mine, BINS, weights=_shares(mine), histtype="step", color=colour, label=f"features of {side}")
    null = np.concatenate([matching.null_a, matching.null_b])
    axis.hist(null, BINS, weights=_shares(null), color=FAINT, label="tokens shifted (chance)", zorder=0)
    for at, name in ((matching.chance, "chance"), (KEPT, "kept")):
        axis.axvline(at, color=INK, linewidth=0.8, linestyle=":")
        axis.text(at, 1.0, f" {name} {at:.2f}", transform=axis.get_xaxis_transform(), fontsize=7, va="bottom", color=INK)
    axis.set_yscale("log")
    axis.set_xlabel("correlation with the best match of the other SAE", fontsize=8)
    axis.set_ylabel("share of features that are judged", fontsize=8)
    axis.legend(fontsize=7, frameon=False)


def _shares(values: np.ndarray) -> np.ndarray:
    return np.full(len(values), 1 / max(len(values), 1))


def _draw_flow(axis: "Axes", matching: Matching) -> None:
    axis.axis("off")
    counts = {row["status"]: (row["a"], row["b"]) for row in matching.counts.iter_rows(named=True)}
    totals = tuple(max(sum(count[side] for count in counts.values()), 1) for side in (0, 1))
    at = [0.0, 0.0]
    for status in (name for name in get_args(Status) if name in counts):
        colour, heights = COLOURS[status], [counts[status][side] / totals[side] for side in (0, 1)]
        for side, x in ((0, 0.0), (1, 0.85)):
            axis.bar(x, -heights[side], 0.15, -at[side], align="edge", color=colour, edgecolor="white", linewidth=0.4)
            if heights[side] >= LABELLED_SHARE:
                beside = {"x": x - 0.02, "ha": "right"} if side == 0 else {"x": x + 0.17, "ha": "left"}
                text = f"{status} {counts[status][side]:,}"
                axis.text(y=-at[side] - heights[side] / 2, s=text, fontsize=7, va="center", color=INK, **beside)
        if status != "silent" and all(heights):
            low = [-at[side] - heights[side] for side in (0, 1)]
            axis.fill_between([0.15, 0.85], low, [-at[0], -at[1]], color=colour, alpha=0.25, linewidth=0)
        at = [at[side] + heights[side] for side in (0, 1)]
    for x, name, total in ((0.075, "a", totals[0]), (0.925, "b", totals[1])):
        axis.text(x, 0.02, f"{name}: {total:,}", ha="center", fontsize=8, color=INK)
    axis.set_xlim(-0.4, 1.4)
