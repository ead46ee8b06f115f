"""What a person sees of a stage in the Dagster UI: five features with highlighted examples, tables, histograms.

Not here: any number that is not already in a stage's tables.
"""

import base64
import io
import re
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from scopeatlas.mining.examples import read_examples
from scopeatlas.mining.windows import mark

PREVIEWED = 5
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
        interval = f"F1 {row['f1']:.2f} [{row['f1_low']:.2f}, {row['f1_high']:.2f}], shuffled {row['shuffled_f1']:.2f}"
        examples = "\n".join(f"- {highlighted(snippet)}" for snippet in row["snippets"][:2])
        parts.append(f"**{row['feature']}** {code(row['label'])} ({interval})\n\n{examples}")
    return dg.MetadataValue.md("\n\n".join(parts) or "no feature is scored")


def label_preview(labels: pl.DataFrame, windows: Path) -> dg.MarkdownMetadataValue:
    """Five labelled features spread over the lift on select documents, each with its sentence and two examples."""
    chosen = _spread(
        labels.filter(pl.col("status") == "ok").sort("select_score", "feature", descending=[True, False], nulls_last=True)
    )
    features = chosen["feature"].to_list()
    examples = read_examples(windows, features).filter((pl.col("kind") == "top") & (pl.col("split") == "explain"))
    parts = []
    for row in chosen.iter_rows(named=True):
        mine = examples.filter(pl.col("feature") == row["feature"]).sort("rank").head(2)
        shown = "\n".join(f"- {highlighted(mark(w['texts'], w['activations']))}" for w in mine.iter_rows(named=True))
        parts.append(f"**{row['feature']}** fires on {escape(row['reads'])}\n\n{shown}")
    return dg.MetadataValue.md("\n\n".join(parts) or "no feature is labelled")


def _spread(ordered: pl.DataFrame) -> pl.DataFrame:
    if len(ordered) <= PREVIEWED:
        return ordered
    return ordered[[i * (len(ordered) - 1) // (PREVIEWED - 1) for i in range(PREVIEWED)]]


def score_table(scored: pl.DataFrame) -> dg.TableMetadataValue:
    """The ten best and ten worst labels by F1."""
    ordered = scored.sort("f1", "feature", descending=[True, False])
    shown = pl.concat([ordered.head(10), ordered.tail(min(10, max(0, len(ordered) - 10)))])
    columns = ("feature", "label", "unit", "documents", "precision", "recall", "f1", "f1_low", "f1_high", "shuffled_f1")
    records = [
        dg.TableRecord({name: round(row[name], 3) if isinstance(row[name], float) else row[name] for name in columns})
        for row in shown.iter_rows(named=True)
    ]
    return dg.MetadataValue.table(records)


def histogram_image(values: pl.Series, xlabel: str, ylabel: str, *, control: pl.Series | None = None) -> dg.MarkdownMetadataValue:
    """A histogram as an image inside markdown; `control` is drawn behind it in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    both = values if control is None else pl.concat([values, control])
    bins = np.linspace(float(both.min() or 0.0), float(both.max() or 1.0), 31).tolist()  # pyright: ignore[reportArgumentType]
    if control is not None:
        axes.hist(control.drop_nulls().to_numpy(), bins=bins, color="#b8b8b8", label="shuffled label")
        axes.set_yscale("log")  # nearly all controls lie in the first bin
    axes.hist(values.drop_nulls().to_numpy(), bins=bins, color="#3b6fb6", alpha=0.85, label="own label")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    if control is not None:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return dg.MetadataValue.md(f"![{xlabel}](data:image/png;base64,{encoded})")
