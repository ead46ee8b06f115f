"""The forest plot of a contrast: effects with their intervals, and how well each thing tells the two sets apart.

What belongs here: drawing a `Contrast`. What does not: getting one (`study/contrast.py`).
"""

from typing import TYPE_CHECKING

from scopeatlas.plots.drawing import BLUE, FAINT, GREEN, INK, RED, figure, shown
from scopeatlas.study.trace import short_name

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scopeatlas.study.contrast import Contrast

WORDS_BESIDE = 5
ROW_INCHES = 0.24


def forest(contrast: "Contrast", *, top: int) -> "Figure":
    """The `top` surest features, green where a has more and red where b has, faint if not significant, a diamond at what is left
    at equal words; under them the surest words, and the AUROC of all baselines."""
    features, words = contrast.features.head(top), contrast.words.head(WORDS_BESIDE)
    rows, judged = features.height + words.height, contrast.baselines.height
    drawn, axes = figure(7.5, 1.8 + ROW_INCHES * (rows + judged), rows=2 if judged else 1)
    if judged:
        axes[0].get_gridspec().set_height_ratios([rows + 1, judged + 1])  # pyright: ignore[reportOptionalMemberAccess]
        _aurocs(axes[1], contrast.baselines)
    axis = axes[0]
    _bars(axis, features, contrast.alpha, start=0)
    _bars(axis, words, contrast.alpha, start=features.height)
    left = features["matched_effect"].to_list()
    places = [place for place, value in enumerate(left) if value is not None]
    axis.plot([left[place] for place in places], places, "D", color=BLUE, markersize=4, label="left at equal words")
    if places:
        axis.legend(fontsize=7, frameon=False, loc="best")
    axis.axvline(0, color=INK, linewidth=0.8)
    if words.height:
        axis.axhline(features.height - 0.5, color=FAINT, linewidth=0.8, linestyle="--")
    named = [
        shown(f"{short_name(row['label'], row['trigger_tokens'])}  {row['feature']}", 55)
        for row in features.iter_rows(named=True)
    ]
    axis.set_yticks(range(rows), [*named, *(shown(f"word {word}", 55) for word in words["word"])])
    axis.set_ylim(rows - 0.5, -0.5)
    axis.set_xlabel("b has more  ←  difference of means in standard deviations, 95 % interval  →  a has more", fontsize=8)
    return drawn


def _bars(axis: "Axes", rows: "pl.DataFrame", alpha: float, *, start: int) -> None:
    for place, row in enumerate(rows.iter_rows(named=True), start):
        colour = FAINT if row["p_adjusted"] > alpha else GREEN if row["effect"] > 0 else RED
        axis.plot([row["low"], row["high"]], [place, place], "-", color=colour, linewidth=2)
        axis.plot(row["effect"], place, "o", color=colour, markersize=5)


def _aurocs(axis: "Axes", baselines: "pl.DataFrame") -> None:
    for place, row in enumerate(baselines.iter_rows(named=True)):
        axis.plot([row["low"], row["high"]], [place, place], "-", color=INK, linewidth=2)
        axis.plot(row["auroc"], place, "o", color=INK, markersize=5)
    axis.axvline(0.5, color=FAINT, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(baselines.height), baselines["by"].to_list())
    axis.set_ylim(baselines.height - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("AUROC on held-out documents, 95 % interval", fontsize=8)
