"""One label before one judge: what it was asked about, what was answered, and the rows that this comes to.

What belongs here: from answered rounds to cells. What does not: who is asked what and when to stop (`judged.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.metrics import cohens_kappa
from scopeatlas.judges import intruder
from scopeatlas.judges.rounds import Claim, Round
from scopeatlas.llm.requests import Answer, Charge
from scopeatlas.scoring.controls import NO_PARTNER, REQUIRED
from scopeatlas.scoring.measured import (
    NO_FAIR_WINDOWS,
    Measured,
    Sample,
    accuracy_at,
    lift_cells,
    measure_claims,
    measure_correlation,
    sample_of,
)
from scopeatlas.scoring.sequential import Decision, decide
from scopeatlas.scoring.table import MAIN_METRIC, Arm, Cell, Scorer

Verdicts = list[float] | list[list[float]]
"""Of one round: a number per window shown or, by simulation, one per token of each."""
Measure = Callable[[np.ndarray, np.ndarray], Measured]
"""Of an arm's numbers and the windows that count, bool [windows]."""


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
    why it did, or what is known once all rounds are played."""

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
        if decision.stop:
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
    rows[0] |= {"note": f"judged by {names[0]}"}
    if trial.decision is not None:
        rows[0] |= _stopped(trial, trial.decision, names[0])
    control = measured.get("shuffled" if "shuffled" in judge.arms else "constant")
    if control is None:
        rows.append(named | {"arm": "shuffled"} | NO_PARTNER)
    else:
        looks = len(trial.rounds["own"]) if trial.stops_early else 1
        rows[0] |= lift_cells(measured["own"], control, documents=sample.documents, looks=looks)
    if "trigger_tokens" in REQUIRED[judge.scorer] and "trigger_tokens" not in measured:
        rows.append(named | {"arm": "trigger_tokens"} | NO_FAIR_WINDOWS)
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
    """Every arm on what the own one was tested on; trigger tokens, and the own arm beside them, without the windows that were
    drawn because they hold one; the second judge's only if it answered all of that."""
    verdicts, measure = (_simulated if judge.scorer == "simulation" else _claimed)(trial, judge, sample, seed)
    every, fair = np.ones(len(sample.truth), dtype=bool), sample.fair_to_triggers
    measured: dict[Arm, Measured] = {arm: measure(said, every) for arm, said in verdicts.items() if arm != "trigger_tokens"}
    main = MAIN_METRIC[judge.scorer]
    if "trigger_tokens" in verdicts and not sample.truth[fair].all():
        found, against = (measure(verdicts[arm], fair) for arm in ("trigger_tokens", "own"))
        cells = sample.at(fair).cells() | found.cells | {"against": against.cells[main]}
        measured["trigger_tokens"] = replace(found, cells=cells)
    if not trial.stops_early:
        return measured
    first = np.arange(len(sample.truth)) < len(trial.rounds["own"][0].rows)
    for arm, found in measured.items():
        units = first & fair if arm == "trigger_tokens" else first
        cells = found.cells | {"first_round": accuracy_at(sample, verdicts[arm], units)}
        cells |= {"against": accuracy_at(sample, verdicts["own"], units)} if arm == "trigger_tokens" else {}
        measured[arm] = replace(found, cells=cells)
    return measured


def _answers(trial: Trial) -> dict[Arm, list[Verdicts]]:
    """Of the rounds that were played, by each arm that has answered all of them."""
    return {arm: given[: trial.played] for arm, given in trial.answers.items() if len(given) >= trial.played}


def _simulated(trial: Trial, judge: Judge, sample: Sample, seed: int) -> tuple[dict[Arm, np.ndarray], Measure]:
    """The activation that each arm gives every token, and how it is measured on some windows."""
    texts = [trial.windows["texts"][row].to_list() for row in trial.rows_shown()]
    lengths = [len(window) for window in texts]
    real = np.concatenate([trial.windows["activations"][row].to_numpy() for row in trial.rows_shown()])
    document = np.repeat(sample.document, lengths)
    predicted: dict[Arm, np.ndarray] = {
        arm: np.concatenate([np.array(of) for one in given for of in one]) for arm, given in _answers(trial).items()
    }
    predicted["trigger_tokens"] = np.array([float(token in trial.triggers) for window in texts for token in window])

    def measure(values: np.ndarray, windows: np.ndarray) -> Measured:
        tokens = np.repeat(windows, lengths)
        return measure_correlation(values[tokens], real[tokens], document[tokens], seed=seed)

    return predicted, measure


def _claimed(trial: Trial, judge: Judge, sample: Sample, seed: int) -> tuple[dict[Arm, np.ndarray], Measure]:
    """The verdict of each arm on every window, and how it is measured on some of them."""
    verdicts: dict[Arm, np.ndarray] = {arm: _flat(given) for arm, given in _answers(trial).items()}
    verdicts["constant"] = np.ones(len(sample.truth))
    if judge.scorer == "intruder":  # always the first of a set
        verdicts["constant"] = (np.arange(len(sample.truth)) % intruder.SET == 0).astype(np.float64)
    if judge.scorer == "detection":
        texts = [trial.windows["texts"][row].to_list() for row in trial.rows_shown()]
        verdicts["trigger_tokens"] = np.array([float(not trial.triggers.isdisjoint(window)) for window in texts])
    return verdicts, lambda values, windows: measure_claims(sample.at(windows), values[windows], seed=seed)


def _stopped(trial: Trial, decision: Decision, name: str) -> dict[str, Cell]:
    """What changes where testing may stop early, whether it did or not: bounds that hold whenever one stops."""
    rounds, reason = len(trial.rounds["own"]), decision.reason.replace("_", " ")
    when = f"stopped after {trial.played} of {rounds} rounds ({reason})" if trial.played < rounds else f"all {rounds} rounds"
    return {
        "balanced_accuracy_low": decision.low,
        "balanced_accuracy_high": decision.high,
        "note": f"judged by {name}; {when}, its interval is a confidence sequence over documents",
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
