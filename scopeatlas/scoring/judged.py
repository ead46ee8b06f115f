"""Scores by an LLM judge on windows of report documents: detection, fuzzing, intruder and simulation, with their controls.

What belongs here: who is asked what, and when. What does not: the questions (`judges/`), sending and paying (`llm/`), what the
answers come to (`trials.py`), the stopping rule (`sequential.py`).

All labels are asked about side by side, a round of windows at a time. A label's own text and another feature's (the
shuffled arm) meet the same windows in the same rounds, so that both are tested alike however early it stops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Literal

import polars as pl

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.samples import Windows, require
from scopeatlas.judges import detection, fuzzing, intruder, simulation
from scopeatlas.judges.rounds import Claim, Round, judge_prompt
from scopeatlas.labels.asking import Asking, Heard, Question
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.requests import Answer
from scopeatlas.scoring.controls import partners
from scopeatlas.scoring.measured import sample_of
from scopeatlas.scoring.outcomes import verdict_outcomes
from scopeatlas.scoring.table import Arm, Cell, Scorer
from scopeatlas.scoring.trials import Judge, Trial, Verdicts, trial_rows
from scopeatlas.storage.files import unit_hash

SECOND_JUDGE_SHARE = 0.1
SIMULATED_ROUNDS = 6
"""Of five windows: simulation answers every token with a number, which costs far more than the other questions."""
JUDGED: tuple[Scorer, ...] = ("detection", "fuzzing", "intruder", "simulation")


@dataclass(frozen=True)
class Judges:
    """judge: the LLM that is asked. second: another that is asked about the features of SECOND_JUDGE_SHARE too, off unless it
    names a model. scorers: of JUDGED. stop_early: stop asking about a label once its verdicts decide."""

    judge: ServerConfig
    second: ServerConfig
    scorers: tuple[Scorer, ...] = JUDGED
    stop_early: bool = True


def judge_prompts() -> list[str]:
    """The stamps of all prompts that judges are asked with."""
    return [judge_prompt(module.PROMPT).stamp for module in (detection, fuzzing, intruder, simulation)]


def judge_labels(
    labels: Sequence[Label],
    windows: Windows[Literal["report"]],
    triggers: Mapping[int, Sequence[str]],
    *,
    sae: str,
    asking: Asking,
    judges: Judges,
    min_documents: int,
    seed: int,
) -> tuple[list[dict[str, Cell]], pl.DataFrame]:
    """Rows of every label by each scorer: arms own and shuffled as judged, and those that need no judge; and what detection
    was right and wrong on (`outcomes.OUTCOME_SCHEMA`).

    triggers: the texts of each feature's trigger tokens; "a window that holds one" is the trigger_tokens arm. A feature with
    positives in fewer than `min_documents` documents, or without negatives, is refused before anything is spent. An answer
    that is unusable twice, or missing, leaves that label `unanswered`, with the reason in its note. Raises LeakError for
    windows of another split, ExplainerError if the server as a whole is unusable.
    """
    trials = make_trials(labels, windows, triggers, sae=sae, judges=judges, min_documents=min_documents, seed=seed)
    rows: list[dict[str, Cell]] = []
    outcomes = verdict_outcomes("detection", [])
    for scorer, mine in trials.items():
        judge = _JUDGES[scorer]
        _play(mine, judge, asking, judges.judge)
        _ask_second(mine, judge, asking, judges.second, seed=seed)
        names = judges.judge.model, judges.second.model
        rows += [row for trial in mine for row in trial_rows(trial, judge, names=names, seed=seed)]
        if scorer == "detection":
            outcomes = verdict_outcomes(scorer, mine)
    return rows, outcomes


def make_trials(
    labels: Sequence[Label],
    windows: Windows[Literal["report"]],
    triggers: Mapping[int, Sequence[str]],
    *,
    sae: str,
    judges: Judges,
    min_documents: int,
    seed: int,
) -> dict[Scorer, list[Trial]]:
    """What there is to ask about each label, by scorer: nothing is sent. Arguments and errors as for `judge_labels`."""
    require(windows, "report")
    texts = [label.reads or label.label for label in labels]
    other = partners(labels, texts, [""] * len(labels), seed=seed)
    by_feature = {int(part["feature"][0]): part for part in windows.table.partition_by("feature", maintain_order=True)}
    trials: dict[Scorer, list[Trial]] = {scorer: [] for scorer in judges.scorers}
    for scorer, i in product(judges.scorers, range(len(labels))):
        label, judge = labels[i], _JUDGES[scorer]
        mine = by_feature.get(label.feature, windows.table.clear())
        said: dict[Arm, str] = {"own": texts[i]}
        if other[i] != i:
            said["shuffled"] = texts[other[i]]
        claims: dict[Arm, Claim] = {arm: Claim(label.feature, label.label_id, said[arm]) for arm in judge.arms if arm in said}
        rounds = _rounds(judge, sae, claims, mine, seed) if _is_testable(mine, min_documents) else {}
        trial = Trial(label, mine, frozenset(triggers.get(label.feature, ())), rounds)
        trial.stops_early = judges.stop_early and judge.stops_early
        trials[scorer].append(trial)
    return trials


def _is_testable(windows: pl.DataFrame, min_documents: int) -> bool:
    sample = sample_of(windows)
    return sample.documents >= min_documents and not sample.truth.all()


def _rounds(judge: Judge, sae: str, claims: Mapping[Arm, Claim], windows: pl.DataFrame, seed: int) -> dict[Arm, list[Round]]:
    """The rounds of each arm; none at all if the windows make none."""
    rounds: dict[Arm, list[Round]] = {arm: judge.rounds(sae, claim, windows, seed) for arm, claim in claims.items()}
    return rounds if rounds["own"] else {}


def _play(trials: Sequence[Trial], judge: Judge, asking: Asking, config: ServerConfig) -> None:
    """Ask round after round, until every trial has stopped or used up its windows."""
    while playing := [trial for trial in trials if trial.is_open]:
        asked: list[tuple[Trial, Arm, Round]] = [
            (trial, arm, rounds[trial.played]) for trial in playing for arm, rounds in trial.rounds.items()
        ]
        for (trial, arm, _), heard in zip(asked, _heard(asking, judge, [one for _, _, one in asked], config), strict=True):
            trial.hear(arm, heard.value, heard.problem, heard.answer.charge)
        for trial in playing:
            trial.weigh(judge)


def _ask_second(trials: Sequence[Trial], judge: Judge, asking: Asking, second: ServerConfig, *, seed: int) -> None:
    """Put the rounds that were played to another judge too, for a share of the features. It leaves no trial unscored."""
    if not second.enabled:
        return
    scored = [trial for trial in trials if trial.is_scored]
    features = sorted({trial.label.feature for trial in scored}, key=lambda f: unit_hash("second judge", f"{seed}:{f}"))
    chosen = set(features[: ceil(SECOND_JUDGE_SHARE * len(features))])
    asked = [(trial, one) for trial in scored if trial.label.feature in chosen for one in trial.shown()]
    for (trial, _), heard in zip(asked, _heard(asking, judge, [one for _, one in asked], second), strict=True):
        if heard.value:
            trial.hear("second_judge", heard.value, "", heard.answer.charge)


def _heard(asking: Asking, judge: Judge, rounds: Sequence[Round], config: ServerConfig) -> list[Heard[Verdicts]]:
    """One answer per round; what is unusable is asked once more."""
    questions = [Question(one.request, _reader(judge, one)) for one in rounds]
    found = asking.ask(questions, config)
    unusable = [i for i, one in enumerate(found) if one.answer.reply is not None and one.value is None]
    if unusable:
        asking.attempts |= {questions[i].request.key(config): 1 for i in unusable}
        for i, again in zip(unusable, asking.ask([questions[i] for i in unusable], config), strict=True):
            found[i] = again
    return found


def _reader(judge: Judge, round: Round) -> Callable[[Answer], Verdicts]:
    return lambda answer: judge.read(answer, round)


def _read_simulation(answer: Answer, round: Round) -> Verdicts:
    try:
        return simulation.read(answer, round)
    except simulation.NoLogprobs:
        return []


def _intruder_rounds(sae: str, claim: Claim, windows: pl.DataFrame, seed: int) -> list[Round]:
    return intruder.requests(sae, claim.feature, windows, seed=seed)


_JUDGES: dict[Scorer, Judge] = {
    "detection": Judge("detection", lambda *of: detection.requests(*of[:3], seed=of[3]), detection.read),
    "fuzzing": Judge("fuzzing", lambda *of: fuzzing.requests(*of[:3], seed=of[3]), fuzzing.read),
    "intruder": Judge("intruder", _intruder_rounds, intruder.read, arms=("own",), stops_early=False),
    "simulation": Judge(
        "simulation",
        lambda *of: simulation.requests(*of[:3], seed=of[3])[:SIMULATED_ROUNDS],
        _read_simulation,
        stops_early=False,
    ),
}
