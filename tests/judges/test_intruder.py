import json
import re
from collections import Counter

import numpy as np
import pytest

from scopeatlas.judges import intruder
from scopeatlas.llm.replies import InvalidReply
from tests.judge_brain import JudgeBrain, shown_in
from tests.judges.conftest import RUNS, SCATTERED, THE, said


def rounds_of(windows, feature: int, seed: int = 0):
    return intruder.requests("sae", feature, windows.of(feature), seed=seed)


def test_a_set_is_four_windows_that_fire_and_one_that_does_not(windows):
    for feature in (THE, RUNS, SCATTERED):
        rows = []
        for round in rounds_of(windows, feature):
            assert len(round.rows) % 5 == 0 and len(round.rows) <= 20
            for start in range(0, len(round.rows), 5):
                kinds = round.kinds[start : start + 5]
                assert kinds.count("positive") == 4
                assert round.expected[start : start + 5] == tuple(kind != "positive" for kind in kinds)
            rows += round.rows
        assert len(set(rows)) == len(rows)
        assert len(rows) // 5 == (windows.of(feature)["kind"] == "positive").sum() // 4


def test_every_text_is_marked_and_nothing_is_claimed(windows):
    for round in rounds_of(windows, THE):
        shown = shown_in({"messages": list(round.request.messages)})
        assert shown.claim == "" and list(shown.sections) == [f"SET {n}" for n in range(1, len(round.rows) // 5 + 1)]
        texts = [text for lines in shown.sections.values() for _, text in lines]
        assert len(texts) == len(round.rows) and all("<<" in text and ">>" in text for text in texts)


def test_the_intruder_may_stand_anywhere_in_its_set(windows):
    places = Counter(
        round.expected.index(True, start) - start
        for seed in range(20)
        for round in rounds_of(windows, THE, seed)
        for start in range(0, len(round.rows), 5)
    )
    assert set(places) == set(range(5)) and min(places.values()) > 0.5 * max(places.values())


def test_a_judge_that_reads_the_marks_finds_every_intruder(windows, judge):
    rounds = rounds_of(windows, THE)
    rule = JudgeBrain(lambda _, text: {m.strip().lower() for m in re.findall("<<(.*?)>>", text, re.DOTALL)} == {"the"})
    for round, answer in zip(rounds, judge(rounds, rule), strict=True):
        assert intruder.read(answer, round) == [float(is_intruder) for is_intruder in round.expected]


def test_a_judge_that_guesses_is_right_once_in_five(windows, rng):
    found, sets = 0, 0
    for seed in range(15):
        for round in rounds_of(windows, THE, seed):
            guess = {str(n): int(rng.integers(1, 6)) for n in range(1, len(round.rows) // 5 + 1)}
            verdicts = intruder.read(said(round, json.dumps(guess)), round)
            assert sum(verdicts) == len(guess)
            found += sum(v for v, is_intruder in zip(verdicts, round.expected, strict=True) if is_intruder)
            sets += len(guess)
    assert abs(found / sets - 0.2) < 5 * np.sqrt(0.16 / sets)


@pytest.mark.parametrize("wrong", [{"1": 0}, {"1": 6}, {"1": 1}, {}])
def test_an_answer_that_names_no_text_of_each_set_is_invalid(windows, wrong):
    round = rounds_of(windows, THE)[0]
    with pytest.raises(InvalidReply):
        intruder.read(said(round, json.dumps(wrong)), round)


def test_too_few_windows_make_no_set(windows):
    mine = windows.of(THE)
    assert intruder.requests("sae", THE, mine.head(3), seed=0) == []
    assert intruder.requests("sae", THE, mine.filter(mine["kind"] == "positive"), seed=0) == []
