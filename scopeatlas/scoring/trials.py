"""One label before one judge: what it was asked about, what was answered, and the rows that this comes to.

What belongs here: from answered rounds to cells. What does not: who is asked what and when to stop (`judged.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.metrics import cohens_kappa
from scopeatlas.judges import intruder
from scopeatlas.judges.rounds import Claim, Round
from scopeatlas.llm.requests import Answer, Charge
from scopeatlas.scoring.measured import (
    Measured,
    Sample,
    lift_cells,
    measure_claims,
    measure_correlation,
    sample_of,
)
from scopeatlas.scoring.sequential import Decision, decide
from scopeatlas.scoring.table import Arm, Cell, Scorer

Verdicts = list[float] | list[list[float]]
"""Of one round: a number per window shown or, by simulation, one per token of each."""


@dataclass(frozen=True)
class Judge:
    """How one scorer asks. rounds: of a claim about a feature's windows, by a seed. read: the verdicts of an answer; none
    where the scorer does not apply to the server. arms: those that are asked. stops_early: whether the verdicts are claims,
    which `sequential.decide` can bound."""

    scorer: Scorer
    rounds: Callable[[str, Claim, pl.DataFrame, int], list[Round]]
    read: Callable[[Answer, Round], Verdicts]
    arms: tuple[Arm, ...] = ("own", "shuffled")
    stops_early: bool = True


@dataclass
class Trial:
    """One label before one judge. windows: of its feature. triggers: the texts of its feature's trigger tokens. rounds: per
    asked arm, of the same windows; none where there is too little to test on. answers: of the rounds played so far.
    problem: why there is no score. applies: whether the judge can be asked this. stops_early: whether it may, and decision:
    why it did."""

    label: Label
    windows: pl.DataFrame
    triggers: frozenset[str]
    rounds: dict[Arm, list[Round]]
    answers: dict[Arm, list[Verdicts]] = field(default_factory=dict)
    charges: dict[Arm, list[Charge]] = field(default_factory=dict)
    problem: str = ""
    applies: bool = True
    stops_early: bool = False
    decision: Decision | None = None

    @property
    def played(self) -> int:
        """Rounds that every arm has answered."""
        return min((len(self.answers.get(arm, [])) for arm in self.rounds), default=0)

    @property
    def is_open(self) -> bool:
        """Whether there is another round to ask."""
        has_more = bool(self.rounds) and self.played < len(self.rounds["own"])
        return has_more and not self.problem and self.applies and self.decision is None

    @property
    def is_scored(self) -> bool:
        return self.played > 0 and not self.problem and self.applies

    def shown(self) -> list[Round]:
        """The rounds played."""
        return self.rounds.get("own", [])[: self.played]

    def rows_shown(self) -> list[int]:
        """The row in `windows` of each window of those rounds."""
        return [row for one in self.shown() for row in one.rows]

    def hear(self, arm: Arm, verdicts: Verdicts | None, problem: str, charge: Charge) -> None:
        """Note what was answered in an arm's next round, None being no usable answer."""
        self.charges.setdefault(arm, []).append(charge)
        if verdicts is None:
            self.problem = self.problem or problem
        elif not verdicts:
            self.applies = False
        else:
            self.answers.setdefault(arm, []).append(verdicts)

    def weigh(self, judge: Judge) -> None:
        """Stop if the verdicts so far already decide whether the label is above chance, or useful."""
        if not (self.stops_early and self.is_scored):
            return
        sample, used_up = sample_shown(self, judge), self.played == len(self.rounds["own"])
        decision = decide(sample.document, sample.truth, _flat(self.answers["own"]), used_up=used_up)
        if decision.stop and not used_up:
            self.decision = decision


def sample_shown(trial: Trial, judge: Judge) -> Sample:
    """What was shown so far, in the order shown. truth: what a judge who is always right says."""
    truth = np.array([expected for one in trial.shown() for expected in one.expected], dtype=bool)
    rows = trial.rows_shown()
    document = trial.windows["document"].to_numpy()[rows]
    if judge.scorer == "intruder":  # a set's five verdicts are one answer, so one document stands for all of them
        document = np.repeat(document[truth], intruder.SET)
    kinds = np.array([kind for one in trial.shown() for kind in one.kinds])
    return Sample(truth, document, kinds, np.where(truth, trial.windows["decile"].to_numpy()[rows], -1))


