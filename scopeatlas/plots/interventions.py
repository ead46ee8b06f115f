"""Pictures of interventions: what moves in the next token, what moves in each prompt, what a logit comes from.

What belongs here: drawing results of `study/{intervene,causal,attribution}.py`. What does not: getting them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scopeatlas.plots.drawing import BLUE, FAINT, GREEN, INK, RED, figure, shown

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

BARS = 20
ROW_INCHES = 0.24


def probability_changes(next_tokens: "pl.DataFrame") -> "Figure":
    """Bars of the change in probability, the tokens that rise most on top (NEXT_TOKEN_ROW)."""
    names = [shown(repr(token), 30) for token in next_tokens["token"]]
    return _bars(names, next_tokens["change"].to_list(), "change in probability of the next token")


def attributions(features: "pl.DataFrame", what: str) -> "Figure":
    """Bars of the largest attributions, and where it was measured a mark at what ablation takes away
    (FEATURE_ATTRIBUTION_ROW)."""
    rows = features.head(BARS)
    names = [shown(f"{feature}  {name}", 50) for feature, name in rows.select("feature", "name").iter_rows()]
    drawn = _bars(names, rows["attribution"].to_list(), shown(what, 80))
    measured = [(place, value) for place, value in enumerate(rows["measured"]) if value is not None]
    if measured:
        axis = drawn.axes[0]
        places, values = zip(*measured, strict=True)
        axis.plot(values, places, "D", color=INK, markersize=4, label="measured by ablation")
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    return drawn


def changes_by_prompt(prompts: "pl.DataFrame", controls: Sequence[float], quantity: str) -> "Figure":
    """A dot for the change in each prompt, another for what random features do there, and the means of all draws."""
    drawn, (axis,) = figure(6.5, 1.3 + ROW_INCHES * prompts.height)
    places = range(prompts.height)
    axis.axvline(0, color=INK, linewidth=0.8)
    if controls:
        axis.axvspan(min(controls), max(controls), color=FAINT, alpha=0.35, linewidth=0, label="means under random features")
    axis.plot(prompts["control"].to_list(), places, "o", color=INK, fillstyle="none", markersize=5, label="random features")
    axis.plot(prompts["change"].to_list(), places, "o", color=BLUE, markersize=5, label="edited")
    axis.set_yticks(places, [f"prompt {number + 1}" for number in prompts["prompt"]])
    axis.invert_yaxis()
    axis.set_xlabel(shown(f"change in {quantity}", 80), fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return drawn


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> "Figure":
    """Horizontal bars from top to bottom, green to the right and red to the left."""
    drawn, (axis,) = figure(6.5, 0.9 + ROW_INCHES * max(len(names), 1))
    axis.barh(range(len(names)), values, color=[GREEN if value > 0 else RED for value in values], height=0.7)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    return drawn
