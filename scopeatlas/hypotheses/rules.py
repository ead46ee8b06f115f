"""Rules: labels that can be executed on any text.

What belongs here: what a rule says, how it reads as a sentence, and what it matches token by token. What does not:
finding rules (`labels/rule_labeller.py`) or counting their hits at scale (`units.py`), which must agree with
`Rule.matches`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RuleKind = Literal["token", "word", "previous", "next", "bigram", "prefix", "suffix", "topic"]
Unit = Literal["token", "context"]

AFFIX_LENGTHS = (2, 3, 4)
PAIR = "\x1f"
"""Joins the two token texts of a bigram key."""


def word_of(token: str) -> str:
    """A token's text without surrounding space, case folded: what word, affix and topic rules look at."""
    return token.strip().casefold()


@dataclass(frozen=True)
class Rule:
    """A feature is claimed to fire where a key matches.

    kind: token (its exact text), word (text without space and case), previous / next (the neighbouring token's exact
    text), bigram (previous and current token), prefix / suffix (of a longer word), topic (the context holds one of
    the words). keys: texts, any of which may match; for a bigram the two texts joined by PAIR.
    """

    kind: RuleKind
    keys: tuple[str, ...]

    @property
    def unit(self) -> Unit:
        """What the rule is tested on: single tokens, or whole contexts for a topic."""
        return "context" if self.kind == "topic" else "token"

    def matches(self, tokens: Sequence[str]) -> list[bool]:
        """Whether each token of a context (texts, BOS left out) matches; for a topic, all or none do."""
        if self.kind == "topic":
            found = any(word_of(token) in self.keys for token in tokens)
            return [found] * len(tokens)
        padded = ["", *tokens, ""]
        return [self._matches_at(*padded[i : i + 3]) for i in range(len(tokens))]

    def _matches_at(self, before: str, token: str, after: str) -> bool:
        word = word_of(token)
        match self.kind:
            case "token":
                return token in self.keys
            case "word":
                return word in self.keys
            case "previous":
                return bool(before) and before in self.keys
            case "next":
                return bool(after) and after in self.keys
            case "bigram":
                return bool(before) and f"{before}{PAIR}{token}" in self.keys
            case "prefix":
                return word.isalpha() and any(word.startswith(key) and len(word) > len(key) for key in self.keys)
            case "suffix":
                return word.isalpha() and any(word.endswith(key) and len(word) > len(key) for key in self.keys)
            case _:
                raise ValueError(f"unknown rule kind {self.kind}")

    def sentence(self) -> str:
        """The rule as a person would say it."""
        shown = [_quoted(key) for key in self.keys]
        listed = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
        match self.kind:
            case "token":
                return f"the token {listed}"
            case "word":
                return f"the word {listed}, in any case" if len(shown) == 1 else f"the words {listed}, in any case"
            case "previous":
                return f"the token after {listed}"
            case "next":
                return f"the token before {listed}"
            case "bigram":
                pairs = [f"{_quoted(b)} after {_quoted(a)}" for a, b in (key.split(PAIR) for key in self.keys)]
                return " or ".join(pairs)
            case "prefix":
                return f"words that begin with {listed}"
            case "suffix":
                return f"words that end in {listed}"
            case _:
                return f"texts about {', '.join(self.keys)}"

    def short(self) -> str:
        """The rule as a label of a few words."""
        words = [key.strip() or repr(key)[1:-1] for key in self.keys]
        match self.kind:
            case "token" | "word":
                return ", ".join(words)
            case "previous":
                return f"after {' / '.join(words)}"
            case "next":
                return f"before {' / '.join(words)}"
            case "bigram":
                return ", ".join("".join(key.split(PAIR)).strip() for key in self.keys)
            case "prefix":
                return " / ".join(f"{word}-" for word in words)
            case "suffix":
                return " / ".join(f"-{word}" for word in words)
            case _:
                return f"about {', '.join(words)}"

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "keys": list(self.keys)}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Rule":
        body = json.loads(text)
        return Rule(body["kind"], tuple(body["keys"]))


def _quoted(key: str) -> str:
    return f'"{key}"' if key.isprintable() else f'"{repr(key)[1:-1]}"'