def trial_rows(trial: Trial, judge: Judge, *, names: tuple[str, str], seed: int) -> list[dict[str, Cell]]:
    """The rows of one label by one scorer, its own arm first. names: of the judge's model and of the second judge's."""
    named: dict[str, Cell] = {
        "feature": trial.label.feature,
        "label_id": trial.label.label_id,
        "method": trial.label.method,
        "claim": "reads",
        "scorer": judge.scorer,
        "unit": "token" if judge.scorer == "simulation" else "window",
    }
    if not trial.is_scored:
        said = _unscored(trial)
        return [named | {"arm": arm} | said | _cost(trial.charges.get(arm, [])) for arm in judge.arms]
    sample = sample_shown(trial, judge)
    measured = _measured(trial, judge, sample, seed=seed)
    rows = [
        named | sample.cells() | {"arm": arm, "status": "scored"} | found.cells | _cost(trial.charges.get(arm, []))
        for arm, found in measured.items()
    ]
    control = measured["shuffled"] if "shuffled" in measured else measured["constant"]
    looks = len(trial.rounds["own"]) if trial.stops_early else 1
    rows[0] |= lift_cells(measured["own"], control, documents=sample.documents, looks=looks) | {"note": f"judged by {names[0]}"}
    if trial.decision is not None:
        rows[0] |= _stopped(trial, trial.decision, names[0])
    if "second_judge" in measured and judge.scorer != "simulation":
        one, other = (_flat(trial.answers[arm]) >= 0.5 for arm in ("own", "second_judge"))
        agreement = f"judged by {names[1]}; agrees with {names[0]} at kappa {cohens_kappa(one, other):.2f}"
        rows = [row | {"note": agreement} if row["arm"] == "second_judge" else row for row in rows]
    return rows


def _unscored(trial: Trial) -> dict[str, Cell]:
    if not trial.rounds:
        return {"status": "too_few_documents", **sample_of(trial.windows).cells()}
    if trial.problem:
        return {"status": "unanswered", "note": trial.problem}
    return {"status": "not_applicable", "note": "the judge's server gives no log-probabilities"}


def _measured(trial: Trial, judge: Judge, sample: Sample, *, seed: int) -> dict[Arm, Measured]:
    """Every arm on what the own one was tested on; the second judge's only if it answered all of that."""
    answers: dict[Arm, list[Verdicts]] = {
        arm: given[: trial.played] for arm, given in trial.answers.items() if len(given) >= trial.played
    }
    texts = [trial.windows["texts"][row].to_list() for row in trial.rows_shown()]
    if judge.scorer == "simulation":
        real = np.concatenate([trial.windows["activations"][row].to_numpy() for row in trial.rows_shown()])
        document = np.repeat(sample.document, [len(window) for window in texts])
        predicted: dict[Arm, np.ndarray] = {
            arm: np.concatenate([np.array(of) for one in given for of in one]) for arm, given in answers.items()
        }
        predicted["trigger_tokens"] = np.array([float(token in trial.triggers) for window in texts for token in window])
        return {arm: measure_correlation(values, real, document, seed=seed) for arm, values in predicted.items()}
    verdicts: dict[Arm, np.ndarray] = {arm: _flat(given) for arm, given in answers.items()}
    verdicts["constant"] = np.ones(len(sample.truth))
    if judge.scorer == "intruder":  # always the first of a set
        verdicts["constant"] = (np.arange(len(sample.truth)) % intruder.SET == 0).astype(np.float64)
    if judge.scorer == "detection":
        verdicts["trigger_tokens"] = np.array([float(not trial.triggers.isdisjoint(window)) for window in texts])
    return {arm: measure_claims(sample, values, seed=seed) for arm, values in verdicts.items()}


def _stopped(trial: Trial, decision: Decision, name: str) -> dict[str, Cell]:
    """What changes where testing stopped early: bounds that hold whenever one stops."""
    rounds, reason = f"{trial.played} of {len(trial.rounds['own'])} rounds", decision.reason.replace("_", " ")
    return {
        "balanced_accuracy_low": decision.low,
        "balanced_accuracy_high": decision.high,
        "note": f"judged by {name}; stopped after {rounds} ({reason}), its interval is a confidence sequence over documents",
    }


def _cost(charges: Sequence[Charge]) -> dict[str, Cell]:
    if not charges:
        return {}
    priced = [charge.usd for charge in charges if charge.usd is not None]
    return {
        "prompt_tokens": sum(charge.prompt_tokens for charge in charges),
        "completion_tokens": sum(charge.completion_tokens for charge in charges),
        "usd": sum(priced) if priced else None,
    }


def _flat(answers: Sequence[Verdicts]) -> np.ndarray:
    return np.array([verdict for verdicts in answers for verdict in verdicts], dtype=np.float64)
