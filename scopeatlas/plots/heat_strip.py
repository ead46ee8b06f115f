"""Heat strips: the tokens of texts by the features that fire on them.

What belongs here: drawing a `Trace`. What does not: which features are named (`study/trace.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.plots.drawing import BLUE, INK, RED, figure, shown
from scopeatlas.rendering.text import plain
from scopeatlas.study.trace import short_name
from scopeatlas.subject.conversations import ROLES, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scopeatlas.study.trace import Trace

STRIP_TOKENS = 32
"""A longer text has several strips."""
MOST_STRIPS = 60
FEATURES = 3
"""Of a text, at most so many with a label and so many without."""
TWO_COLUMNS_FROM = 6
CAPTION = (
    "Green: the activation as a share of the largest that the feature reaches. Grey, quoted: no label, the tokens it fires on."
)
ROLE_COLOURS = {"user": BLUE, "system": RED}


@dataclass(frozen=True)
class _Strip:
    """Some tokens of a text. heat: [features, tokens], shares of each feature's largest activation."""

    text: int
    tokens: list[str]
    roles: list[str]
    names: list[str]
    labelled: list[bool]
    heat: np.ndarray


def heat_strips(trace: "Trace") -> "Figure":
    """A strip per text, at most MOST_STRIPS: tokens across, down the heaviest features with a label, then grey those without.
    Green is the activation as a share of the largest that the feature reaches in the corpus or here."""
    strips = [strip for _, strip in zip(range(MOST_STRIPS), _strips(trace), strict=False)]
    columns = 2 if len(strips) >= TWO_COLUMNS_FROM else 1
    rows = max(1, -(-len(strips) // columns))
    most = max((len(strip.names) for strip in strips), default=1)
    drawn, axes = figure(8.5 * columns, rows * (0.75 + 0.15 * max(most, 1)), rows=rows, columns=columns)
    for axis in axes[len(strips) :]:
        axis.set_axis_off()
    for axis, strip in zip(axes, strips, strict=False):
        _draw(axis, strip)
    left = len(trace.tokens) - len({strip.text for strip in strips})
    drawn.supxlabel(CAPTION + (f" {left} more texts are not drawn." if left else ""), fontsize=7, color=INK)
    return drawn


def _strips(trace: "Trace") -> "Iterator[_Strip]":
    for text, (tokens, roles) in enumerate(zip(trace.tokens, trace.roles, strict=True)):
        counted = [at for at, role in enumerate(roles) if role != ROLES[TEMPLATE]]
        rows = pl.concat([trace.strongest(text, sae, labelled=has).head(FEATURES) for has in (True, False) for sae in trace.saes])
        if not counted:
            continue
        heat = np.array([_share(trace, text, key)[counted] for key in rows["key"]]).reshape(rows.height, len(counted))
        names = [short_name(row["label"], row["trigger_tokens"]) for row in rows.iter_rows(named=True)]
        for start in range(0, len(counted), STRIP_TOKENS):
            part = counted[start : start + STRIP_TOKENS]
            of_part = heat[:, start : start + STRIP_TOKENS]
            labelled = (rows["label"] != "").to_list()
            yield _Strip(text, [tokens[at] for at in part], [roles[at] for at in part], names, labelled, of_part)


def _share(trace: "Trace", text: int, key: str) -> np.ndarray:
    strip = trace.strip(text, key)
    return strip / max(trace.features.row(by_predicate=pl.col("key") == key, named=True)["max_activation"], strip.max())


def _draw(axis: "Axes", strip: _Strip) -> None:
    axis.pcolormesh(strip.heat, cmap="Greens", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    axis.invert_yaxis()
    axis.set_xlim(0, STRIP_TOKENS if len(strip.tokens) > STRIP_TOKENS // 2 else STRIP_TOKENS // 2)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, labelsize=7)
    axis.set_xticks(np.arange(len(strip.tokens)) + 0.5, [shown(plain(t), 14) for t in strip.tokens], rotation=40, ha="right")
    axis.set_yticks(np.arange(len(strip.names)) + 0.5, [shown(plain(name), 42) for name in strip.names])
    for label, role in zip(axis.get_xticklabels(), strip.roles, strict=True):
        label.set_color(ROLE_COLOURS.get(role, INK))
    for label, has in zip(axis.get_yticklabels(), strip.labelled, strict=True):
        label.set_alpha(1.0 if has else 0.6)
    axis.set_title(f"{strip.text + 1}", loc="left", fontsize=7, color=INK, pad=2)
