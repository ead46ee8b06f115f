"""Fuzzing: given a claim, are these windows marked at the tokens on which the feature fires?

What belongs here: the question and the reading of its answer. What does not: the metrics (`scoring/`), how marks are
misplaced (`rounds.py`).
"""

import numpy as np
import polars as pl

from scopeatlas.judges.rounds import Claim, Marks, Round, judge_prompt, packed, read_verdicts, shown, yes_or_no
from scopeatlas.llm.requests import Answer

PROMPT = "fuzzing_v1"
MISMARKED_SHARE = 1 / 3


def requests(sae: str, claim: Claim, windows: pl.DataFrame, *, seed: int) -> list[Round]:
    """Every window of a feature (WINDOW_SCHEMA) once, in rounds of about 20, each with marks.

    Two positives of three are marked where they fire, the third, "mismarked", where they do not, and negatives in the same
    manner: with the marks of other positives. A window that could not be marked so is left out.
    """
    texts = windows["texts"].to_list()
    marked = _marked(windows, np.random.default_rng([seed, claim.feature, 1]))
    lots = ([row for row in lot if row in marked] for lot in packed(windows, feature=claim.feature, seed=seed))
    lines = ({row: (marked[row][0], shown(texts[row], marked[row][1]), len(texts[row])) for row in rows} for rows in lots)
    return [yes_or_no("fuzzing", judge_prompt(PROMPT), sae, claim, of) for of in lines if of]


def _marked(windows: pl.DataFrame, generator: np.random.Generator) -> dict[int, tuple[str, np.ndarray]]:
    """What each row is shown as, and its marks."""
    marks = Marks(windows)
    kinds = windows["kind"].to_list()
    positives = [row for row, kind in enumerate(kinds) if kind == "positive"]
    chosen = set(generator.permutation(positives)[: int(len(positives) * MISMARKED_SHARE)].tolist())
    out: dict[int, tuple[str, np.ndarray]] = {}
    for row, kind in enumerate(kinds):
        wrong = marks.wrong(row, generator) if kind != "positive" or row in chosen else None
        if wrong is not None:
            out[row] = ("mismarked" if kind == "positive" else kind, wrong)
        elif kind == "positive":
            out[row] = (kind, marks.right(row))
    return out


def read(answer: Answer, round: Round) -> list[float]:
    """1 for each window shown whose marks the judge calls right, else 0. Raises InvalidReply."""
    return [float(verdict) for verdict in read_verdicts(answer, len(round.rows))]
