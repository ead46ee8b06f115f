"""Scripted judges for the test server: what they answer follows a stated rule, and is right as often as stated.

What belongs here: reading what a judge was shown, and rules to answer by. What does not: the server (`llm_server.py`).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.llm_brain import Body, Said, SchemaBrain

Fires = Callable[[str, str], bool]
"""Whether a claim says that the feature fires in a text."""


@dataclass(frozen=True)
class Shown:
    """What one request shows: the claim ("" for none) and the values of its other sections by title, in order."""

    claim: str
    sections: dict[str, list[Any]]

    @property
    def texts(self) -> list[Any]:
        """The numbered texts, without their numbers: strings, or lists of tokens."""
        return [text for _, text in self.sections["TEXTS"]]


def is_judged(body: Body) -> bool:
    """Whether this is a judge's request, and not the client's question whether schemas are kept to."""
    return "=== DATA" in body["messages"][-1]["content"]


def shown_in(body: Body) -> Shown:
    """Read a judge's request as a judge reads it: from the fenced message."""
    lines = body["messages"][-1]["content"].split("\n")
    begin = next(i for i, line in enumerate(lines) if re.fullmatch(r"=== DATA \w+ BEGIN ===", line))
    end = lines.index(lines[begin].replace("BEGIN", "END"))
    sections: dict[str, list[Any]] = {}
    for line in lines[begin + 1 : end]:
        if re.fullmatch(r"[A-Z][A-Z ]*\d*", line):
            sections[line] = []
        else:
            sections[list(sections)[-1]].append(json.loads(line))
    return Shown("".join(sections.pop("DESCRIPTION", [])), sections)


class JudgeBrain:
    """Says of each text whether `fires(claim, text)`, and lies where a draw from (seed, claim, text) is not below `accuracy`.

    Asked for an intruder it names the first text of a set of which it says that nothing fires there, else the first.
    """

    def __init__(self, fires: Fires, *, accuracy: float = 1.0, seed: int = 0):
        self._fires, self._accuracy, self._seed = fires, accuracy, seed

    def answer(self, body: Body) -> str:
        if not is_judged(body):
            return SchemaBrain().answer(body)
        shown = shown_in(body)
        if "TEXTS" in shown.sections:
            says = {str(number): int(self.says(shown.claim, text)) for number, text in shown.sections["TEXTS"]}
        else:
            says = {
                title.split()[1]: next((place for place, text in lines if not self.says("", text)), 1)
                for title, lines in shown.sections.items()
            }
        return json.dumps(says)

    def says(self, claim: str, text: str) -> bool:
        """Its verdict on one text, right or not."""
        digest = hashlib.sha256(f"{self._seed}\0{claim}\0{text}".encode()).digest()
        is_right = int.from_bytes(digest[:8], "big") / 2**64 < self._accuracy
        return self._fires(claim, text) == is_right


def repeats(words: int) -> Fires:
    """The rule of a judge for claims that quote: a text fits if `words` consecutive words of it stand in the claim.

    Words are runs of letters and digits, compared without case.
    """

    @cache
    def grams(text: str) -> frozenset[tuple[str, ...]]:
        found = re.findall(r"\w+", text.lower())
        return frozenset(tuple(found[i : i + words]) for i in range(len(found) - words + 1))

    return lambda claim, text: not grams(claim).isdisjoint(grams(text))


class SimulationBrain:
    """Gives each token the strength `strengths(claim, tokens)` and the probability `sure`, the next digit up the rest."""

    def __init__(self, strengths: Callable[[str, Sequence[str]], Sequence[int]], *, sure: float = 1.0):
        self._strengths, self._sure = strengths, sure

    def answer(self, body: Body) -> str | Said:
        if not is_judged(body):
            return SchemaBrain().answer(body)
        shown = shown_in(body)
        rows = {str(number): [*self._strengths(shown.claim, tokens)] for number, tokens in shown.sections["TEXTS"]}
        text = json.dumps(rows)
        pieces = re.findall(r"\d|[^\d]+", text)
        return Said(text, [self._piece(piece) for piece in pieces])

    def _piece(self, piece: str) -> dict[str, Any]:
        chances = {piece: 1.0}
        if piece.isdigit() and self._sure < 1:
            chances = {piece: self._sure, str((int(piece) + 1) % 10): 1 - self._sure}
        top = [{"token": token, "logprob": math.log(chance), "bytes": None} for token, chance in chances.items()]
        return {**top[0], "top_logprobs": top}
