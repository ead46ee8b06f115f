"""How labels look: tested ones with the texts that they were right and wrong on, and what asking for them cost.

What belongs here: the words for scorers, controls and outcomes. What does not: a feature as a whole (`features.py`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering.text import interval, marked, number, plain

if TYPE_CHECKING:
    from scopeatlas.atlas.history import FeatureHistory
    from scopeatlas.llm.ledger import Spent

SCORERS = {
    "rule_execution": "the rule executed",
    "detection": "detection by a judge",
    "fuzzing": "fuzzing by a judge",
    "intruder": "intruder by a judge",
    "simulation": "simulation",
    "retrieval": "embedding retrieval",
    "steering": "steering",
}
ARMS = {
    "own": "this label",
    "shuffled": "a shuffled label",
    "constant": "always yes",
    "trigger_tokens": "its most frequent tokens",
    "random_direction": "a random direction",
    "random_model": "a random model",
    "second_judge": "a second judge",
}
OUTCOMES = {"hit": "hit", "miss": "missed", "false_alarm": "false alarm"}


def print_labels(out: Console, labels: Sequence[Mapping[str, Any]]) -> None:
    """Tested labels, each with the texts that it was right and wrong on."""
    for row in labels:
        shown = row["outcomes"]
        name = shown[0]["label"] if shown else row["label_id"]
        out.print(Text(f"\n{row['feature']}  ").append(plain(name), style="bold"), soft_wrap=True)
        f1, accuracy = (interval(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in ("f1", "balanced_accuracy"))
        where = f"{SCORERS[row['scorer']]} on {row['unit']}s of {row['documents']} documents"
        line = f"  F1 {f1}, balanced accuracy {accuracy}, {row['lift'] or 0:+.2f} above a shuffled label: {where}"
        out.print(Text(line, style="dim"), soft_wrap=True)
        for outcome, meaning in OUTCOMES.items():
            for found in (found for found in shown if found["outcome"] == outcome):
                out.print(Text(f"  {meaning:<12}").append(marked(found["text"])), soft_wrap=True)


def print_history(out: Console, found: "FeatureHistory") -> None:
    """A feature over time: what each publication said of it, then every label it was ever given."""
    out.print(Text(found.key, style="cyan"), soft_wrap=True)
    published = Table(box=None, pad_edge=False)
    for name in ("published (UTC)", "generation", "", "status", "by", "F1", "label"):
        published.add_column(name, overflow="fold")
    for row in found.published.iter_rows(named=True):
        when, live = f"{row['published_at']:%Y-%m-%d %H:%M:%S}", "live" if row["live"] else ""
        said = row["status"] or "pruned"
        f1 = interval(row["f1"], row["f1_low"], row["f1_high"])
        published.add_row(when, row["generation"], live, said, row["method"] or "-", f1, Text(plain(row["label"] or "-")))
    out.print(published)
    out.print(Text("\nevery label it was given", style="bold"))
    given = Table(box=None, pad_edge=False)
    for name in ("by", "version", "status", "", "tested by", "F1", "lift", "label"):
        given.add_column(name, overflow="fold")
    for row in found.labels.iter_rows(named=True):
        tested = SCORERS[row["scorer"]] if row["scorer"] else "-"
        figures = (interval(row["f1"], row["f1_low"], row["f1_high"]), number(row["lift"]))
        label = Text(plain(row["label"] or row["reads"] or row["writes"] or "-"))
        given.add_row(
            row["method"], plain(row["version"]), row["status"], "current" if row["current"] else "", tested, *figures, label
        )
    out.print(given)


def print_spent(out: Console, purposes: Mapping[str, "Spent"]) -> None:
    """What the LLM cost by purpose."""
    table = Table(box=None, pad_edge=False)
    for name in ("for", "answers", "prompt tokens", "of them cached", "answer tokens", "usd", "reserved tokens"):
        table.add_column(name, overflow="fold", justify="left" if name == "for" else "right")
    for purpose, cost in sorted(purposes.items()):
        tokens = (cost.answers, cost.prompt_tokens, cost.cached_tokens, cost.completion_tokens)
        table.add_row(purpose, *(f"{n:,}" for n in tokens), f"{cost.settled_usd:.4f}", f"{cost.open_tokens:,}")
    out.print(table)
