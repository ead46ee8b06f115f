"""What all judges share: a claim, the windows of one request, how they look in it, and reading verdicts on them.

What belongs here: what does not depend on the question. What does not: the questions (a module each), asking them (`llm/`),
or what verdicts add up to (`scoring/`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import JsonValue, RootModel, StrictInt

from scopeatlas.llm.prompts import Prompt, fenced, load_prompt
from scopeatlas.llm.replies import InvalidReply, read_json
from scopeatlas.llm.requests import Answer, ChatRequest, JsonSchema
from scopeatlas.mining.windows import firing

WINDOWS_PER_REQUEST = 20
MARKS = ("<<", ">>")
PROMPTS = Path(__file__).parent / "prompts"
TOKENS_PER_ENTRY = 10
"""An upper bound for one `"12": 1,` of an answer, on a line of its own."""


@dataclass(frozen=True)
class Claim:
    """What is put before the judge: `text`, said of a feature by a label."""

    feature: int
    label_id: str
    text: str


@dataclass(frozen=True)
class Round:
    """One request and the windows it shows.

    rows: their row numbers in the table of windows, in the order shown. kinds: what each is shown as, a `WindowKind` or
    "mismarked": a window that fires elsewhere than it is marked. expected: what a judge who is always right says of each. tokens: how
    many each has.
    """

    request: ChatRequest
    rows: tuple[int, ...]
    kinds: tuple[str, ...]
    expected: tuple[bool, ...]
    tokens: tuple[int, ...]


def packed(windows: pl.DataFrame, *, feature: int, seed: int, size: int = WINDOWS_PER_REQUEST) -> list[list[int]]:
    """Row numbers in lots of about `size`, documents in random order, the windows of one document in one lot.

    So what a round says of a document is final, as early stopping needs it. Only a document of more than `size` windows is
    split. Within a lot the order is random. Depends on the table, feature and seed alone: any claim meets the same lots.
    """
    generator = np.random.default_rng([seed, feature])
    documents = windows.with_row_index("row").group_by("document", maintain_order=True).agg("row")["row"].to_list()
    lots: list[list[int]] = [[] for _ in range(max(1, round(len(windows) / size)))]
    placed = 0
    for index in generator.permutation(len(documents)):
        rows = documents[index]
        for part in (rows[at : at + size] for at in range(0, len(rows), size)):
            lots[placed * len(lots) // len(windows)] += part
            placed += len(part)
    return [generator.permutation(lot).tolist() for lot in lots if lot]


def shown(texts: Sequence[str], marked: Sequence[bool] | np.ndarray | None = None) -> str:
    """Tokens as one text, white space kept; each run of marked ones stands between MARKS, its leading space outside."""
    if marked is None:
        return "".join(texts)
    parts: list[str] = []
    for i, text in enumerate(texts):
        opens = marked[i] and not (i and marked[i - 1])
        closes = marked[i] and not (i + 1 < len(texts) and marked[i + 1])
        space = text[: len(text) - len(text.lstrip())] if opens and text.strip() else ""
        parts.append(f"{space}{MARKS[0] if opens else ''}{text[len(space) :]}{MARKS[1] if closes else ''}")
    return "".join(parts)


class Marks:
    """Where the windows of one feature are marked: on the tokens that fire, or in the same manner where none does."""

    def __init__(self, windows: pl.DataFrame):
        activations = windows["activations"].to_list()
        self._silent = [np.array(values) == 0 for values in activations]
        self._fires = [firing(values) for values in activations]
        self._positives = [row for row, fires in enumerate(self._fires) if fires.any()]

    def right(self, row: int) -> np.ndarray:
        """The tokens that fire: bool [tokens]."""
        return self._fires[row]

    def wrong(self, row: int, generator: np.random.Generator) -> np.ndarray | None:
        """The marks of another window that fires, drawn at random: bool [tokens]. None if there is nowhere to put them.

        In their own places, so that these tell nothing; moved by a random number of tokens, around the end, only where they
        would touch a token of this window that fires.
        """
        others = [other for other in self._positives if other != row]
        if not others:
            return None
        silent = self._silent[row]
        pattern = np.resize(self._fires[others[generator.integers(len(others))]], len(silent))
        fitting = [by for by in range(len(silent)) if (np.roll(pattern, by) <= silent).all()]
        if not pattern.any() or not fitting:
            return None
        return np.roll(pattern, 0 if fitting[0] == 0 else fitting[generator.integers(len(fitting))])


class _Entries(RootModel[dict[str, StrictInt]]):
    pass


def verdict_schema(name: str, count: int, *, low: int = 0, high: int = 1) -> JsonSchema:
    """The schema of an object from "1" .. str(count) to a whole number: ids are explicit, so that no answer slips."""
    numbers = [str(number) for number in range(1, count + 1)]
    body: dict[str, JsonValue] = {
        "type": "object",
        "properties": {number: {"$ref": "#/$defs/verdict"} for number in numbers},
        "required": [*numbers],
        "additionalProperties": False,
        "$defs": {"verdict": {"type": "integer", "enum": [*range(low, high + 1)]}},
    }
    return {"name": name, "strict": True, "schema": body}


def read_verdicts(answer: Answer, count: int, *, low: int = 0, high: int = 1) -> list[int]:
    """The numbers of an answer to `verdict_schema`, in order. Raises InvalidReply for any other ids or numbers."""
    entries = read_json(answer, _Entries).root
    require_ids(entries, count)
    values = [entries[str(number)] for number in range(1, count + 1)]
    if not all(low <= value <= high for value in values):
        raise InvalidReply(f"the answer breaks the schema: a verdict that is not of {low} to {high}")
    return values


def require_ids(entries: Mapping[str, object], count: int) -> None:
    """Raise InvalidReply unless the entries are "1" .. str(count)."""
    expected = {str(number) for number in range(1, count + 1)}
    if entries.keys() != expected:
        wrong = sorted(entries.keys() ^ expected, key=lambda id_: (len(id_), id_))
        raise InvalidReply(f"the answer breaks the schema: missing or unasked entries: {', '.join(wrong)[:200]}")


def judge_prompt(name: str) -> Prompt:
    """A judge's versioned prompt file."""
    return load_prompt(PROMPTS, name)


def messages_of(prompt: Prompt, sections: Mapping[str, Sequence[JsonValue]]) -> tuple[dict[str, str], ...]:
    """The constant prefix, then the fenced data of one request."""
    user = fenced(sections, closing="Answer with the one JSON object that the instructions ask for.")
    return ({"role": "system", "content": prompt.text}, {"role": "user", "content": user})


def yes_or_no(purpose: str, prompt: Prompt, sae: str, claim: Claim, lines: Mapping[int, tuple[str, str, int]]) -> Round:
    """The round that asks one question of each text. lines: by row number, in order: the kind, the text, its tokens."""
    texts: list[JsonValue] = [[number, text] for number, (_, text, _) in enumerate(lines.values(), 1)]
    request = ChatRequest(
        purpose=purpose,
        sae=sae,
        feature=claim.feature,
        messages=messages_of(prompt, {"DESCRIPTION": [claim.text], "TEXTS": texts}),
        schema=verdict_schema(purpose, len(lines)),
        max_output_tokens=TOKENS_PER_ENTRY * (len(lines) + 1),
        prompt=prompt.stamp,
    )
    kinds = tuple(kind for kind, _, _ in lines.values())
    expected = tuple(kind == "positive" for kind in kinds)
    return Round(request, tuple(lines), kinds, expected, tuple(tokens for _, _, tokens in lines.values()))
