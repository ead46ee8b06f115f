"""The density histogram of an SAE: how many features fire how often, labelled ones darker.

What belongs here: drawing `study.densities.Densities`. What does not: counting.
"""

from typing import TYPE_CHECKING

from scopeatlas.plots.drawing import FAINT, GREEN, INK, figure, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scopeatlas.study.densities import Densities


def draw(found: "Densities") -> "Figure":
    """One bar for each quarter of a decade."""
    drawn, (axis,) = figure(7, 3)
    low, width = found.bins["low"], found.bins["high"] - found.bins["low"]
    axis.bar(low, found.bins["features"], width, align="edge", color=FAINT, label="features", linewidth=0)
    axis.bar(low, found.bins["labelled"], width, align="edge", color=GREEN, label="with a label", linewidth=0)
    axis.set_xscale("log")
    axis.set_xlabel("density: share of tokens on which a feature fires", fontsize=8, color=INK)
    axis.set_ylabel("features", fontsize=8, color=INK)
    axis.set_title(
        f"{shown(found.sae)}: {found.features:,} features, {found.silent:,} never fired", fontsize=9, loc="left", color=INK
    )
    axis.legend(fontsize=8, frameon=False)
    return drawn
