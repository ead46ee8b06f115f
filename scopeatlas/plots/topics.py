"""Topic maps: texts by topics, of features and of words side by side.

What belongs here: drawing `Topics`. What does not: what a topic is (`study/topics.py`).
"""

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from scopeatlas.plots.drawing import INK, figure, shown
from scopeatlas.rendering.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scopeatlas.study.topics import RollUp, Topics

MOST_TEXTS, MOST_TOPICS = 80, 18


def topic_maps(found: "Topics") -> "Figure":
    """The first MOST_TEXTS texts down, the MOST_TOPICS topics that texts differ most in and at least two share across, in order of
    where in the batch they lie: green is the share that a topic has of a text. Left topics of features, right those of words."""
    texts = found.texts[:MOST_TEXTS]
    drawn, axes = figure(15, 2.4 + 0.17 * len(texts), columns=2)
    for axis, roll_up, what in zip(axes, (found.features, found.words), ("features", "words (TF-IDF)"), strict=True):
        _draw(axis, roll_up, len(texts))
        axis.set_title(f"topics of {what}", fontsize=9, color=INK, loc="left", pad=4)
    axes[0].set_yticks(np.arange(len(texts)) + 0.5, [shown(plain(text), 60) for text in texts])
    axes[1].set_yticks([])
    return drawn


def _draw(axis: "Axes", roll_up: "RollUp", texts: int) -> None:
    shared = roll_up.topics.filter(roll_up.topics["texts"] > 1).head(MOST_TOPICS)
    place = ((pl.col("text") * pl.col("share")).sum() / pl.col("share").sum()).alias("place")
    places = roll_up.by_text.group_by("topic").agg(place)
    shared = shared.join(places, on="topic", how="left").sort("place", "topic")
    column = {topic: at for at, topic in enumerate(shared["topic"])}
    heat = np.zeros((texts, max(len(column), 1)))
    for text, topic, share in roll_up.by_text.select("text", "topic", "share").iter_rows():
        if text < texts and topic in column:
            heat[text, column[topic]] = share
    axis.pcolormesh(heat, cmap="Greens", vmin=0, vmax=max(float(heat.max()), 1e-9), edgecolors="white", linewidth=0.5)
    axis.invert_yaxis()
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, labelsize=7)
    axis.set_xticks(np.arange(len(column)) + 0.5, [shown(plain(name), 28) for name in shared["name"]], rotation=45, ha="right")
