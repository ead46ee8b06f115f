"""Intruder: of five marked windows, in which one does the feature not fire? Asked without any claim.

What belongs here: the question and the reading of its answer. What does not: the metrics (`scoring/`), how marks are
misplaced (`rounds.py`).
"""

import numpy as np
import polars as pl
from pydantic import JsonValue

from scopeatlas.judges.rounds import (
    TOKENS_PER_ENTRY,
    Marks,
    Round,
    judge_prompt,
    messages_of,
    read_verdicts,
    shown,
    verdict_schema,
)
from scopeatlas.llm.requests import Answer, ChatRequest

PROMPT = "intruder_v1"
SET = 5
SETS_PER_REQUEST = 4


def requests(sae: str, feature: int, windows: pl.DataFrame, *, seed: int) -> list[Round]:
    """Sets of four positives and one negative, four sets to a round; `expected` is true of the intruder alone.

    Each window (WINDOW_SCHEMA) stands in one set at most. The intruder bears the marks of a positive. A round's windows are
    its sets one after the other, so that the share of intruders that were found has the chance level 1/5.
    """
    prompt = judge_prompt(PROMPT)
    texts, kinds = windows["texts"].to_list(), windows["kind"].to_list()
    sets = _sets(windows, np.random.default_rng([seed, feature, 2]))
    rounds = []
    for start in range(0, len(sets), SETS_PER_REQUEST):
        part = sets[start : start + SETS_PER_REQUEST]
        sections: dict[str, list[JsonValue]] = {
            f"SET {number}": [[place, shown(texts[row], marks)] for place, (row, marks) in enumerate(members, 1)]
            for number, members in enumerate(part, 1)
        }
        request = ChatRequest(
            purpose="intruder",
            sae=sae,
            feature=feature,
            messages=messages_of(prompt, sections),
            schema=verdict_schema("intruder", len(part), low=1, high=SET),
            max_output_tokens=TOKENS_PER_ENTRY * (len(part) + 1),
            prompt=prompt.stamp,
        )
        rows = tuple(row for members in part for row, _ in members)
        shown_as = tuple(kinds[row] for row in rows)
        is_intruder = tuple(kind != "positive" for kind in shown_as)
        rounds.append(Round(request, rows, shown_as, is_intruder, tuple(len(texts[row]) for row in rows)))
    return rounds


def _sets(windows: pl.DataFrame, generator: np.random.Generator) -> list[list[tuple[int, np.ndarray]]]:
    """Each set as five rows with their marks, in the order shown."""
    marks = Marks(windows)
    is_positive = (windows["kind"] == "positive").to_numpy()
    positives = generator.permutation(np.flatnonzero(is_positive)).tolist()
    negatives = generator.permutation(np.flatnonzero(~is_positive)).tolist()
    sets = []
    for start, intruder in zip(range(0, len(positives) - SET + 2, SET - 1), negatives, strict=False):
        wrong = marks.wrong(intruder, generator)
        if wrong is not None:
            members = [(row, marks.right(row)) for row in positives[start : start + SET - 1]] + [(intruder, wrong)]
            sets.append([members[place] for place in generator.permutation(SET)])
    return sets


def read(answer: Answer, round: Round) -> list[float]:
    """1 for each window shown that the judge names as its set's intruder, else 0. Raises InvalidReply."""
    named = read_verdicts(answer, len(round.rows) // SET, low=1, high=SET)
    return [float(place == name) for name in named for place in range(1, SET + 1)]
