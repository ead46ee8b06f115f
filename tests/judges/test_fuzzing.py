import re

import numpy as np
import pytest

from scopeatlas.judges import fuzzing
from scopeatlas.mining.windows import firing
from tests.judge_brain import JudgeBrain, shown_in
from tests.judges.conftest import NUMBERS, RUNS, SCATTERED, THE, claim


def marked_tokens(tokens: list[str], text: str) -> np.ndarray:
    """Which tokens stand between marks, by walking along the text: bool [tokens]."""
    inside, at, out = False, 0, []
    for token in tokens:
        within = []
        for character in token:
            while text.startswith(("<<", ">>"), at) and text[at] != character:
                inside, at = text[at] == "<", at + 2
            assert text[at] == character
            within.append(inside)
            at += 1
        out.append(within[-1] if within else inside)
    return np.array(out)


def shown_windows(windows, feature: int, seed: int = 0):
    """(kind, row, marked tokens) of each window that is shown."""
    mine = windows.of(feature)
    for round in fuzzing.requests("sae", claim(feature), mine, seed=seed):
        texts = shown_in({"messages": list(round.request.messages)}).texts
        for row, kind, fires, text in zip(round.rows, round.kinds, round.expected, texts, strict=True):
            assert fires == (kind == "positive")
            if not re.search(r"[<>]|^\s*$", "".join(mine["texts"][row])):
                yield kind, mine.row(row, named=True), marked_tokens(mine["texts"][row], text)


@pytest.mark.parametrize("feature", [THE, NUMBERS, RUNS, SCATTERED])
def test_right_marks_are_at_the_tokens_that_fire_and_wrong_ones_where_none_does(windows, feature):
    for kind, row, marked in shown_windows(windows, feature):
        fires = firing(row["activations"])
        if kind == "positive":
            assert (marked == fires).all()
        else:
            assert marked.any() and not (marked & (np.array(row["activations"]) > 0)).any()
            assert (kind == "mismarked") == (row["kind"] == "positive")


def test_a_third_of_the_positives_is_marked_wrongly(windows):
    kinds = [kind for round in fuzzing.requests("sae", claim(SCATTERED), windows.of(SCATTERED), seed=0) for kind in round.kinds]
    positives = (windows.of(SCATTERED)["kind"] == "positive").sum()
    assert kinds.count("mismarked") == positives // 3
    assert kinds.count("positive") == positives - positives // 3
    assert {"random", "trigger", "neighbour"} < set(kinds)


def test_which_positives_are_marked_wrongly_depends_on_the_seed_and_not_on_the_label(windows):
    def kinds(text: str, seed: int) -> list[tuple]:
        return [(round.rows, round.kinds) for round in fuzzing.requests("sae", claim(THE, text), windows.of(THE), seed=seed)]

    assert kinds("one", 0) == kinds("another", 0) != kinds("one", 1)


def test_how_many_tokens_are_marked_and_where_does_not_tell_right_from_wrong(windows):
    groups = {True: [], False: []}
    for seed in range(6):
        for kind, row, marked in shown_windows(windows, THE, seed):
            if len(row["texts"]) == 32:
                groups[kind == "positive"].append((marked.sum(), np.flatnonzero(marked).mean()))
    right, wrong = (np.mean(groups[which], axis=0) for which in (True, False))
    assert abs(right[0] - wrong[0]) < 0.4 and abs(right[1] - wrong[1]) < 2.5
    assert len({place for _, place in groups[False]}) > 20


def test_a_judge_that_reads_the_marks_is_read_as_expected(windows, judge):
    """The claim is the word "the": right are the marks that stand around it and nothing else."""
    rounds = fuzzing.requests("sae", claim(THE), windows.of(THE), seed=0)
    rule = JudgeBrain(lambda _, text: {m.strip().lower() for m in re.findall("<<(.*?)>>", text, re.DOTALL)} == {"the"})
    for round, answer in zip(rounds, judge(rounds, rule), strict=True):
        assert fuzzing.read(answer, round) == [float(fires) for fires in round.expected]


def test_the_prompt_is_the_same_for_every_request(windows):
    rounds = [round for f in (THE, RUNS) for round in fuzzing.requests("sae", claim(f), windows.of(f), seed=0)]
    assert len({round.request.messages[0]["content"] for round in rounds}) == 1


def test_without_positives_there_is_nothing_to_mark(windows):
    negatives = windows.of(THE).filter(windows.of(THE)["kind"] != "positive")
    assert fuzzing.requests("sae", claim(THE), negatives, seed=0) == []
