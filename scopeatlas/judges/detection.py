"""Detection: given a claim, in which of these unmarked windows does the feature fire?

What belongs here: the question and the reading of its answer. What does not: the metrics (`scoring/`).
"""

import polars as pl

from scopeatlas.judges.rounds import Claim, Round, judge_prompt, packed, read_verdicts, shown, yes_or_no
from scopeatlas.llm.requests import Answer

PROMPT = "detection_v1"


def requests(sae: str, claim: Claim, windows: pl.DataFrame, *, seed: int) -> list[Round]:
    """Every window of a feature (WINDOW_SCHEMA) once, in rounds of about 20; nothing tells kinds or order apart."""
    texts, kinds = windows["texts"].to_list(), windows["kind"].to_list()
    lots = packed(windows, feature=claim.feature, seed=seed)
    lines = ({row: (kinds[row], shown(texts[row]), len(texts[row])) for row in rows} for rows in lots)
    return [yes_or_no("detection", judge_prompt(PROMPT), sae, claim, of) for of in lines]


def read(answer: Answer, round: Round) -> list[float]:
    """1 for each window shown in which the judge says that the feature fires, else 0. Raises InvalidReply."""
    return [float(verdict) for verdict in read_verdicts(answer, len(round.rows))]
