"""Which label of a feature is current: the one that does best on windows of select documents.

What belongs here: trying labels on those windows and comparing them. What does not: proposing labels, asking an LLM judge
(`judges/` makes its questions, `asking.py` puts them), or the scores on report documents (`scoring/`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import Windows, draw_windows, require
from scopeatlas.hypotheses.units import Firings, Units

POSITIVES, RANDOM, TRIGGER, NEIGHBOUR = 10, 3, 4, 3
"""Twenty windows, which is one request to a judge."""
CHANCE = 0.5


@dataclass(frozen=True)
class Trial:
    """How one label did on so many select windows. by: "execution" of a rule, or the judge that read the text. documents:
    the ids of those that the windows are of."""

    balanced_accuracy: float
    windows: int
    by: str
    documents: tuple[str, ...] = ()


def select_windows(
    units: Units, firings: Firings, features: Sequence[int], *, neighbours: Neighbours | None
) -> Windows[Literal["select"]]:
    """The windows that every label of a feature is tried on."""
    return draw_windows(
        units,
        firings,
        features,
        split="select",
        neighbours=neighbours,
        positives=POSITIVES,
        random=RANDOM,
        trigger=TRIGGER,
        neighbour=NEIGHBOUR,
    )


def trial(windows: pl.DataFrame, claimed: Sequence[float], by: str) -> Trial | None:
    """The balanced accuracy of one feature's claims, in [0, 1], on its windows: the mean of the shares of positives that
    are claimed (at 0.5 or more) and of negatives that are not. None where either are missing."""
    fires = np.array([kind == "positive" for kind in windows["kind"]], dtype=bool)
    says = np.asarray(claimed) >= CHANCE
    if fires.all() or not fires.any():
        return None
    accuracy = float((says[fires].mean() + (~says[~fires]).mean()) / 2)
    return Trial(accuracy, len(says), by, tuple(sorted(set(windows["document_id"]))))


def executed(units: Units, select: Windows[Literal["select"]], labels: Sequence[Label]) -> dict[str, Trial]:
    """By label id, how rules do when they are run on the windows: a rule claims one in which a token matches.

    It reads the whole context that the window is cut from. Raises LeakError for windows of another split.
    """
    require(select, "select")
    found = {}
    for label in labels:
        windows, rule = select.of(label.feature), Rule.from_json(label.rule)
        claims = [
            _claims(units, rule, *row) for row in windows.select("context", "start", pl.col("texts").list.len()).iter_rows()
        ]
        result = trial(windows, claims, "execution")
        if result is not None:
            found[label.label_id] = result
    return found


def _claims(units: Units, rule: Rule, context: int, start: int, width: int) -> bool:
    # Behind BOS alone, as key columns are: a chat template's tokens are "" here, and still take up a position.
    return any(rule.matches(units.text_of(context, 1, units.length))[start - 1 : start - 1 + width])


def choose(labels: Sequence[Label], trials: Mapping[str, Trial], *, version: str = "") -> list[Label]:
    """The same labels, sorted by feature, with exactly one of each feature current.

    Only a label of status ok can be, but for a feature that has none: there the refusal of the rules is. Where a judge has read
    any text label of the feature, the best trial wins, and a text no better than chance never does; a tie goes to a
    person's label, then to the rule, and is noted. Without a judge a person's label is current, else the rule, else an
    LLM's: of an earlier `version` only if the present one has said nothing. Those given first win among equals.
    """
    ordered = sorted(labels, key=lambda label: label.feature)
    return [
        made for _, group in groupby(ordered, key=lambda label: label.feature) for made in _choose(list(group), trials, version)
    ]


def _choose(labels: list[Label], trials: Mapping[str, Trial], version: str) -> list[Label]:
    fit = sorted((label for label in labels if label.status == "ok"), key=_rank)
    if any(label.method != "rule" and label.label_id in trials for label in fit):
        fit = [label for label in fit if label.label_id in trials]
        fit = [label for label in fit if label.method == "rule" or trials[label.label_id].balanced_accuracy > CHANCE]
        fit = sorted(fit, key=lambda label: -trials[label.label_id].balanced_accuracy)  # stable: the rank decides ties
    elif any(label.version == version and label.status != "error" for label in labels):
        fit = [label for label in fit if label.method != "llm" or label.version == version]
    refusals = sorted((label for label in labels if label.status != "ok"), key=lambda label: label.method != "rule")
    winner = (fit or refusals or sorted(labels, key=_rank))[0]
    accuracy = {label.label_id: trials[label.label_id].balanced_accuracy for label in fit if label.label_id in trials}
    best = accuracy.pop(winner.label_id, None)
    tied = sorted(name for name, value in accuracy.items() if value == best)
    return [_marked(label, trials.get(label.label_id), label is winner, tied) for label in labels]


def _rank(label: Label) -> int:
    return {"human": 0, "rule": 1}.get(label.method, 2)


def _marked(label: Label, result: Trial | None, is_current: bool, tied: list[str]) -> Label:
    if result is None:
        return replace(label, current=is_current)
    choice = asdict(replace(result, balanced_accuracy=round(result.balanced_accuracy, 4)))
    if is_current and tied:
        choice["tied_with"] = tied
    provenance = json.dumps({**json.loads(label.provenance), "choice": choice}, ensure_ascii=False, sort_keys=True)
    score = label.select_score if label.method == "rule" else float(np.float32(result.balanced_accuracy))
    return replace(label, current=is_current, provenance=provenance, select_score=score)
