"""One feature at a glance: how strongly it fires how often, and its strongest windows token by token.

What belongs here: drawing an `evidence.FeaturePage`. What does not: reading it from the store.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.plots.drawing import BLUE, FAINT, INK, figure, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scopeatlas.evidence import FeaturePage, Window

WINDOWS = 5
TOKENS = 24
"""Of a window, those around its peak."""


def draw(page: "FeaturePage") -> "Figure":
    """The histogram above, the windows of held-out documents (of explain documents where it fires in no other) below."""
    chosen = _windows(page)
    drawn, axes = figure(9, 2 + 0.75 * max(1, len(chosen)), rows=1 + len(chosen))
    _histogram(axes[0], page)
    for axis, window in zip(axes[1:], chosen, strict=True):
        _strip(axis, window, page.hit.max_activation)
    name = page.hit.label or f"no label ({page.hit.status})"
    drawn.suptitle(f"{shown(page.hit.key, 100)}\n{shown(name, 100)}", fontsize=9, color=INK, x=0.01, ha="left")
    return drawn


def _windows(page: "FeaturePage") -> "list[Window]":
    top = [window for window in page.evidence.windows if window.kind == "top"]
    held_out = [window for window in top if window.split == "report"]
    return (held_out or top)[:WINDOWS]


def _histogram(axis: "Axes", page: "FeaturePage") -> None:
    table = page.evidence.histogram
    if not table.is_empty():
        bins = table.group_by("low").agg(pl.col("tokens").sum()).sort("low")
        low = bins["low"].to_numpy()
        axis.bar(low, bins["tokens"].to_numpy(), low * (math.sqrt(2) - 1), align="edge", color=FAINT, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _at: f"{value:g}")
    axis.set_xlabel("activation", fontsize=8, color=INK)
    axis.set_ylabel("tokens", fontsize=8, color=INK)


def _strip(axis: "Axes", window: "Window", largest: float) -> None:
    peak = int(np.argmax(window.activations))
    start = max(0, min(peak - TOKENS // 2, len(window.tokens) - TOKENS))
    tokens, values = window.tokens[start : start + TOKENS], window.activations[start : start + TOKENS]
    axis.pcolormesh(np.array([values]), cmap="Greens", vmin=0, vmax=max(largest, 1e-9), edgecolors="white", linewidth=0.5)
    axis.set_xlim(0, TOKENS)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks(np.arange(len(tokens)) + 0.5, [shown(t.strip(), 14) for t in tokens], rotation=40, ha="right", fontsize=7)
    axis.set_yticks([0.5], [f"{window.peak:.3g}"], fontsize=7, color=BLUE)
