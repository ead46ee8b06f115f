"""What can be counted about a feature, for an explainer to read beside the examples. Explain documents alone.

What belongs here: those counts. What does not: the examples, or how any of it is put to an LLM (`explainers.py`).
"""

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from scopeatlas.hypotheses.units import Firings, Units, key_hits, key_totals

TOP_TOKENS = 8
POSITION_EDGES = (1, 4, 16, 64)
"""Last place of each range of places in a text; one more range holds the rest."""
MIN_SHARE = 0.005
"""Kinds of characters with a smaller share of a feature's firings are left out."""


def computed_facts(units: Units, firings: Firings, features: Sequence[int]) -> Mapping[int, list[JsonValue]]:
    """Per feature: its firing rate, the tokens it fires on most, where in texts and lines it fires, in which writing.

    Shares are of its firings in explain documents and stand beside those of all tokens there; `lift` is their quotient.
    All figures have three digits. firings: of every split. A feature that never fires there has no facts.
    """
    inside = firings.within(units, "explain")
    wanted = np.isin(inside.feature, np.asarray(features, dtype=np.int64))
    mine = Firings(inside.feature[wanted], inside.position[wanted], inside.width, value=inside.value[wanted])
    everywhere = np.flatnonzero(units.in_split("explain"))
    fired = np.bincount(mine.feature, minlength=mine.width)
    tokens = _top_tokens(units, mine, fired, len(everywhere))
    places, line_starts, writing = _places(units), _line_starts(units), _writing(units)
    names = [*_ranges(), "line start", *_KINDS]
    columns = [places == i for i in range(len(_ranges()))] + [line_starts] + [writing == i for i in range(len(_KINDS))]
    base = {name: column[everywhere].mean() for name, column in zip(names, columns, strict=True)}
    counts = {
        name: np.bincount(mine.feature, column[mine.position], mine.width) for name, column in zip(names, columns, strict=True)
    }
    facts = {}
    for feature in (int(f) for f in features if fired[f]):
        share = {name: _digits(counts[name][feature] / fired[feature]) for name in names}
        facts[feature] = [
            {"firing_rate": _digits(fired[feature] / len(everywhere))},
            {"top_tokens": tokens.get(feature, [])},
            {"positions": {name: share[name] for name in _ranges()}, "of_all_tokens": {n: _digits(base[n]) for n in _ranges()}},
            {"line_start": share["line start"], "of_all_tokens": _digits(base["line start"])},
            {"writing": {name: share[name] for name in _KINDS if share[name] >= MIN_SHARE}},
        ]
    return facts


def _top_tokens(units: Units, firings: Firings, fired: np.ndarray, total: int) -> dict[int, list[dict[str, str | float]]]:
    hits = key_hits(units, firings, "token").join(key_totals(units, "explain", "token"), on="key")
    hits = hits.sort("feature", "hits", "key", descending=[False, True, False]).group_by("feature", maintain_order=True)
    texts = units.column("token")[1]
    found: dict[int, list[dict[str, str | float]]] = {}
    for feature, key, count, everywhere in hits.head(TOP_TOKENS).select("feature", "key", "hits", "total").iter_rows():
        share = count / fired[feature]
        fact: dict[str, str | float] = {"token": texts[key], "share": _digits(share), "lift": _digits(share * total / everywhere)}
        found.setdefault(feature, []).append(fact)
    return found


def _ranges() -> list[str]:
    starts = [1, *(edge + 1 for edge in POSITION_EDGES)]
    named = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, POSITION_EDGES, strict=False)]
    return [*named, f"{starts[-1]} or later"]


def _places(units: Units) -> np.ndarray:
    """In which range of places from the beginning of its context each position is: int64 [N]."""
    counted = units.counted.reshape(units.contexts, units.length)
    return np.searchsorted(POSITION_EDGES, counted.cumsum(axis=1).ravel())


def _line_starts(units: Units) -> np.ndarray:
    """Which positions come after the end of a line: bool [N]."""
    before, texts = units.column("previous")
    ends_line = np.array([text.endswith("\n") for text in texts] + [False])
    return ends_line[before]


_KINDS = (
    "Latin",
    "Cyrillic",
    "Greek",
    "Chinese",
    "Japanese",
    "Korean",
    "Arabic",
    "Hebrew",
    "Devanagari",
    "digits",
    "marks",
    "other",
)
_NAMED = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def _writing(units: Units) -> np.ndarray:
    """Of which of _KINDS the token at each position is: int64 [N], of no meaning where nothing is counted."""
    keys, texts = units.column("token")
    return np.array([_KINDS.index(_kind_of(text)) for text in texts] + [0])[keys]


def _kind_of(text: str) -> str:
    """The script of a token's first letter, "digits" or "marks" where it has none."""
    letter = next((c for c in text if c.isalpha()), None)
    if letter is None:
        return "digits" if any(c.isdigit() for c in text) else "marks"
    script = unicodedata.name(letter, "OTHER").split()[0].split("-")[0]
    kind = _NAMED.get(script, script.capitalize())
    return kind if kind in _KINDS else "other"


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
