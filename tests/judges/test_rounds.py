import json
from itertools import groupby

import jsonschema
import numpy as np
import polars as pl
import pytest

from scopeatlas.judges.rounds import MARKS, PROMPTS, Marks, judge_prompt, packed, read_verdicts, shown, verdict_schema
from scopeatlas.llm.replies import InvalidReply
from scopeatlas.llm.requests import Answer, ChatReply, ChatRequest
from scopeatlas.mining.windows import firing
from tests.judges.conftest import RUNS, SCATTERED, THE

REQUEST = ChatRequest("detection", "sae", 0, (), {}, 10, "p@0")


def test_every_window_is_in_one_lot_and_every_document_too(windows):
    for feature in range(4):
        mine = windows.of(feature)
        lots = packed(mine, feature=feature, seed=0)
        assert sorted(row for lot in lots for row in lot) == list(range(len(mine)))
        assert len(lots) == round(len(mine) / 20)
        assert max(map(len, lots)) <= len(mine) / len(lots) + mine["document"].value_counts()["count"].max()
        documents = [set(mine["document"].gather(lot)) for lot in lots]
        assert sum(map(len, documents)) == mine["document"].n_unique()


def test_a_document_that_is_too_large_for_a_lot_is_split(windows):
    one = windows.of(THE).with_columns(document=pl.lit(3))
    lots = packed(one, feature=THE, seed=0)
    assert sorted(row for lot in lots for row in lot) == list(range(len(one)))
    assert max(map(len, lots)) < 40


def test_lots_are_shuffled_by_feature_and_seed(windows):
    mine = windows.of(THE)
    first = packed(mine, feature=THE, seed=0)
    assert first == packed(mine, feature=THE, seed=0)
    assert first != packed(mine, feature=THE, seed=1) and first != packed(mine, feature=RUNS, seed=0)
    assert [row for lot in first for row in lot] != sorted(row for lot in first for row in lot)


def test_marks_stand_around_runs_with_the_leading_space_outside():
    texts = [" the", " cat", "'s", " paw", "\n\n", "The"]
    assert shown(texts) == " the cat's paw\n\nThe"
    assert shown(texts, [False, True, True, False, False, True]) == " the <<cat's>> paw\n\n<<The>>"
    assert shown(texts, [False, False, False, False, True, False]) == " the cat's paw<<\n\n>>The"


def test_a_text_is_the_same_without_its_marks(windows, rng):
    for row in windows.table.sample(50, seed=int(rng.integers(1000))).rows(named=True):
        text = shown(row["texts"], rng.random(len(row["texts"])) < 0.3)
        assert text.replace(MARKS[0], "").replace(MARKS[1], "") == shown(row["texts"]).replace(MARKS[0], "").replace(MARKS[1], "")


def runs(marked: np.ndarray) -> list[int]:
    return sorted(len(list(group)) for is_marked, group in groupby(marked) if is_marked)


@pytest.mark.parametrize("feature", [THE, RUNS, SCATTERED])
def test_wrong_marks_are_as_many_and_as_long_as_right_ones_and_touch_nothing_that_fires(windows, rng, feature):
    mine = windows.of(feature)
    marks = Marks(mine)
    positives = [row for row, kind in enumerate(mine["kind"]) if kind == "positive"]
    patterns = [runs(marks.right(row)) for row in positives]
    full = [row for row in range(len(mine)) if len(mine["texts"][row]) == 32]
    found = 0
    for row in full:
        wrong = marks.wrong(row, rng)
        if wrong is None:
            continue
        found += 1
        assert not (wrong & (np.array(mine["activations"][row]) > 0)).any()
        wrapped = wrong[0] and wrong[-1]  # a run that goes around the end counts as two
        assert wrapped or runs(wrong) in patterns
    assert found > 0.9 * len(full)


def test_wrong_marks_of_silent_windows_stand_where_right_ones_do(windows, rng):
    """Not at one fixed place: the share of windows that are marked at each token is that of the positives."""
    mine = windows.of(THE)
    marks = Marks(mine)
    kinds = mine["kind"].to_list()
    full = [row for row in range(len(mine)) if len(mine["texts"][row]) == 32]
    right = np.mean([marks.right(row) for row in full if kinds[row] == "positive"], axis=0)
    wrong = np.mean([marks.wrong(row, rng) for _ in range(40) for row in full if kinds[row] != "positive"], axis=0)
    assert (wrong > 0).sum() > 20
    assert np.abs(right - wrong).max() < 0.15 and abs(right.sum() - wrong.sum()) < 0.5


def test_a_window_that_fires_everywhere_cannot_be_marked_wrongly(windows, rng):
    mine = windows.of(THE).head(4)
    everywhere = mine.with_columns(activations=pl.col("activations").list.eval(pl.element() * 0 + 1))
    assert all(Marks(everywhere).wrong(row, rng) is None for row in range(4))
    assert all(firing(values).all() for values in everywhere["activations"])


def test_a_single_positive_has_nobody_to_take_marks_from(windows, rng):
    assert Marks(windows.of(THE).head(1)).wrong(0, rng) is None


def test_the_schema_allows_exactly_one_verdict_for_each_text():
    schema = verdict_schema("detection", 3)["schema"]
    jsonschema.validate({"1": 0, "2": 1, "3": 0}, schema)
    for wrong in ({"1": 0, "2": 1}, {"1": 0, "2": 1, "3": 2}, {"1": 0, "2": 1, "3": 0, "4": 0}, [0, 1, 0]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_verdicts_are_read_in_the_order_of_the_texts():
    reply = ChatReply('{"2": 1, "10": 1, "1": 0, "3": 0, "4": 0, "5": 0, "6": 0, "7": 0, "8": 0, "9": 0}', "stop")
    assert read_verdicts(Answer(REQUEST, "k", reply), 10) == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"1": 0, "2": 1},
        {"1": 0, "2": 1, "3": 0, "4": 1},
        {"1": 0, "2": 1, "03": 0},
        {"1": 0, "2": 1, "3": 2},
        {"1": 0, "2": 1, "3": -1},
        {"1": 0, "2": 1, "3": True},
        {"1": 0, "2": 1, "3": "1"},
        {"1": 0, "2": 1, "3": None},
        {"verdicts": {"1": 0, "2": 1, "3": 0}},
        [0, 1, 0],
    ],
)
def test_an_answer_with_any_other_ids_or_values_is_invalid(wrong):
    with pytest.raises(InvalidReply, match="breaks the schema"):
        read_verdicts(Answer(REQUEST, "k", ChatReply(json.dumps(wrong), "stop")), 3)


def test_what_is_unanswered_or_plainly_no_answer_is_invalid():
    with pytest.raises(InvalidReply, match="not sent"):
        read_verdicts(Answer(REQUEST, "k", None, "not sent: no room"), 1)
    with pytest.raises(InvalidReply, match="cut off"):
        read_verdicts(Answer(REQUEST, "k", ChatReply('{"1": 1}', "length"), "the answer was cut off"), 1)


def test_every_prompt_is_long_enough_for_providers_to_cache(subject):
    """From 1,024 tokens on; the texts that follow differ in each request and are not counted."""
    names = sorted(path.stem for path in PROMPTS.iterdir())
    assert names == ["detection_v1", "fuzzing_v1", "intruder_v1", "simulation_v1"]
    for name in names:
        assert len(subject.tokenizer.encode(judge_prompt(name).text, add_special_tokens=False)) >= 1100
