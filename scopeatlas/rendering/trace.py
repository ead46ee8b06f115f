"""How a trace looks: each text with the tokens at which its features peak, and under it those features.

What belongs here: from a `Trace` to a terminal, a pipe or a notebook. What does not: finding anything out (`study/trace.py`).
"""

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering import html
from scopeatlas.rendering.text import interval, plain
from scopeatlas.study.trace import name_of
from scopeatlas.subject.conversations import ROLES, TEMPLATE, TEXT

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.study.trace import Trace

LINE_TOKENS, AROUND = 80, 8
"""A longer text is shown by so many tokens around each place where a feature peaks."""
HTML_TEXTS = 50


def print_trace(out: Console, trace: "Trace") -> None:
    """One block per text; several SAEs have their features one after the other."""
    for text in range(len(trace.tokens)):
        out.print(Text(f"{text + 1}  ", style="cyan").append(_line(trace, text)), soft_wrap=True)
        for sae in trace.saes:
            _print_features(out, trace, text, sae)
        out.print()
    for row in trace.overall.sort("sae").iter_rows(named=True):
        norm = (
            f"{percent(row['explained_norm'])} of the norm written, {percent(row['explained_f1'])} counting each label as its F1"
        )
        of = f"{len(trace.tokens)} texts" if len(trace.tokens) > 1 else "the text"
        out.print(
            Text(f"{row['sae']}: labels explain {percent(row['explained'])} of the activation in {of}; {norm}"), soft_wrap=True
        )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


def size(value: float) -> str:
    """An activation: three digits, none of them behind the point in a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_features(out: Console, trace: "Trace", text: int, sae: str) -> None:
    share = trace.explained.row(by_predicate=_is(text, sae), named=True)
    heading = f"{sae}: " if len(trace.saes) > 1 else ""
    if not share["features"]:
        out.print(Text(f"   {heading}nothing fires", style="dim"), soft_wrap=True)
        return
    said = f"labels explain {percent(share['explained'])} of the activation ({percent(share['explained_f1'])} counting each as its F1)"
    out.print(Text(f"   {heading}{said}", style="dim"), soft_wrap=True)
    _print_rows(out, trace, trace.strongest(text, sae, labelled=True))
    unlabelled = trace.strongest(text, sae, labelled=False)
    if unlabelled.height:
        out.print(Text(f"   unexplained {percent(1 - share['explained'])}, most of it by", style="dim"), soft_wrap=True)
        _print_rows(out, trace, unlabelled)


def _is(text: int, sae: str) -> "pl.Expr":
    import polars as pl

    return (pl.col("text") == text) & (pl.col("sae") == sae)


def _print_rows(out: Console, trace: "Trace", rows: "pl.DataFrame") -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left", "left", "left"):
        table.add_column(justify=justify, overflow="fold")
    for row in rows.iter_rows(named=True):
        peak = plain(trace.tokens[row["text"]][row["peak_position"]]).strip()
        on = f"at {peak}" + (f" and {row['tokens'] - 1} more" if row["tokens"] > 1 else "")
        score = "" if not row["label"] else f"F1 {interval(row['f1'], row['f1_low'], row['f1_high'])}"
        name = Text(plain(name_of(row["label"], row["status"], row["trigger_tokens"])), style="bold" if row["label"] else "")
        table.add_row(f"      {size(row['activation'])}", _number_of(row["key"]), Text(on), score, name)
    out.print(table)


def _number_of(key: str) -> Text:
    return Text(key.rpartition("/")[2], style="cyan")


def _peaks(trace: "Trace", text: int) -> set[int]:
    """Where in a text the features that are named peak."""
    named = [trace.strongest(text, sae, labelled=labelled) for sae in trace.saes for labelled in (True, False)]
    return {position for rows in named for position in rows["peak_position"].to_list()}


def _line(trace: "Trace", text: int) -> Text:
    """The text as one line, each run of tokens at which a named feature peaks in «» and bold; of a conversation, who speaks."""
    tokens, roles, peaks = trace.tokens[text], trace.roles[text], _peaks(trace, text)
    line, role, skipped = Text(), ROLES[TEXT], False
    for position in range(len(tokens)):
        if roles[position] == ROLES[TEMPLATE]:
            continue
        if len(tokens) > LINE_TOKENS and not any(abs(position - peak) <= AROUND for peak in peaks):
            skipped = True
            continue
        if skipped:
            line.append(" … ")
            skipped = False
        if roles[position] != role:
            role = roles[position]
            line.append(f"{' ' if line else ''}{role}: ", style="cyan")
        _append(
            line, plain(tokens[position]), marked=position in peaks, before=position - 1 in peaks, after=position + 1 in peaks
        )
    return line.append(" …") if skipped else line


def _append(line: Text, token: str, *, marked: bool, before: bool, after: bool) -> None:
    if not marked:
        line.append(token)
        return
    space = "" if before else token[: len(token) - len(token.lstrip())]
    line.append(space)
    line.append(f"{'' if before else '«'}{token[len(space) :]}{'' if after else '»'}", style="bold green")


def trace_html(trace: "Trace") -> str:
    """The first texts, their tokens coloured by the largest activation of a named feature, as a share of what it reaches in the
    corpus; under each those features."""
    parts = [_text_html(trace, text) for text in range(min(len(trace.tokens), HTML_TEXTS))]
    left = len(trace.tokens) - len(parts)
    more = f"<p>and {left} more texts: to_polars() has all</p>" if left > 0 else ""
    columns = ["sae", "labels explain", "of the norm written", "each label as its F1"]
    shares = [
        (row["sae"], percent(row["explained"]), percent(row["explained_norm"]), percent(row["explained_f1"]))
        for row in trace.overall.iter_rows(named=True)
    ]
    return "".join(parts) + more + html.table(columns, shares, caption="of all activation")


def _text_html(trace: "Trace", text: int) -> str:
    largest = dict(trace.features.select("key", "max_activation").iter_rows())
    strongest = np.zeros(len(trace.tokens[text]))
    rows = []
    for sae in trace.saes:
        for labelled in (True, False):
            for row in trace.strongest(text, sae, labelled=labelled).iter_rows(named=True):
                strip = trace.strip(text, row["key"])
                strongest = np.maximum(strongest, strip / max(largest[row["key"]], float(strip.max())))
                name = name_of(row["label"], row["status"], row["trigger_tokens"])
                score = interval(row["f1"], row["f1_low"], row["f1_high"]) if row["label"] else None
                peak = trace.tokens[text][row["peak_position"]].strip()
                rows.append((name, score, row["activation"], row["tokens"], peak, row["key"]))
    line = f"<p>{html.tokens(trace.tokens[text], strongest.tolist(), largest=1.0)}</p>"
    return line + html.table(["feature", "F1", "activation", "tokens", "most at", "key"], rows)
