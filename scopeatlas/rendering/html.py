"""How results look in a notebook: tables and highlighted tokens as HTML that is safe whatever the text says.

What belongs here: the few pieces that every `_repr_html_` is made of. What does not: a result's own arrangement.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from scopeatlas.rendering.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def escaped(text: object) -> str:
    """Text as HTML: nothing in it is markup."""
    return html.escape(plain(str(text)))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table of values; a float has three significant digits, a cell made by `raw` stays as it is."""
    head = "".join(f"<th style='text-align:left'>{escaped(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    title = f"<caption style='text-align:left'>{escaped(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class raw(str):
    """HTML that `table` takes as it is."""


def tokens(texts: Sequence[str], activations: Sequence[float], *, largest: float | None = None) -> raw:
    """Token texts in a row, each on a green as strong as its activation (0: none); the value is its tooltip."""
    top = max([largest or 0.0, *activations, 1e-9])
    parts = []
    for text, value in zip(texts, activations, strict=True):
        style = f" style='background:rgba(26,127,55,{0.15 + 0.7 * min(1.0, value / top):.2f})'" if value > 0 else ""
        tip = f" title='{value:.3g}'" if value > 0 else ""
        parts.append(f"<span{style}{tip}>{escaped(text)}</span>")
    return raw(f"<span style='white-space:pre-wrap;font-family:monospace'>{''.join(parts)}</span>")


def image(drawn: "Figure") -> raw:
    """A figure inside the page."""
    from scopeatlas.plots.drawing import png

    return raw(f"<img src='data:image/png;base64,{base64.b64encode(png(drawn)).decode()}'/>")


def _cell(value: object) -> str:
    if isinstance(value, raw):
        return value
    if value is None:
        return "-"
    return escaped(f"{value:.3g}" if isinstance(value, float) else value)
