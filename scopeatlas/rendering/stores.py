"""How a store looks: the SAEs of its atlas, its catalog, and where each SAE stands.

What belongs here: tables about whole SAEs. What does not: features (`features.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering.text import number, plain, range_of
from scopeatlas.storage.files import human_bytes

if TYPE_CHECKING:
    import polars as pl

    from scopeatlas.upkeep import SaeStatus


def print_saes(out: Console, saes: "pl.DataFrame") -> None:
    """The SAEs of an atlas."""
    table = Table(box=None, pad_edge=False)
    for name in ("sae", "model", "kind", "layer", "features", "labelled", "mean F1", "published (UTC)"):
        left = {"sae", "model", "kind", "published (UTC)"}
        table.add_column(name, overflow="fold", justify="left" if name in left else "right")
    for row in saes.iter_rows(named=True):
        counts = [
            range_of(row["layer"], row["last_layer"]),
            f"{row['features']:,}",
            f"{row['labelled']:,}",
            number(row["mean_f1"]),
        ]
        published = f"{row['published_at']:%Y-%m-%d %H:%M}" if row["published_at"] else "-"
        table.add_row(Text(row["sae"], style="cyan"), Text(plain(row["model"])), row["kind"], *counts, published)
    out.print(table)


def print_catalog(out: Console, rows: "pl.DataFrame") -> None:
    """SAEs that were seen, and what became of each; reasons whole, on lines of their own."""
    table = Table(box=None, pad_edge=False)
    for name in ("release", "path", "model", "kind", "site", "layer", "width", "L0", "size", "state"):
        table.add_column(name, overflow="fold", justify="right" if name in {"layer", "width", "L0", "size"} else "left")
    for row in rows.iter_rows(named=True):
        layers = range_of(min(row["layers"]), max(row["layers"])) if row["layers"] else "-"
        width, l0 = ("-" if row[name] is None else f"{row[name]:,.0f}" for name in ("width", "target_l0"))
        named = [Text(plain(row[name])) for name in ("release", "path", "model", "kind", "site")]
        table.add_row(*named, layers, width, l0, human_bytes(row["bytes"]), row["state"])
    out.print(table)
    for row in rows.filter(rows["reason"] != "").iter_rows(named=True):
        what = f"{row['state']}  {row['release']}/{row['path']}: {row['reason']}"
        out.print(Text(plain(what), style="dim"), soft_wrap=True)


def print_status(out: Console, lines: Sequence["SaeStatus"]) -> None:
    """One line per SAE and corpus; errors on lines of their own, whole."""
    table = Table(box=None, pad_edge=False)
    for name in ("sae", "corpus", "stage", "shards", "labelled", "scored", "published", "size"):
        table.add_column(name, overflow="fold", justify="left" if name in {"sae", "corpus", "stage"} else "right")
    for line in lines:
        shards = f"{line.shards_done}/{line.shards}" + (" (pruned)" if line.pruned else "")
        counts = [f"{count:,}" for count in (line.labelled, line.scored, line.published)]
        table.add_row(Text(line.sae, style="cyan"), line.corpus or "-", line.stage, shards, *counts, human_bytes(line.bytes))
    out.print(table)
    for line in lines:
        if line.last_error:
            out.print(Text("error  ", style="red").append(plain(f"{line.sae}: {line.last_error}"), style="none"), soft_wrap=True)
