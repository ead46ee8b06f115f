import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.samples import draw_windows, trigger_tokens
from scopeatlas.judges import detection
from scopeatlas.judges.rounds import Claim
from scopeatlas.labels.asking import Asking
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import open_journal
from scopeatlas.runner.local import silent
from scopeatlas.scoring.judged import Judges, judge_labels
from scopeatlas.scoring.table import score_table
from tests.judge_brain import JudgeBrain, SimulationBrain, is_judged, shown_in
from tests.llm_server import Server
from tests.planted import firings_of

WORDS = ("the", "of", "and", "in", "was", "to", "is", "as", "for", "by", "with", "on")
"""Feature i fires on every WORDS[i], in any case, and nowhere else; the one after the last, at random."""
LABELS = [Label(i, "llm", "ok", word, f'The word "{word}".', version="llm:test") for i, word in enumerate(WORDS)]


def claim_of(label: Label) -> Claim:
    return Claim(label.feature, label.label_id, label.reads)


def holds(claim: str, text: str) -> bool:
    """The rule of the scripted judge: a text fits a claim if the word that the claim quotes stands in it."""
    return any(re.search(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE) for word in re.findall('"(.+)"', claim))


@pytest.fixture(autouse=True)
def _no_key_and_no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def firings(units):
    keys, words = units.column("word")
    exact = [np.flatnonzero(units.counted & (keys == words.index(word))) for word in WORDS]
    at_random = np.random.default_rng(3).choice(np.flatnonzero(units.counted), 400, replace=False)
    return firings_of([*exact, at_random], len(WORDS) + 1)


@pytest.fixture(scope="module")
def windows(units, firings):
    return draw_windows(units, firings, range(len(WORDS) + 1), split="report", neighbours=None)


@pytest.fixture(scope="module")
def triggers(units, firings):
    texts = units.column("token")[1]
    found = trigger_tokens(units, firings, range(len(WORDS) + 1))
    return {f: [texts[k] for k in part["key"]] for (f,), part in found.partition_by("feature", as_dict=True).items()}


@pytest.fixture
def judge(windows, triggers, tmp_path):
    """Have a brain judge labels; returns the rows by feature and arm. `judge.asked`: what it was shown, request by request;
    `judge.outcomes`, `judge.spent`: what else came of it. faults: of the server. config: of the client."""

    def judge(
        brain,
        labels=LABELS,
        *,
        scorers=("detection",),
        stop_early=False,
        faults=(),
        second="",
        of=windows,
        logprobs=True,
        **config,
    ):
        with Server(brain, faults=faults, logprobs=logprobs) as server, open_journal(tmp_path) as journal:
            asking = Asking(journal, {}, retry=False, log=silent)
            one = ServerConfig(model="m", base_url=server.url, **config)
            other = ServerConfig(model=second, base_url=server.url)
            judges = Judges(one, other, scorers, stop_early=stop_early)
            rows, judge.outcomes = judge_labels(
                labels, of, triggers, sae="sae", asking=asking, judges=judges, min_documents=3, seed=0
            )
            judge.asked = [shown_in(body) for body in server.requests if is_judged(body)]
            judge.spent = journal.spent_by_purpose()
        return {(row["feature"], row["arm"]): row for row in score_table(rows).iter_rows(named=True)}

    return judge


def balanced(windows, feature: int, says=holds) -> float:
    """The balanced accuracy of what is said of the windows of a feature. That of the scripted judge's rule is all but 1, since
    two tokens can make a word on which the feature does not fire."""
    mine = windows.of(feature)
    truth = (mine["kind"] == "positive").to_numpy()
    said = np.array([says(LABELS[feature].reads, "".join(texts)) for texts in mine["texts"].to_list()])
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def test_a_judge_who_is_right_finds_every_label_right_and_shuffled_ones_at_chance(judge, windows):
    rows = judge(JudgeBrain(holds))
    for feature in range(len(WORDS)):
        row, expected = rows[feature, "own"], balanced(windows, feature)
        assert (row["status"], row["unit"]) == ("scored", "window") and expected >= 0.85
        assert row["balanced_accuracy"] == pytest.approx(expected)
        assert rows[feature, "constant"]["balanced_accuracy"] == 0.5 and rows[feature, "constant"]["recall"] == 1
        assert row["lift"] == pytest.approx(expected - rows[feature, "shuffled"]["balanced_accuracy"])
    shuffled = [rows[f, "shuffled"]["balanced_accuracy"] for f in range(len(WORDS))]
    assert 0.42 <= np.mean(shuffled) <= 0.58


