"""What all pictures share: figures that need no display, one set of colours, and PNG bytes.

What belongs here: style and saving. What does not: what is drawn (the modules beside this one).
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.errors import StoreError
from scopeatlas.rendering.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GREEN, RED, BLUE = "#222222", "#b8b8b8", "#1a7f37", "#c0392b", "#2c6fbb"
DPI = 130


def figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty figure of so many inches and its axes, row by row: no pyplot, so nothing is kept or shown behind one's back."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return drawn, axes


def png(drawn: "Figure") -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save(drawn: "Figure", path: str | Path) -> Path:
    """Write the figure as PNG. Raises StoreError if the folder is not there or not writable."""
    target = Path(path)
    try:
        target.write_bytes(png(drawn))
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; name a file in a folder that is there") from error
    return target


def shown(text: str, length: int = 60) -> str:
    """Text for a figure: on one line, cut, without control characters or what matplotlib would take for mathematics."""
    line = " ".join(plain(text).split()).replace("$", r"\$")
    return line if len(line) <= length else line[: length - 1] + "…"
