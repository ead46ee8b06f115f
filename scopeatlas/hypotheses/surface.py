"""What a token's text looks like, and what the text before it has opened: the surface that rules look at.

What belongs here: properties of texts that need nothing but the characters. What does not: rules about them
(`rules.py`) or their columns over a corpus (`units.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SHAPES = {
    "lower": "a lowercase word",
    "piece": "a lowercase piece of a word",
    "capitalised": "a capitalised word",
    "upper": "a word in capitals",
    "initial": "a single capital letter",
    "mixed": "a word of mixed case",
    "caseless": "a word in a script without case",
    "digits": "a number",
    "decimal": "a number with a decimal or grouping mark",
    "alphanumeric": "letters and digits together",
    "marked": "a word with a mark in it",
    "stop": "a full stop, question mark or exclamation mark",
    "comma": "a comma, colon or semicolon",
    "opening": "an opening bracket",
    "closing": "a closing bracket",
    "quote": "a quotation mark or apostrophe",
    "dash": "a dash",
    "newline": "a line break",
    "space": "white space",
    "symbol": "a symbol",
}
"""Every token has one of these shapes, said as a person would."""

_PUNCTUATION = {
    "stop": ".!?…。",
    "comma": ",:;、",
    "opening": "([{⟨",
    "closing": ")]}⟩",
    "quote": "\"'“”‘’«»`",
    "dash": "-–—−",
}
_OF_MARK = {mark: shape for shape, marks in _PUNCTUATION.items() for mark in marks}


def word_of(token: str) -> str:
    """A token's text without surrounding space, case folded: what word, affix and topic rules look at."""
    return token.strip().casefold()


def spelling_of(token: str) -> str:
    """What bigram rules look at: the word, or the text itself of a token that is nothing but space."""
    return word_of(token) or token


def shape_of(token: str) -> str:
    """The one of SHAPES that a token has. Punctuation goes by its first mark; a piece has no space before it."""
    text = token.strip()
    if not text:
        return "newline" if "\n" in token else "space"
    if text.isalpha():
        return _shape_of_letters(text, piece=token[0] == text[0])
    if text.isdigit():
        return "digits"
    if text[0].isdigit() and text[-1].isdigit() and all(c.isdigit() or c in ".,'" for c in text):
        return "decimal"
    if any(c.isalpha() for c in text):
        return "alphanumeric" if any(c.isdigit() for c in text) else "marked"
    return _OF_MARK.get(text[0], "symbol")


def _shape_of_letters(text: str, *, piece: bool) -> str:
    if text.islower():
        return "piece" if piece else "lower"
    if text.isupper():
        return "upper" if len(text) > 1 else "initial"
    if text[0].isupper() and text[1:].islower():
        return "capitalised"
    return "mixed" if any(c.isupper() or c.islower() for c in text) else "caseless"


ZONES = {
    "quotes": "inside quotation marks",
    "brackets": "inside brackets",
    "heading": "in a heading",
    "list": "in an item of a list",
    "indented": "in an indented line",
    "line": "at the beginning of a line",
}
"""Where the text before a token puts it; one token may be in several."""


@dataclass(frozen=True)
class Scanner:
    """An automaton over characters. states: the first is where a text begins. step: (state, character) -> state.
    zones: the states that put what follows in a zone.

    Nothing is known of the text before a context, so it begins outside of every zone.
    """

    states: tuple[str, ...]
    step: Callable[[str, str], str]
    zones: dict[str, frozenset[str]]

    def after(self, state: str, text: str) -> str:
        """The state after a text that is entered in `state`."""
        for character in text:
            state = self.step(state, character)
        return state


def _quotation(state: str, character: str) -> str:
    match character:
        case '"':
            return "outside" if state == "inside" else "inside"
        case "“" | "«":
            return "inside"
        case "”" | "»" | "\n":
            return "outside"
        case _:
            return state


def _brackets(state: str, character: str) -> str:
    if character in "([{":
        return str(min(int(state) + 1, 3))
    if character in ")]}":
        return str(max(int(state) - 1, 0))
    return "0" if character == "\n" else state


def _line(state: str, character: str) -> str:
    """Headings are "== so ==" or "# so", items of a list "- so", "* so", "• so" or "1. so"."""
    if character == "\n":
        return "start"
    if state in {"text", "heading", "list", "indented"}:
        return state
    if state == "number" and character.isdigit():
        return "number"
    if state == "number":
        return "mark" if character in ".)" else "text"
    if state == "mark":
        return "list" if character == " " else "text"
    if state == "equals":
        return "heading" if character == "=" else "text"
    if state == "hash":
        return {"#": "hash", " ": "heading"}.get(character, "text")
    if character == " ":
        return {"start": "1", "1": "2", "2": "3"}.get(state, "indented")
    begun = {"\t": "indented", "=": "equals", "#": "hash", "-": "mark", "*": "mark", "•": "mark"}
    return "number" if character.isdigit() else begun.get(character, "text")


SCANNERS = (
    Scanner(("outside", "inside"), _quotation, {"quotes": frozenset({"inside"})}),
    Scanner(("0", "1", "2", "3"), _brackets, {"brackets": frozenset({"1", "2", "3"})}),
    Scanner(
        ("text", "start", "1", "2", "3", "number", "mark", "equals", "hash", "heading", "list", "indented"),
        _line,
        {
            "heading": frozenset({"heading"}),
            "list": frozenset({"list"}),
            "indented": frozenset({"indented"}),
            "line": frozenset({"start", "1", "2", "3"}),
        },
    ),
)


def scanner_of(zone: str) -> Scanner:
    """The automaton that finds a zone. Raises ValueError for a zone that there is not."""
    for scanner in SCANNERS:
        if zone in scanner.zones:
            return scanner
    raise ValueError(f"unknown format {zone}; known are {', '.join(ZONES)}")


def in_zone(zone: str, tokens: Sequence[str]) -> list[bool]:
    """Whether the text before each token puts it in a zone."""
    scanner = scanner_of(zone)
    state, inside = scanner.states[0], []
    for token in tokens:
        inside.append(state in scanner.zones[zone])
        state = scanner.after(state, token)
    return inside
