"""How comparisons look: two features side by side, and what became of a release's features.

What belongs here: from a `Comparison` or a `Diff` to a terminal or a pipe. What does not: finding them (`study/`).
"""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering.text import interval, number, plain, print_table, share

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.study.compare import Comparison
    from scopeatlas.study.diff import Diff

MEANINGS = {
    "kept": "each other's best match, and as good as the same",
    "changed": "each other's best match, above chance",
    "split": "one of a is several of b",
    "merged": "several of a are one of b",
    "vanished": "of a, nobody's best match",
    "appeared": "of b, nobody's best match",
    "silent": "fires too seldom on these tokens to be judged",
}
TRANSFERRED_SHOWN = 15


def comparison_facts(found: "Comparison") -> list[tuple[str, str]]:
    """Names and values of a comparison, but for the rules."""
    none = "no label"
    return [
        ("a", f"{found.a}  {found.label_a or none}"),
        ("b", f"{found.b}  {found.label_b or none}"),
        ("fires on", f"a {share(found.tokens_a / found.tokens)}, b {share(found.tokens_b / found.tokens)}"),
        ("together", f"{found.both:,} of {found.tokens:,} tokens, Jaccard {found.jaccard:.2f}"),
        ("correlation", number(found.correlation) if found.correlation is not None else "none: one of them does not fire"),
        ("decoder cosine", f"none: {found.no_cosine}" if found.no_cosine else number(found.cosine)),
        ("label cosine", number(found.label_cosine)),
    ]


def print_comparison(out: Console, found: "Comparison") -> None:
    """The facts, then every rule on both features."""
    print_table(out, comparison_facts(found))
    if found.rules.is_empty():
        out.print(Text("neither label is a rule that could be run on the other", style="dim"))
        return
    out.print()
    table = Table(box=None, pad_edge=False)
    for name in ("the rule of", "on", "F1", "always yes", "report documents"):
        table.add_column(name)
    for row in found.rules.iter_rows(named=True):
        own = row["rule_of"] == row["on"]
        f1 = interval(row["f1"], row["f1_low"], row["f1_high"])
        cells = (row["rule_of"], row["on"], f1, number(row["constant_f1"]), f"{row['unit']}s of {row['documents']}")
        table.add_row(*cells, style="dim" if own else None)
    out.print(table)


def print_diff(out: Console, found: "Diff", *, examples: int) -> None:
    """How many features have each status, then some of each by name, then the labels that were carried over."""
    matching = found.matching
    for side, key in (("a", matching.a), ("b", matching.b)):
        out.print(Text(f"{side}  ").append(key, style="cyan"), soft_wrap=True)
    how = f"matched on {matching.tokens:,} tokens of {len(matching.documents)} documents, none of the report split; "
    bars = f"chance reaches a correlation of {matching.chance:.2f}"
    out.print(
        Text(how + bars + (f"; no decoder cosines: {matching.no_cosine}" if matching.no_cosine else ""), style="dim"),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("status")
    for name in ("of a", "of b"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    for status, of_a, of_b in found.counts.iter_rows():
        table.add_row(status, f"{of_a:,}", f"{of_b:,}", MEANINGS[status])
    out.print(table)
    for status in found.counts["status"].to_list():
        if examples and status != "silent":
            _print_examples(out, found.examples(status, examples), status)
    if found.transferred is not None:
        _print_transferred(out, found.transferred)


def _print_examples(out: Console, rows: "pl.DataFrame", status: str) -> None:
    out.print(Text(f"\n{status}", style="bold"))
    table = Table(box=None, pad_edge=False)
    for name in ("feature", "label", "correlation", "cosine", "with", "whose label is"):
        table.add_column(name, overflow="fold", justify="right" if name in {"feature", "correlation", "cosine"} else "left")
    for row in rows.iter_rows(named=True):
        others = ", ".join(str(partner) for partner in row["partners"])
        nobody = "-" if row["nearest"] is None else f"({row['nearest']})"
        labels = row["partner_labels"] or [row["nearest_label"] or ""]
        named = Text(plain("; ".join(label or "no label" for label in labels)) if row["nearest"] is not None else "-")
        figures = (number(row["correlation"]), number(row["cosine"]))
        table.add_row(str(row["feature"]), Text(plain(row["label"] or "no label")), *figures, others or nobody, named)
    out.print(table)


def _print_transferred(out: Console, rows: "pl.DataFrame") -> None:
    scored = rows.filter(rows["outcome"] == "scored")
    out.print(Text("\nlabels of a on their matches in b, on report documents", style="bold"))
    out.print(Text(f"{scored.height:,} scored of {rows.height:,}, best first; a shuffled label beside each", style="dim"))
    table = Table(box=None, pad_edge=False)
    for name in ("a", "b", "match", "F1 on b", "shuffled", "F1 on a", "label of a", "F1 of b's", "label of b"):
        table.add_column(name, overflow="fold")
    for row in scored.head(TRANSFERRED_SHOWN).iter_rows(named=True):
        f1 = interval(row["f1"], row["f1_low"], row["f1_high"])
        ids = (str(row["feature_a"]), str(row["feature_b"]), row["match"])
        own = (number(row["f1_b"]), Text(plain(row["label_b"] or "no label")))
        table.add_row(*ids, f1, number(row["shuffled_f1"]), number(row["f1_on_a"]), Text(plain(row["label"])), *own)
    out.print(table)
