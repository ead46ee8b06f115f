"""Simulation: given a claim, how strongly would the feature fire on each token? Needs the judge's log-probabilities.

What belongs here: the question and the reading of its answer. What does not: the correlation (`scoring/`).
"""

import math

import polars as pl
from pydantic import JsonValue, RootModel, StrictInt

from scopeatlas.judges.rounds import Claim, Round, judge_prompt, messages_of, packed, require_ids
from scopeatlas.llm.replies import InvalidReply, read_json
from scopeatlas.llm.requests import Answer, ChatRequest, JsonSchema, TokenLogprob

PROMPT = "simulation_v1"
WINDOWS_PER_REQUEST = 5
HIGHEST = 9
"""One digit, so that it is one token of the judge's and the whole of its distribution is seen."""
TOP_LOGPROBS = HIGHEST + 1


class NoLogprobs(InvalidReply):
    """The answer brings no log-probabilities of its numbers, so that simulation does not apply to this judge."""


class _Strengths(RootModel[dict[str, list[StrictInt]]]):
    pass


def requests(sae: str, claim: Claim, windows: pl.DataFrame, *, seed: int) -> list[Round]:
    """Every window of a feature (WINDOW_SCHEMA) once, about five to a round: each is answered with a number for each token."""
    prompt = judge_prompt(PROMPT)
    texts, kinds = windows["texts"].to_list(), windows["kind"].to_list()
    rounds = []
    for rows in packed(windows, feature=claim.feature, seed=seed, size=WINDOWS_PER_REQUEST):
        numbered: list[JsonValue] = [[number, [*texts[row]]] for number, row in enumerate(rows, 1)]
        lengths = tuple(len(texts[row]) for row in rows)
        request = ChatRequest(
            purpose="simulation",
            sae=sae,
            feature=claim.feature,
            messages=messages_of(prompt, {"DESCRIPTION": [claim.text], "TEXTS": numbered}),
            schema=_schema(lengths),
            max_output_tokens=sum(4 * length + 20 for length in lengths) + 20,
            prompt=prompt.stamp,
            logprobs=TOP_LOGPROBS,
        )
        shown_as = tuple(kinds[row] for row in rows)
        rounds.append(Round(request, tuple(rows), shown_as, tuple(kind == "positive" for kind in shown_as), lengths))
    return rounds


def _schema(lengths: tuple[int, ...]) -> JsonSchema:
    """An object from "1" .. to as many digits as each text has tokens."""
    properties: dict[str, JsonValue] = {
        str(number): {"type": "array", "items": {"$ref": "#/$defs/strength"}, "minItems": length, "maxItems": length}
        for number, length in enumerate(lengths, 1)
    }
    body: dict[str, JsonValue] = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
        "$defs": {"strength": {"type": "integer", "minimum": 0, "maximum": HIGHEST}},
    }
    return {"name": "simulation", "strict": True, "schema": body}


def read(answer: Answer, round: Round) -> list[list[float]]:
    """Per window shown the expected strength of each of its tokens, 0 to 1, under the judge's own probabilities.

    Raises InvalidReply for an answer of any other shape, NoLogprobs where the reply has no alternatives to its digits.
    """
    strengths = read_json(answer, _Strengths).root
    require_ids(strengths, len(round.rows))
    for number, values in strengths.items():
        if len(values) != round.tokens[int(number) - 1] or not all(0 <= value <= HIGHEST for value in values):
            raise InvalidReply(
                f"the answer breaks the schema: text {number} has {round.tokens[int(number) - 1]} tokens and was given "
                f"{len(values)} numbers, of {min(values, default=0)} to {max(values, default=0)}"
            )
    said = [value for values in strengths.values() for value in values]
    expected = iter(_expected(answer.reply.logprobs if answer.reply else (), said))
    by_number = {number: [next(expected) / HIGHEST for _ in values] for number, values in strengths.items()}
    return [by_number[str(number)] for number in range(1, len(round.rows) + 1)]


def _expected(tokens: tuple[TokenLogprob, ...], said: list[int]) -> list[float]:
    """The expected value of each digit between brackets of an answer, over the digits that might have stood there."""
    found: list[float] = []
    digits: list[int] = []
    is_inside = False
    for token in tokens:
        text = token.token.strip()
        if is_inside and any(character.isdigit() for character in text):
            weights = [(int(other), math.exp(logprob)) for other, logprob in token.top if _is_digit(other.strip())]
            if not _is_digit(text) or not weights:
                raise NoLogprobs("the answer's log-probabilities are not of single digits")
            digits.append(int(text))
            found.append(sum(digit * weight for digit, weight in weights) / sum(weight for _, weight in weights))
        is_inside = text.rfind("[") > text.rfind("]") if "[" in text or "]" in text else is_inside
    if digits != said:
        raise NoLogprobs("the answer has no log-probabilities of its numbers")
    return found


def _is_digit(text: str) -> bool:
    return len(text) == 1 and text in "0123456789"