AT_RANDOM = Label(len(WORDS), "llm", "ok", "house", 'The word "house".', version="llm:test")


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_trigger_token_arm_is_whether_a_window_holds_one(judge, windows, triggers, stop_early):
    """On all windows but those that were drawn because they hold one, and so is the own arm beside it."""
    rows = judge(JudgeBrain(holds), [*LABELS, AT_RANDOM], stop_early=stop_early)
    drawn = 0
    for label in [*LABELS, AT_RANDOM]:
        mine = windows.of(label.feature)
        drawn += int((mine["kind"] == "trigger").sum())
        if stop_early:  # then on those of the first round
            mine = mine[list(detection.requests("sae", claim_of(label), mine, seed=0)[0].rows)]
        mine = mine.filter(mine["kind"] != "trigger")
        truth = (mine["kind"] == "positive").to_numpy()
        texts = mine["texts"].to_list()
        says = np.array([holds(label.reads, "".join(window)) for window in texts])
        said = np.array([bool(set(window) & set(triggers[label.feature])) for window in texts])
        row, metric = rows[label.feature, "trigger_tokens"], "first_round" if stop_early else "balanced_accuracy"
        for name, claimed in ((metric, said), ("against", says)):
            assert row[name] == pytest.approx((claimed[truth].mean() + (~claimed[~truth]).mean()) / 2, abs=1e-6)
        assert row["negatives_trigger"] == 0 and rows[label.feature, "own"]["against"] is None
    assert drawn > 0 and (stop_early or rows[AT_RANDOM.feature, "own"]["negatives_trigger"] > 0)


@pytest.mark.parametrize("accuracy", [0.9, 0.7])
def test_a_judge_who_is_right_so_often_gives_that_balanced_accuracy(judge, windows, accuracy, rng):
    brain = JudgeBrain(holds, accuracy=accuracy, seed=int(rng.integers(2**32)))
    rows = [row for (_, arm), row in judge(brain).items() if arm == "own"]
    found = np.array([row["balanced_accuracy"] for row in rows])
    assert found == pytest.approx([balanced(windows, row["feature"], brain.says) for row in rows])
    assert found.mean() == pytest.approx(accuracy, abs=0.1)  # 430 windows: more than four standard errors, which are 0.023
    low, high = (np.array([row[f"balanced_accuracy_{end}"] for row in rows]) for end in ("low", "high"))
    # Drawn from 7 to 23 documents, an interval holds the truth in 87 of 100 runs: 4 of 12 or fewer do once in 40,000.
    assert ((low <= found) & (found <= high)).all() and ((low <= accuracy) & (accuracy <= high)).sum() >= 5


def test_own_and_shuffled_text_meet_the_same_windows_in_the_same_rounds(judge):
    judge(JudgeBrain(holds))
    seen: dict[str, list[str]] = {}
    for one in judge.asked:
        seen.setdefault("\n".join(one.texts), []).append(one.claim)
    assert all(len(claims) == len(set(claims)) == 2 for claims in seen.values())


def test_a_judge_who_flips_coins_is_stopped_or_at_chance(judge, rng):
    rows = judge(JudgeBrain(holds, accuracy=0.5, seed=int(rng.integers(2**32))), stop_early=True)
    # More than 5 of 12 are that small in fewer than one of 100,000 runs, and 0.12 is more than four standard errors.
    assert sum(rows[f, "own"]["p_value"] <= 0.05 for f in range(len(WORDS))) <= 5
    assert np.mean([rows[f, "own"]["balanced_accuracy"] for f in range(len(WORDS))]) == pytest.approx(0.5, abs=0.12)


def test_testing_stops_once_the_answers_decide_and_says_so(judge):
    whole = judge(JudgeBrain(holds))
    early = judge(JudgeBrain(holds), stop_early=True)
    stopped = [early[f, "own"] for f in range(len(WORDS)) if "stopped after" in early[f, "own"]["note"]]
    assert stopped
    for row in stopped:
        assert row["positives"] < whole[row["feature"], "own"]["positives"] and "(above chance)" in row["note"]
        assert 0.5 < row["balanced_accuracy_low"] <= row["balanced_accuracy"] <= row["balanced_accuracy_high"]
        assert row["p_value"] > whole[row["feature"], "own"]["p_value"]  # as many looks as there might have been
        assert row["prompt_tokens"] < whole[row["feature"], "own"]["prompt_tokens"]


def test_the_first_round_is_kept_because_no_stop_selects_it(judge, windows):
    """Means over estimates that were stopped when they were high are too high; those over first rounds are not."""
    early = judge(JudgeBrain(holds, accuracy=0.75), stop_early=True)
    for label in LABELS:
        first = detection.requests("sae", claim_of(label), windows.of(label.feature), seed=0)[0]
        only = replace(windows, table=windows.of(label.feature)[list(first.rows)])
        whole = judge(JudgeBrain(holds, accuracy=0.75), [label], of=only)
        assert early[label.feature, "own"]["first_round"] == pytest.approx(whole[label.feature, "own"]["balanced_accuracy"])
        assert early[label.feature, "shuffled"]["first_round"] is not None and whole[label.feature, "own"]["first_round"] is None


