"""The terms that full-text search looks for: words without case and plural, and whole tokens.

What belongs here: from text to terms, the same way for features and for queries, so that a match can be explained. What
does not: the index over them (`publish.py`), or ranking (`search.py`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

TRIGGER, PROMOTED = "trigger", "promoted"
LONGEST_TERM = 400
"""Characters; the index leaves out what is longer."""
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words of a text in order, repeats and all: letters and digits, case folded, singular."""
    return [_singular(word) for word in _WORD.findall(text.casefold())]


def token_term(place: str, token: str) -> str:
    """The term of a whole token that triggers a feature or that it promotes: case and surrounding space do not matter.

    place: TRIGGER or PROMOTED.
    """
    return f"{place}:{quote(token.strip().casefold() or token, safe='')}"


def terms_of(label: str, trigger_tokens: Sequence[str], promoted: Sequence[str], has_evidence: bool) -> str:
    """Everything that a feature can be found by in full text, separated by spaces.

    Without evidence of what it reads, that is what it promotes as whole tokens: those are in its weights.
    """
    tokens = [token_term(PROMOTED, token) for token in promoted]
    if not has_evidence:
        return " ".join(dict.fromkeys(tokens))
    words = [word for text in (label, *trigger_tokens, *promoted) for word in words_of(text)]
    return " ".join([*words, *dict.fromkeys([*(token_term(TRIGGER, token) for token in trigger_tokens), *tokens])])


def query_terms(query: str) -> dict[str, str]:
    """What to look for, and what each term was in the query: its words; of a query that has none, as (, the whole token."""
    words = {}
    for word in _WORD.findall(query):
        words.setdefault(_singular(word.casefold()), word)
    return words or {token_term(place, query): query for place in (TRIGGER, PROMOTED)}


def coverage(terms: Mapping[str, str], found: Mapping[str, tuple[str, ...]]) -> float:
    """The share of a query's words that stand anywhere in a feature's row, which `matches` found: of those words that say
    something, if any does."""
    asked = {word for term, word in terms.items() if term not in stop_words()} or set(terms.values())
    return len(asked & {word for words in found.values() for word in words}) / len(asked)


def matches(terms: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Which words of a query stand in the label, the trigger tokens and the promoted tokens of a feature's row."""
    places = {
        "label": ([row["label"]], ""),
        "trigger_tokens": (row["trigger_tokens"], TRIGGER),
        "promoted": (row["promoted"], PROMOTED),
    }
    found = {}
    for field, (texts, place) in places.items():
        held = {term for text in texts for term in (*words_of(text), token_term(place, text))}
        found[field] = tuple(word for term, word in terms.items() if term in held)
    return {field: words for field, words in found.items() if words}


@cache
def stop_words() -> frozenset[str]:
    """Words that say nothing about a feature by themselves; scikit-learn takes a second to import, so only when asked."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS | {"s", "t", "bos"}


def _singular(word: str) -> str:
    """Without an English plural s (the S stemmer of Harman, 1991, "How effective is suffixing?")."""
    if len(word) < 4:
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word
