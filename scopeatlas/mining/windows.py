"""Windows of examples as text, with the tokens that fire marked.

What belongs here: from token texts and activations to strings. What does not: choosing or cutting windows
(`examples.py`), or colouring them for a terminal (`rendering/`).
"""

from collections.abc import Sequence

import numpy as np

MARK_SHARE = 0.3
"""A token is marked if it fires at more than this share of the window's peak (delphi's convention)."""


def mark(tokens: Sequence[str], activations: Sequence[float], *, marks: tuple[str, str] = ("«", "»")) -> str:
    """Join tokens into one line; each run that fires stands between marks, its leading space outside."""
    fires = firing(activations[: len(tokens)])
    parts: list[str] = []
    for i, token in enumerate(tokens):
        opens = fires[i] and not (i and fires[i - 1])
        closes = fires[i] and not (i + 1 < len(tokens) and fires[i + 1])
        space = token[: len(token) - len(token.lstrip())] if opens else ""
        parts.append(f"{space}{marks[0] if opens else ''}{token[len(space) :]}{marks[1] if closes else ''}")
    return " ".join("".join(parts).split())


def firing(activations: Sequence[float]) -> np.ndarray:
    """Which tokens of a window count as firing: bool [tokens]."""
    values = np.asarray(activations, dtype=np.float32)
    return values > MARK_SHARE * values.max(initial=0)
