"""How the command line prints: the console, JSON, corpus text made safe, numbers and plain tables.

What belongs here: what several kinds of results need. What does not: a result's own look (the modules beside this one).
Corpus text is data: it goes into `Text` objects, never through rich's markup, and its control characters are replaced.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

PIPED_WIDTH = 4096
"""Columns of anything that is not a terminal: no key, path or snippet is ever wrapped there."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FIRING = re.compile(r"«[^«»]*»")


def console() -> Console:
    """stdout as it is now: coloured and as wide as the terminal, or plain and very wide."""
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """One JSON document on stdout; numbers that JSON has no word for become null."""
    sys.stdout.write(json.dumps(_jsonable(value), indent=2, default=str, allow_nan=False) + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def plain(text: str) -> str:
    """Text from the corpus on one line, safe to print: no escape sequences, no reversed writing."""
    return _CONTROLS.sub(" ", text)


def marked(text: str) -> Text:
    """A snippet with its «firing» runs bold."""
    line = Text(plain(text))
    line.highlight_regex(_FIRING, "bold green")
    return line


def share(value: float) -> str:
    """A density as a percentage of two significant digits."""
    return f"{value * 100:.2g} % of tokens" if value < 0.1 else f"{value * 100:.0f} % of tokens"


def quoted(tokens: Iterable[str]) -> str:
    """Tokens as they are, spaces and all, told apart."""
    return " ".join(json.dumps(plain(token), ensure_ascii=False) for token in tokens)


def number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def interval(value: object, low: object, high: object) -> str:
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def range_of(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def sites(texts: Sequence[str]) -> str:
    """One site, or how many and from which to which."""
    return texts[0] if len(texts) == 1 else f"{len(texts)} sites, {texts[0]} to {texts[-1]}"


def print_facts(out: Console, facts: Mapping[str, object]) -> None:
    """Names and values, aligned: those that are known, sites condensed, several of anything else on lines of their own."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        shown = name.replace("_", " ")
        if isinstance(value, list):
            rows += [(shown, sites(value))] if name.startswith("sites") else [(shown, str(item)) for item in value]
        elif value is not None:
            number = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append((shown, number))
    print_table(out, rows)


def print_table(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        out.print(Text(f"{name:<{width}}  ").append(plain(value)), soft_wrap=True)