def test_where_testing_may_stop_the_interval_is_a_confidence_sequence_also_once_windows_are_used_up(judge):
    rows = judge(JudgeBrain(holds, accuracy=0.6), stop_early=True)
    whole = judge(JudgeBrain(holds, accuracy=0.6))
    own = [rows[f, "own"] for f in range(len(WORDS))]
    used_up = [row for row in own if "all " in row["note"]]
    assert used_up and all("its interval is a confidence sequence over documents" in row["note"] for row in own)
    for row in used_up:
        mine = whole[row["feature"], "own"]
        assert row["positives"] == mine["positives"]
        width, drawn = (of["balanced_accuracy_high"] - of["balanced_accuracy_low"] for of in (row, mine))
        assert width > drawn


def test_a_label_without_rounds_is_refused_by_every_judge(judge, windows):
    """Of a feature without a window, or without a negative one, beside one that is judged."""
    table = windows.of(1).filter(pl.col("kind") == "positive")
    some = replace(windows, table=pl.concat([windows.of(0), table]))
    for scorers in (("detection", "fuzzing", "intruder"), ("simulation",)):
        brain = SimulationBrain(lambda _, tokens: [1] * len(tokens)) if scorers == ("simulation",) else JudgeBrain(holds)
        rows = judge(brain, LABELS[:3], of=some, scorers=scorers, stop_early=True, second="m-2")
        assert {rows[f, "own"]["status"] for f in (1, 2)} == {"too_few_documents"} and set(judge.outcomes["feature"]) <= {0}


def test_a_label_that_no_other_can_stand_in_for_has_no_shuffled_arm(judge):
    rows = judge(JudgeBrain(holds), LABELS[:1], stop_early=True)
    assert rows[0, "shuffled"]["status"] == "not_applicable" and rows[0, "shuffled"]["first_round"] is None
    assert rows[0, "own"]["status"] == "scored" and rows[0, "own"]["lift"] is None is rows[0, "own"]["p_value"]
    assert {one.claim for one in judge.asked} == {LABELS[0].reads}


def about(word: str):
    """A fault of every request whose claim is about a word: prose instead of an answer."""
    return lambda call: "schema_ignored" if f'"{word}"' in shown_in(call.body).claim else "ok"


def test_one_label_with_unusable_answers_stops_nobody_else(judge):
    rows = judge(JudgeBrain(holds), faults=about("was"))
    bad = {f for f in range(len(WORDS)) if rows[f, "own"]["status"] == "unanswered"}
    assert WORDS.index("was") in bad and len(bad) == 2  # its own, and that whose shuffled label it is
    assert "breaks the schema" in rows[WORDS.index("was"), "own"]["note"] and rows[WORDS.index("was"), "own"]["f1"] is None
    assert all(rows[f, "own"]["balanced_accuracy"] > 0.85 for f in range(len(WORDS)) if f not in bad)
    assert sum('"was"' in one.claim for one in judge.asked) == 4  # the first round of both, each asked once more


