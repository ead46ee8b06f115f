"""What became of the features of one release in another: the matching with everybody's names.

What belongs here: putting matching, labels and transferred labels together. What does not: how they are found
(`matching.py`, `transfer.py`) or drawn (`plots/matching.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from scopeatlas.study.matching import KEPT, Matching, match
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TOKENS
from scopeatlas.study.transfer import transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = 5


@dataclass(frozen=True)
class Diff:
    """The features of SAE a and SAE b with what became of each.

    features: MATCH_SCHEMA and key, label, partner_labels (of `partners`, in that order) and nearest_label. transferred:
    TRANSFER_SCHEMA, None if labels were not carried over.
    """

    matching: Matching
    features: pl.DataFrame
    transferred: pl.DataFrame | None

    @property
    def counts(self) -> pl.DataFrame:
        """How many features of each SAE have each status: status, a, b."""
        return self.matching.counts

    def to_polars(self) -> pl.DataFrame:
        """One row per feature of either SAE."""
        return self.features

    def examples(self, status: str, count: int = EXAMPLES) -> pl.DataFrame:
        """Features of a status (of b for what appeared), those with a label first, then by how often they fire."""
        side = "b" if status == "appeared" else "a"
        mine = self.features.filter(side=side, status=status)
        return mine.sort(pl.col("label") == "", -pl.col("tokens"), "feature").head(count)

    def as_dict(self) -> dict[str, object]:
        """Everything as JSON-able values."""
        found = self.matching
        return {
            "a": found.a,
            "b": found.b,
            "tokens": found.tokens,
            "documents": len(found.documents),
            "from_cache": found.cached,
            "no_cosine": found.no_cosine,
            "chance_correlation": found.chance,
            "kept_correlation": KEPT,
            "counts": self.counts.to_dicts(),
            "features": self.features.to_dicts(),
            "transferred": None if self.transferred is None else self.transferred.to_dicts(),
        }

    def plot(self) -> "Figure":
        """How well features match, beside chance, and what became of them."""
        from scopeatlas.plots.matching import plot_matching

        return plot_matching(self.matching)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering import html

        found = self.matching
        caption = f"{found.a} (a) against {found.b} (b), on {found.tokens:,} tokens of {len(found.documents)} documents"
        counts = html.table(["", "features of a", "features of b"], self.counts.iter_rows(), caption=caption)
        shown = pl.concat([self.examples(status) for status in self.counts["status"].to_list() if status != "silent"])
        columns = ["status", "feature", "label", "correlation", "partner_labels"]
        rows = [[*row[:4], ", ".join(row[4])] for row in shown.select(columns).iter_rows()]
        return counts + html.image(self.plot()) + html.table(columns, rows)


def diff(a: OpenSae, b: OpenSae, *, tokens: int = TOKENS, transfer_labels: bool = False) -> Diff:
    """Match SAE a with SAE b and name everything; with `transfer_labels` also test a's labels on their matches in b.

    tokens: at most so many are matched on, and as many tested on. Raises what `match` and `transfer` raise.
    """
    matching = match(a, b, tokens=tokens)
    features = pl.concat([_named(matching.of("a"), a, b), _named(matching.of("b"), b, a)])
    return Diff(matching, features, transfer(a, b, matching, tokens=tokens) if transfer_labels else None)


def _named(features: pl.DataFrame, own: OpenSae, other: OpenSae) -> pl.DataFrame:
    """Features of one SAE with its names and those of the other."""
    names, labels = own.rows["key"], other.rows["label"]
    return features.with_columns(
        key=names.gather(features["feature"]),
        label=own.rows["label"].gather(features["feature"]),
        partner_labels=pl.Series([[labels[i] for i in row] for row in features["partners"].to_list()], dtype=pl.List(pl.String)),
        nearest_label=labels.gather(features["nearest"]),
    )
