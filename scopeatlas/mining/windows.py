"""Windows of examples as text, with the tokens that fire marked.

What belongs here: from token ids and activations to strings. What does not: choosing or cutting windows
(`examples.py`), or colouring them for a terminal (`cli.py`).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

MARK_SHARE = 0.3
"""A token is marked if it fires at more than this share of the window's peak (delphi's convention)."""


class WindowTexts:
    """Turns windows into text; looks each token id up once."""

    def __init__(self, windows: pl.DataFrame, subject: SubjectModel):
        ids = windows["tokens"].explode().unique().to_list() if len(windows) else []
        self._texts = dict(zip(ids, token_texts(subject.tokenizer, ids), strict=True))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a window, padding left out."""
        return [self._texts[i] for i in ids if i >= 0]

    def marked(self, ids: Sequence[int], activations: Sequence[float], *, marks: tuple[str, str] = ("«", "»")) -> str:
        """The window as one line with runs of firing tokens between marks."""
        return mark(self.tokens(ids), activations, marks=marks)


def mark(tokens: Sequence[str], activations: Sequence[float], *, marks: tuple[str, str] = ("«", "»")) -> str:
    """Join tokens into one line; each run that fires stands between marks, its leading space outside."""
    values = np.asarray(activations[: len(tokens)], dtype=np.float32)
    fires = values > MARK_SHARE * values.max(initial=0)
    parts: list[str] = []
    for i, token in enumerate(tokens):
        opens = fires[i] and not (i and fires[i - 1])
        closes = fires[i] and not (i + 1 < len(tokens) and fires[i + 1])
        space = token[: len(token) - len(token.lstrip())] if opens else ""
        parts.append(f"{space}{marks[0] if opens else ''}{token[len(space) :]}{marks[1] if closes else ''}")
    return " ".join("".join(parts).split())