def test_without_budget_left_labels_are_unanswered_and_the_next_run_goes_on(judge, windows):
    poor = judge(JudgeBrain(holds), max_tokens_total=60_000)
    paid = len(judge.asked)
    unanswered = [f for f in range(len(WORDS)) if poor[f, "own"]["status"] == "unanswered"]
    assert unanswered and all("raise max_tokens_total" in poor[f, "own"]["note"] for f in unanswered)
    rich = judge(JudgeBrain(holds))
    assert all(rich[f, "own"]["balanced_accuracy"] > 0.85 for f in range(len(WORDS))) and paid > 0
    lots = [len(windows.of(f)) for f in range(len(WORDS))]
    assert paid + len(judge.asked) <= 2 * sum(-(-n // 15) for n in lots)  # nothing that was answered is asked again
    assert judge(JudgeBrain(holds)) == rich and judge.asked == []  # and a run in one go comes to the same


def test_what_a_label_costs_is_what_its_answers_were_charged(judge):
    rows = judge(JudgeBrain(holds), usd_per_million_input=1.0, usd_per_million_output=2.0)
    asked = [row for row in rows.values() if row["arm"] in ("own", "shuffled")]
    spent = judge.spent["detection"]
    assert sum(row["prompt_tokens"] for row in asked) == spent.prompt_tokens
    assert sum(row["completion_tokens"] for row in asked) == spent.completion_tokens
    assert sum(row["usd"] for row in asked) == pytest.approx(spent.settled_usd, rel=1e-5)
    assert all(row["prompt_tokens"] is None for row in rows.values() if row not in asked)


def test_windows_of_another_split_are_refused_before_anything_is_asked(judge, units, firings):
    wrong = draw_windows(units, firings, range(3), split="select", neighbours=None)
    with pytest.raises(LeakError, match="may see only the report split"):
        judge(JudgeBrain(holds), LABELS[:3], of=wrong)
    disguised = replace(wrong, split="report")
    with pytest.raises(LeakError, match="draw the windows with draw_windows"):
        judge(JudgeBrain(holds), LABELS[:3], of=disguised)


def test_a_feature_in_too_few_documents_is_refused_before_anything_is_asked(judge, windows):
    two = windows.of(0).filter(pl.col("kind") == "positive")["document"].unique().sort()[:2]
    few = replace(windows, table=windows.of(0).filter((pl.col("kind") != "positive") | pl.col("document").is_in(two.to_list())))
    rows = judge(JudgeBrain(holds), LABELS[:1], of=few, scorers=("detection", "fuzzing"))
    assert rows[0, "own"]["status"] == rows[0, "shuffled"]["status"] == "too_few_documents" and judge.asked == []
    assert rows[0, "own"]["documents"] == 2 and rows[0, "own"]["f1"] is None


def test_a_second_judge_reads_what_the_first_read_of_a_tenth_of_the_features(judge, rng):
    rows = judge(JudgeBrain(holds), second="m-2")
    second = [row for (_, arm), row in rows.items() if arm == "second_judge"]
    assert len(second) == 2  # of 12 features, rounded up
    for row in second:
        own = rows[row["feature"], "own"]
        assert row["balanced_accuracy"] == own["balanced_accuracy"] and row["positives"] == own["positives"]
        assert row["note"] == "judged by m-2; agrees with m at kappa 1.00" and row["lift"] is None


def test_hits_misses_and_false_alarms_of_detection_are_kept(judge):
    judge(JudgeBrain(holds, accuracy=0.7))
    for row in judge.outcomes.iter_rows(named=True):
        word = WORDS[row["feature"]]
        is_marked = re.search(rf"«{word}»", row["text"], re.IGNORECASE) is not None
        assert is_marked == (row["outcome"] in ("hit", "miss")) and row["scorer"] == "detection"
    assert set(judge.outcomes["outcome"]) == {"hit", "miss", "false_alarm"}


def test_fuzzing_tells_right_marks_from_wrong_ones(judge):
    """A judge who calls marks right if each marked token is the word of the claim."""

    def right(claim: str, text: str) -> bool:
        marked = re.findall("<<(.+?)>>", text)
        return bool(marked) and all(holds(claim, word) for word in marked)

    rows = judge(JudgeBrain(right), scorers=("fuzzing",))
    assert all(rows[f, "own"]["balanced_accuracy"] == 1 and rows[f, "own"]["unit"] == "window" for f in range(len(WORDS)))
    assert np.mean([rows[f, "shuffled"]["balanced_accuracy"] for f in range(len(WORDS))]) == pytest.approx(0.5, abs=0.08)


def test_an_intruder_is_found_without_a_label_and_has_no_shuffled_arm(judge):
    def fits(_: str, text: str) -> bool:
        return all(word.strip().casefold() == "the" for word in re.findall("<<(.+?)>>", text))

    rows = judge(JudgeBrain(fits), LABELS[:1], scorers=("intruder",))
    own, constant = rows[0, "own"], rows[0, "constant"]
    assert set(rows) == {(0, "own"), (0, "constant")} and own["recall"] == own["precision"] == own["balanced_accuracy"] == 1
    assert constant["balanced_accuracy"] == pytest.approx(0.5, abs=0.25)
    assert own["lift"] == pytest.approx(1 - constant["balanced_accuracy"]) and all(one.claim == "" for one in judge.asked)


def test_simulation_is_the_correlation_of_expected_and_real_activations(judge, windows):
    def strengths(claim: str, tokens) -> list[int]:
        return [9 if holds(claim, token.strip()) else 0 for token in tokens]

    rows = judge(SimulationBrain(strengths), LABELS[:4], scorers=("simulation",))
    for feature in range(4):
        own, shuffled = rows[feature, "own"], rows[feature, "shuffled"]
        assert own["unit"] == "token" and own["correlation"] > 0.8 > 0.3 > abs(shuffled["correlation"])
        assert own["lift"] == pytest.approx(own["correlation"] - shuffled["correlation"])
        assert rows[feature, "trigger_tokens"]["correlation"] > 0.5


def test_simulation_does_not_apply_to_a_judge_without_log_probabilities(judge):
    brain = SimulationBrain(lambda _, tokens: [0] * len(tokens))
    rows = judge(brain, LABELS[:2], scorers=("simulation",), logprobs=False)
    assert {row["status"] for row in rows.values()} == {"not_applicable"} and len(judge.asked) == 4
