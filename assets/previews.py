"""What a person sees of a stage in the Dagster UI: five features with highlighted examples, tables, histograms.

Not here: any number that is not already in a stage's tables.
"""

import base64
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import polars as pl

from scopeatlas.mining.examples import read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.scoring.report import Report
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREVIEWED = 5
OUTCOMES = ("hit", "miss", "false_alarm")
_MARKDOWN_SPECIAL = "\\`*_{}[]<>()#+-.!|~$"


def escape(text: str) -> str:
    """Corpus text as literal markdown: it is data, never markup."""
    return "".join(f"\\{c}" if c in _MARKDOWN_SPECIAL else c for c in text)


def highlighted(snippet: str) -> str:
    """A snippet with what stands between «» as code: bold alone is not recognised next to punctuation or inside a word."""
    return re.sub(r"«([^»]*)»|([^«]+)", lambda m: f"«{code(m[1])}»" if m[1] is not None else escape(m[2]), snippet)


def code(text: str) -> str:
    """Text as a code span."""
    return f"`{text.replace('`', chr(39)) or ' '}`"


def feature_preview(rows: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """Five labelled features spread over the scores, each with its score, control and two held-out examples."""
    scored = rows.filter(pl.col("f1").is_not_null()).sort("f1", "feature", descending=[True, False])
    chosen = _spread(scored)
    parts = []
    for row in chosen.iter_rows(named=True):
        interval = f"F1 {row['f1']:.2f} [{row['f1_low']:.2f}, {row['f1_high']:.2f}], shuffled {row['shuffled_f1'] or 0:.2f}"
        examples = "\n".join(f"- {highlighted(snippet)}" for snippet in row["snippets"][:2])
        parts.append(f"**{row['feature']}** {code(row['label'])} ({interval})\n\n{examples}")
    return dg.MetadataValue.md("\n\n".join(parts) or "no feature is scored")


def label_preview(labels: pl.DataFrame, windows: Location, falsification: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """Five labelled features spread over what they were chosen by, each with its sentence, two examples and, where a
    prediction failed, the counter-examples."""
    chosen = _spread(
        labels.filter(pl.col("status") == "ok").sort("select_score", "feature", descending=[True, False], nulls_last=True)
    )
    features = chosen["feature"].to_list()
    examples = read_examples(windows, features).filter((pl.col("kind") == "top") & (pl.col("split") == "explain"))
    parts = []
    for row in chosen.iter_rows(named=True):
        mine = examples.filter(pl.col("feature") == row["feature"]).sort("rank").head(2)
        shown = [f"- {highlighted(mark(w['texts'], w['activations']))}" for w in mine.iter_rows(named=True)]
        failed = falsification.filter((pl.col("label_id") == row["label_id"]) & ~pl.col("passed")).head(2)
        shown += [
            f"- counter-example, {'silent' if expected else 'fires'} on: {escape(text)}"
            for text, expected in failed.select("text", "expected").iter_rows()
        ]
        parts.append(f"**{row['feature']}** fires on {escape(row['reads'])}\n\n" + "\n".join(shown))
    return dg.MetadataValue.md("\n\n".join(parts) or "no feature is labelled")


def _spread(ordered: pl.DataFrame) -> pl.DataFrame:
    if len(ordered) <= PREVIEWED:
        return ordered
    return ordered[[i * (len(ordered) - 1) // (PREVIEWED - 1) for i in range(PREVIEWED)]]


def counts_table(name: str, counts: Mapping[str, int]) -> dg.TableMetadataValue:
    """Counts by `name`, as a table."""
    return dg.MetadataValue.table([dg.TableRecord({name: key, "features": count}) for key, count in counts.items()])


def report_markdown(report: Report) -> dg.MarkdownMetadataValue:
    """The report: a line for each metric beside each of its controls."""
    lines = ["| scorer | metric | own | control | | lift | labels |", "|---|---|---|---|---|---|---|"]
    for summary in report.scorers:
        lines += [
            f"| {c.scorer} | {c.metric} | {c.own} | {c.control} | {c.controlled} | {c.lift} | {c.labels} |"
            for c in summary.comparisons
        ]
    head = [escape(line) for line in report.lines() if not line.startswith(" ")]
    return dg.MetadataValue.md("\n\n".join(head) + "\n\n" + "\n".join(lines))


def score_image(table: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """How balanced accuracy is distributed over labels, and over each control, for each scorer that has it."""
    from matplotlib.figure import Figure

    scored = table.filter((pl.col("status") == "scored") & pl.col("balanced_accuracy").is_not_null())
    scorers = scored["scorer"].unique().sort().to_list()
    if not scorers:
        return dg.MetadataValue.md("nothing is scored")
    figure = Figure(figsize=(5.5, 2.4 * len(scorers)), dpi=100, layout="constrained")
    bins = np.linspace(0, 1, 41).tolist()
    for axes, scorer in zip(figure.subplots(len(scorers), 1, squeeze=False)[:, 0], scorers, strict=True):
        mine = scored.filter(pl.col("scorer") == scorer)
        for arm in sorted(mine["arm"].unique(), key=lambda name: (name != "own", name)):
            values = mine.filter(pl.col("arm") == arm)["balanced_accuracy"].to_numpy()
            weights = np.full(len(values), 1 / len(values))
            if arm == "own":
                heights = axes.hist(
                    values, bins=bins, weights=weights, color="#3b6fb6", alpha=0.85, label=f"own ({len(values)})"
                )[0]
                # Constant answers all lie in one bin: it may be cut off, the labels must be seen.
                axes.set_ylim(0, 2 * float(np.max(heights)))  # pyright: ignore[reportArgumentType]
            else:
                axes.hist(values, bins=bins, weights=weights, histtype="step", linewidth=1.4, label=f"{arm} ({len(values)})")
        axes.set_title(scorer, fontsize=9, loc="left")
        axes.set_ylabel("share of labels")
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].set_xlabel("balanced accuracy on report documents")
    return _image(figure, "balanced accuracy")


def score_preview(table: pl.DataFrame, outcomes: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """Five tested labels spread over the lift, each with hits, misses and false alarms on report documents."""
    own = table.filter((pl.col("arm") == "own") & (pl.col("status") == "scored") & pl.col("balanced_accuracy").is_not_null())
    chosen = _spread(own.sort("lift", "feature", descending=[True, False], nulls_last=True))
    parts = []
    for row in chosen.iter_rows(named=True):
        tested = (
            f"{row['scorer']}: balanced accuracy {row['balanced_accuracy']:.2f} "
            f"[{row['balanced_accuracy_low']:.2f}, {row['balanced_accuracy_high']:.2f}], "
            f"{row['lift']:+.2f} above a shuffled label"
        )
        mine = outcomes.filter((pl.col("label_id") == row["label_id"]) & (pl.col("scorer") == row["scorer"]))
        shown = [
            f"- {name.replace('_', ' ')}: {highlighted(text)}"
            for name in OUTCOMES
            for text in mine.filter(pl.col("outcome") == name)["text"].head(2)
        ]
        label = mine["label"][0] if len(mine) else ""
        parts.append(f"**{row['feature']}** {code(label)} ({tested})\n\n" + "\n".join(shown))
    return dg.MetadataValue.md("\n\n".join(parts) or "nothing is scored")


def histogram_image(values: pl.Series, xlabel: str, ylabel: str) -> dg.MarkdownMetadataValue:
    """A histogram as an image inside markdown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(float(values.min() or 0.0), float(values.max() or 1.0), 31).tolist()  # pyright: ignore[reportArgumentType]
    axes.hist(values.drop_nulls().to_numpy(), bins=bins, color="#3b6fb6")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return _image(figure, xlabel)


def _image(figure: "Figure", name: str) -> dg.MarkdownMetadataValue:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return dg.MetadataValue.md(f"![{name}](data:image/png;base64,{encoded})")
