"""Rules: labels that can be executed on any text.

What belongs here: what a rule says, how it reads as a sentence, and what it matches token by token. What does not:
finding rules (`labels/rule_labeller.py`) or counting their hits at scale (`units.py`), which must agree with
`Rule.matches`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scopeatlas.hypotheses.surface import SHAPES, ZONES, in_zone, shape_of, spelling_of, word_of

RuleKind = Literal[
    "token", "word", "prefix", "suffix", "shape", "bigram",
    "previous", "next", "skip", "previous_shape", "next_shape", "near", "format", "position",
    "topic",
    "and", "or", "and_not",
]  # fmt: skip
Unit = Literal["token", "context"]

AFFIX_LENGTHS = (1, 2, 3, 4)
PAIR = "\x1f"
"""Joins the two words of a bigram key."""
SHORT_KEYS = 4
"""How many keys a short label names."""
REACH = 8
"""How many tokens before it a `near` rule looks at."""


@dataclass(frozen=True)
class Rule:
    """A feature is claimed to fire where a key matches, or where its two parts say so.

    kind: of the token itself, token (its exact text), word (text without space and case), prefix / suffix (of a longer
    word), shape (one of SHAPES), bigram (previous and current word). Of what is around it, previous / next (the
    neighbouring token's exact text), skip (the text two tokens before), previous_shape / next_shape, near (a word among
    the REACH tokens before), format (one of ZONES), position (in the context, 1 is the first token). Of the whole
    context, topic (it holds one of the words). and / or / and_not: of two token rules. keys: texts, any of which may
    match; for a bigram the two words (`spelling_of`) joined by PAIR. parts: the two rules of a composition.

    Raises ValueError for keys or parts that the kind cannot have.
    """

    kind: RuleKind
    keys: tuple[str, ...] = ()
    parts: "tuple[Rule, Rule] | None" = None

    def __post_init__(self) -> None:
        if (self.parts is not None) != (self.kind in {"and", "or", "and_not"}):
            raise ValueError(f"a rule of kind {self.kind} with parts {self.parts}: only and, or, and_not are made of two rules")
        if self.parts is not None and (self.keys or any(part.parts or part.unit == "context" for part in self.parts)):
            raise ValueError("a composition has no keys of its own, and its parts are simple rules about tokens")
        known = {"shape": SHAPES, "previous_shape": SHAPES, "next_shape": SHAPES, "format": ZONES}.get(self.kind)
        if known is not None and not set(self.keys) <= set(known):
            raise ValueError(f"a rule of kind {self.kind} with keys {self.keys}; known are {', '.join(known)}")

    @property
    def unit(self) -> Unit:
        """What the rule is tested on: single tokens, or whole contexts for a topic."""
        return "context" if self.kind == "topic" else "token"

    def matches(self, tokens: Sequence[str]) -> list[bool]:
        """Whether each token of a context matches; for a topic, all or none do.

        tokens: their texts, what is in front of the text (BOS) left out, "" for one that does not count: it is matched
        by no token rule and is nobody's neighbour.
        """
        match self.kind:
            case "and" | "or" | "and_not":
                return self._combined(tokens)
            case "topic":
                return [any(word_of(token) in self.keys for token in tokens)] * len(tokens)
            case "format":
                inside = [in_zone(zone, tokens) for zone in self.keys]
                found = [any(zones) for zones in zip(*inside, strict=True)]
            case "near":
                words = [word_of(token) for token in tokens]
                found = [any(word in self.keys for word in words[max(i - REACH, 0) : i]) for i in range(len(tokens))]
            case "position":
                found = [str(i + 1) in self.keys for i in range(len(tokens))]
            case _:
                padded = ["", "", *tokens, ""]
                found = [self._matches_at(*padded[i : i + 4]) for i in range(len(tokens))]
        return [bool(token) and hit for token, hit in zip(tokens, found, strict=True)]

    def _combined(self, tokens: Sequence[str]) -> list[bool]:
        assert self.parts is not None
        pairs = zip(*(part.matches(tokens) for part in self.parts), strict=True)
        match self.kind:
            case "and":
                return [a and b for a, b in pairs]
            case "or":
                return [a or b for a, b in pairs]
            case _:
                return [a and not b for a, b in pairs]

    def _matches_at(self, second: str, before: str, token: str, after: str) -> bool:
        word = word_of(token)
        match self.kind:
            case "token":
                return token in self.keys
            case "word":
                return word in self.keys
            case "prefix":
                return word.isalpha() and any(word.startswith(key) and len(word) > len(key) for key in self.keys)
            case "suffix":
                return word.isalpha() and any(word.endswith(key) and len(word) > len(key) for key in self.keys)
            case "shape":
                return shape_of(token) in self.keys
            case "bigram":
                return bool(before) and f"{spelling_of(before)}{PAIR}{spelling_of(token)}" in self.keys
            case "previous":
                return bool(before) and before in self.keys
            case "next":
                return bool(after) and after in self.keys
            case "skip":
                return bool(second) and second in self.keys
            case "previous_shape":
                return bool(before) and shape_of(before) in self.keys
            case "next_shape":
                return bool(after) and shape_of(after) in self.keys
            case _:
                raise ValueError(f"unknown rule kind {self.kind}")

    def sentence(self) -> str:
        """The rule as a person would say it."""
        if self.parts is None:
            return self._what() or f"{'the' if self.kind in {'previous', 'next'} else 'a'} token {self._where()}"
        one, other = self.parts
        match self.kind:
            case "or":
                return f"{one.sentence()}, or {other.sentence()}"
            case "and_not":
                return f"{one.sentence()}, but not {other._what() or other._where()}"
            case _:
                if one._what() and other._what():
                    return f"{one._what()}, where that is {other._what()}"
                what = one._what() or other._what()
                where = [part._where() for part in self.parts if not part._what()]
                return f"{what or 'a token'} {' and '.join(where)}"

    def _what(self) -> str:
        """The tokens that a rule about the token itself matches; "" for a rule about what is around it."""
        shown = _either(_quoted(key) for key in self.keys)
        match self.kind:
            case "token":
                return f"the token {shown}"
            case "word":
                return f"the word{'s' if len(self.keys) > 1 else ''} {shown}, in any case"
            case "bigram":
                before: dict[str, list[str]] = {}
                for first, second in (key.split(PAIR) for key in self.keys):
                    before.setdefault(second, []).append(_quoted(first))
                return _either(f"{_quoted(second)} after {_either(firsts)}" for second, firsts in before.items())
            case "prefix":
                return f"words that begin with {shown}"
            case "suffix":
                return f"words that end in {shown}"
            case "shape":
                return _either(SHAPES[key] for key in self.keys)
            case "topic":
                return f"texts about {', '.join(self.keys)}"
            case _:
                return ""

    def _where(self) -> str:
        """Where a rule about what is around the token puts it, to follow "a token"."""
        shown = _either(_quoted(key) for key in self.keys)
        match self.kind:
            case "previous":
                return f"after {shown}"
            case "next":
                return f"before {shown}"
            case "skip":
                return f"two after {shown}"
            case "previous_shape":
                return f"after {_either(SHAPES[key] for key in self.keys)}"
            case "next_shape":
                return f"before {_either(SHAPES[key] for key in self.keys)}"
            case "near":
                return f"among the {REACH} after the word{'s' if len(self.keys) > 1 else ''} {shown}"
            case "format":
                return _either(ZONES[key] for key in self.keys)
            case _:
                return _place(sorted(int(key) for key in self.keys))

    def short(self) -> str:
        """The rule as a label of a few words."""
        if self.parts is not None:
            # What the token is comes before what is around it: "lake after the", whichever part was found first.
            ordered = sorted(self.parts, key=lambda part: not part._what()) if self.kind == "and" else self.parts
            between = {"and": " " if any(not part._what() for part in ordered) else " & ", "or": " or ", "and_not": ", not "}
            return between[self.kind].join(part.short() for part in ordered)
        words = [" ".join(_visible(part) for part in key.split(PAIR)) for key in self.keys[:SHORT_KEYS]]
        words += ["…"] if len(self.keys) > SHORT_KEYS else []
        match self.kind:
            case "previous":
                return f"after {' / '.join(words)}"
            case "next":
                return f"before {' / '.join(words)}"
            case "previous_shape" | "next_shape" | "format" | "position":
                return self._where()
            case "skip":
                return f"two after {' / '.join(words)}"
            case "near":
                return f"soon after {' / '.join(words)}"
            case "prefix":
                return " / ".join(f"{word}-" for word in words).replace("…-", "…")
            case "suffix":
                return " / ".join(f"-{word}" for word in words).replace("-…", "…")
            case "shape":
                return " / ".join(SHAPES[key].removeprefix("a ") for key in self.keys[:SHORT_KEYS])
            case "topic":
                return f"about {', '.join(words)}"
            case _:
                return ", ".join(words)

    def to_json(self) -> str:
        """The rule as data, from which `from_json` makes it again."""
        return json.dumps(self._body(), ensure_ascii=False)

    def _body(self) -> dict[str, object]:
        if self.parts is None:
            return {"kind": self.kind, "keys": list(self.keys)}
        return {"kind": self.kind, "parts": [part._body() for part in self.parts]}

    @staticmethod
    def from_json(text: str) -> "Rule":
        """The rule that `to_json` wrote."""
        return _rule_of(json.loads(text))


def _rule_of(body: dict) -> Rule:
    if "parts" in body:
        one, other = body["parts"]
        return Rule(body["kind"], parts=(_rule_of(one), _rule_of(other)))
    return Rule(body["kind"], tuple(body["keys"]))


def _either(texts: Iterable[str]) -> str:
    """Several alternatives as a person lists them."""
    listed = list(texts)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"


def _visible(key: str) -> str:
    return key.strip() or repr(key)[1:-1]


def _place(numbers: list[int]) -> str:
    if numbers == list(range(1, len(numbers) + 1)):
        return "that is the first of a context" if len(numbers) == 1 else f"among the first {len(numbers)} of a context"
    return f"at position {_either(str(number) for number in numbers)} of a context"


def _quoted(key: str) -> str:
    return f'"{key}"' if key.isprintable() else f'"{repr(key)[1:-1]}"'
