"""How interventions, causal checks and attributions look in a terminal or a pipe.

What belongs here: from those results to lines. What does not: getting them (`study/{intervene,causal,attribution}.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering.text import plain, quoted

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.study.attribution import Attribution
    from scopeatlas.study.causal import CausalCheck
    from scopeatlas.study.intervene import Intervention

RAISED = {"ablate": "ablated", "set": "set to {:.4g}", "scale": "scaled by {:.4g}", "add": "raised by {:.4g}"}
PROMPTS_SHOWN = 50


def print_intervention(out: Console, found: "Intervention") -> None:
    """The prompt with its edited tokens marked, the edits, the next token before and after, and both continuations."""
    out.print(runs(found.tokens, found.edited_tokens), soft_wrap=True)
    out.print()
    print_edits(out, found.edits)
    out.print(Text(f"\nnext token (KL {found.kl:.3g} nats)", style="bold"))
    if found.next_tokens.is_empty():
        out.print("  nothing changes")
    table = _table("left", "right", "left", "right", "right")
    for row in found.next_tokens.iter_rows(named=True):
        style = "green" if row["change"] > 0 else "red"
        cells = (f"{row['clean']:.4f}", "->", f"{row['edited']:.4f}", Text(f"{row['change']:+.4f}", style=style))
        table.add_row(f"  {quoted([row['token']])}", *cells)
    out.print(table)
    for name, continuation in (("clean", found.clean), ("edited", found.edited)):
        if continuation.ids:
            out.print(Text(f"{name:<8}", style="bold").append(plain(continuation.text), style="none"), soft_wrap=True)


def print_edits(out: Console, edits: "pl.DataFrame") -> None:
    """What was done to each feature, and how active it was before and after (EDIT_ROW)."""
    table = _table("right", "left", "left", "left")
    for row in edits.iter_rows(named=True):
        done = RAISED[row["change"]].format(row["value"])
        where = f"on {row['tokens']} tokens" if row["tokens"] else "nowhere"
        means = f", {row['before']:.4g} -> {row['after']:.4g} on average; fired on {row['fired']}" if row["tokens"] else ""
        name = Text(plain(row["name"]), style="bold" if row["label"] else "")
        table.add_row(_number_of(row["key"]), done, f"{where}{means}", name)
    out.print(table)


def print_causal_check(out: Console, found: "CausalCheck") -> None:
    """The verdict, the edits, and the change in each prompt beside that under random features."""
    out.print(Text(plain(found.verdict), style="bold"), soft_wrap=True)
    print_edits(out, found.edits)
    table = Table(box=None, pad_edge=False)
    for name in ("prompt", "clean", "edited", "change", "random features"):
        table.add_column(name, justify="right")
    for row in found.prompts.head(PROMPTS_SHOWN).iter_rows(named=True):
        values = (f"{row['clean']:.4f}", f"{row['edited']:.4f}", f"{row['change']:+.4f}", f"{row['control']:+.4f}")
        table.add_row(str(row["prompt"] + 1), *values)
    out.print(table)
    if found.prompts.height > PROMPTS_SHOWN:
        out.print(f"and {found.prompts.height - PROMPTS_SHOWN} more prompts: --json has all")
    counted = f"{len(found.controls)} draws of random features"
    out.print(Text(f"{counted}: mean changes {min(found.controls):+.3g} to {max(found.controls):+.3g}"), soft_wrap=True)


def print_attribution(out: Console, found: "Attribution", *, top: int) -> None:
    """The prompt with the tokens that contribute marked, the features that do, and what of the whole they explain."""
    strongest = max([abs(value) for value in found.by_token], default=0.0)
    out.print(runs(found.tokens, [abs(value) > strongest / 4 for value in found.by_token]), soft_wrap=True)
    out.print(Text(f"\n{plain(found.contrast)}: {found.difference:+.3f} logits", style="bold"), soft_wrap=True)
    table = _table("right", "right", "right", "left", "left")
    for row in found.features.head(top).iter_rows(named=True):
        measured = "" if row["measured"] is None else f"ablated {row['measured']:+.4f}"
        at = found.places.filter(found.places["feature"] == row["feature"]).sort("activation")["token"][-1]
        on = f"at {quoted([at])}" + (f" and {row['tokens'] - 1} more" if row["tokens"] > 1 else "")
        value = Text(f"{row['attribution']:+.4f}", style="green" if row["attribution"] > 0 else "red")
        table.add_row(value, measured, _number_of(row["key"]), on, Text(plain(row["name"]), style="bold" if row["label"] else ""))
    out.print(table)
    part = found.explained
    parts = f"features {part.features:+.3f}, error {part.error:+.3f}, bias {part.bias:+.3f}"
    out.print(Text(f"activation times gradient {part.total:+.3f} = {parts}"), soft_wrap=True)
    out.print(f"features explain {part.share * 100:.0f} % of features and error, token by token")
    out.print(f"without all features the difference is {found.difference - part.measured:+.3f}: {part.measured:+.3f} less")
    if found.agreement is not None:
        out.print(f"attribution and ablation correlate at {found.agreement:.3f} over the features ablated")


def runs(tokens: Sequence[str], marks: Sequence[bool]) -> Text:
    """Tokens in a row, each run of marked ones in «» and bold."""
    line = Text()
    for place, (token, is_marked) in enumerate(zip(tokens, marks, strict=True)):
        before = place > 0 and marks[place - 1]
        after = place + 1 < len(marks) and marks[place + 1]
        opening, closing = ("" if before else "«", "" if after else "»") if is_marked else ("", "")
        line.append(f"{opening}{plain(token)}{closing}", style="bold green" if is_marked else "")
    return line


def _table(*justify: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for side in justify:
        table.add_column(justify=side, overflow="fold")  # type: ignore[arg-type]
    return table


def _number_of(key: str) -> Text:
    return Text(key.rpartition("/")[2], style="cyan")
