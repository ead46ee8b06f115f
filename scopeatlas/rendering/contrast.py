"""How a contrast looks: what the numbers say in words, then the features, the words and the baselines as tables.

What belongs here: from a `Contrast` to a terminal, a pipe or a notebook. What does not: finding anything out
(`study/contrast.py`), or its picture (`plots/forest.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scopeatlas.rendering import html
from scopeatlas.rendering.text import interval, number, plain
from scopeatlas.study.trace import name_of

if TYPE_CHECKING:
    from scopeatlas.study.contrast import Contrast

WORDS_SHOWN = 10
_FEATURES = ("feature", "effect", "p", "in a", "in b", "at equal words", "p", "F1", "")
_WORDS = ("word", "effect", "p", "in a", "in b")
_BASELINES = ("told apart by", "held-out AUROC")


def print_contrast(out: Console, contrast: "Contrast", *, top: int) -> None:
    """The verdict, the `top` surest features (those not significant dim), the surest words, the baselines."""
    out.print(Text(contrast.sae, style="cyan"), soft_wrap=True)
    for sentence in contrast.verdict:
        out.print(Text(plain(sentence)), soft_wrap=True)
    out.print()
    design = contrast.design
    for columns, rows, frame in (
        (_FEATURES, _feature_rows(contrast, top), contrast.features),
        (_WORDS, _word_rows(contrast), contrast.words),
    ):
        table = Table(box=None, pad_edge=False)
        for place, name in enumerate(columns):
            table.add_column(_counted(name, design.a, design.b), justify="left" if place in (0, 8) else "right", overflow="fold")
        for cells, adjusted in zip(rows, frame["p_adjusted"], strict=False):
            table.add_row(*(Text(plain(cell)) for cell in cells), style="bold" if adjusted <= contrast.alpha else "dim")
        out.print(table)
        out.print()
    table = Table(box=None, pad_edge=False)
    for name in _BASELINES:
        table.add_column(name)
    for cells in _baseline_rows(contrast):
        table.add_row(*cells)
    if contrast.baselines.height:
        out.print(table)


def contrast_html(contrast: "Contrast") -> str:
    """The verdict, the picture and the tables."""
    from scopeatlas.study.contrast import SHOWN

    design = contrast.design
    said = "".join(f"<p>{html.escaped(sentence)}</p>" for sentence in contrast.verdict)
    tables = (
        html.table(
            [_counted(name, design.a, design.b) for name in _FEATURES], _feature_rows(contrast, SHOWN), caption=contrast.sae
        ),
        html.table([_counted(name, design.a, design.b) for name in _WORDS], _word_rows(contrast)),
        html.table(_BASELINES, _baseline_rows(contrast)),
    )
    return said + html.image(contrast.plot()) + "".join(tables)


def _counted(name: str, a: int, b: int) -> str:
    return f"{name} ({a if name == 'in a' else b})" if name in ("in a", "in b") else name


def _feature_rows(contrast: "Contrast", top: int) -> list[list[str]]:
    rows = contrast.features.head(top)
    return [
        [
            row["key"].rpartition("/")[2],
            *_tested(row),
            number(row["matched_effect"]),
            "-" if row["matched_p"] is None else _p(row["matched_p"]),
            number(row["f1"]),
            name_of(row["label"], row["status"], row["trigger_tokens"]),
        ]
        for row in rows.iter_rows(named=True)
    ]


def _word_rows(contrast: "Contrast") -> list[list[str]]:
    return [[row["word"], *_tested(row)] for row in contrast.words.head(WORDS_SHOWN).iter_rows(named=True)]


def _baseline_rows(contrast: "Contrast") -> list[Sequence[str]]:
    return [(row["by"], interval(row["auroc"], row["low"], row["high"])) for row in contrast.baselines.iter_rows(named=True)]


def _tested(row: "dict[str, object]") -> list[str]:
    """Effect with its interval, the corrected p-value, and in how many documents of either set."""
    return [interval(row["effect"], row["low"], row["high"]), _p(row["p_adjusted"]), str(row["docs_a"]), str(row["docs_b"])]


def _p(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "-"
