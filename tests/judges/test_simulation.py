import json
import math

import pytest

from scopeatlas.judges import simulation
from scopeatlas.judges.simulation import NoLogprobs
from scopeatlas.llm.replies import InvalidReply
from scopeatlas.llm.requests import TokenLogprob
from tests.judge_brain import SimulationBrain, shown_in
from tests.judges.conftest import THE, claim, said


def nine_on_the(_: str, tokens: list[str]) -> list[int]:
    return [8 if token.strip().lower() == "the" else 0 for token in tokens]


@pytest.fixture
def rounds(windows):
    return simulation.requests("sae", claim(THE), windows.of(THE).head(12), seed=0)


def test_every_window_is_shown_token_by_token_and_log_probabilities_are_asked_for(windows, rounds):
    mine = windows.of(THE)
    for round in rounds:
        shown = shown_in({"messages": list(round.request.messages)})
        assert shown.texts == [mine["texts"][row].to_list() for row in round.rows]
        assert len(round.rows) < 10 and round.request.logprobs == 10
    assert sorted(row for round in rounds for row in round.rows) == list(range(12))


def test_strengths_are_expected_values_under_the_judges_probabilities(windows, rounds, judge):
    """Three parts the digit itself and one part the next: 8 means 8.25 of 9, and 0 means 0.25."""
    mine = windows.of(THE)
    for round, answer in zip(rounds, judge(rounds, SimulationBrain(nine_on_the, sure=0.75)), strict=True):
        for row, strengths in zip(round.rows, simulation.read(answer, round), strict=True):
            expected = [(digit + 0.25) / 9 for digit in nine_on_the("", mine["texts"][row].to_list())]
            assert strengths == pytest.approx(expected)


def test_a_judge_that_is_sure_says_its_own_digit(windows, rounds, judge):
    for round, answer in zip(rounds, judge(rounds, SimulationBrain(nine_on_the)), strict=True):
        for strengths in simulation.read(answer, round):
            assert set(strengths) <= {0, 8 / 9}


def test_without_log_probabilities_simulation_does_not_apply(rounds, judge):
    for round, answer in zip(rounds, judge(rounds, SimulationBrain(nine_on_the), logprobs=False), strict=True):
        with pytest.raises(NoLogprobs, match="no log-probabilities"):
            simulation.read(answer, round)


def tokens_of(text: str, *, top: tuple[tuple[str, float], ...] | None = None) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(c, 0.0, ((c, 0.0),) if top is None else top) for c in text)


@pytest.fixture
def short(windows):
    """One round of one window with three tokens."""
    three = windows.of(THE).head(1).with_columns(texts=windows.of(THE)["texts"].head(1).list.head(3))
    (round,) = simulation.requests("sae", claim(THE), three, seed=0)
    return round


def test_only_digits_are_weighed_and_what_else_might_have_stood_there_is_left_out(short):
    text = '{"1": [0,0,5]}'
    alternatives = ((" 5", math.log(0.5)), ("7", math.log(0.25)), ("]", math.log(0.2)), ("10", math.log(0.05)))
    logprobs = tuple(TokenLogprob(c, 0.0, alternatives if c == "5" else ((c, 0.0),)) for c in text)
    (strengths,) = simulation.read(said(short, text, logprobs=logprobs), short)
    assert strengths == pytest.approx([0, 0, (5 * 2 + 7) / 3 / 9])


def test_the_order_of_texts_in_the_answer_does_not_matter(windows):
    two = windows.of(THE).head(2).with_columns(texts=windows.of(THE)["texts"].head(2).list.head(2))
    (round,) = simulation.requests("sae", claim(THE), two, seed=0)
    text = '{"2": [3,4], "1": [1,2]}'
    found = simulation.read(said(round, text, logprobs=tokens_of(text)), round)
    assert found == [pytest.approx([1 / 9, 2 / 9]), pytest.approx([3 / 9, 4 / 9])]


@pytest.mark.parametrize("changed", [0, 3, 9])
def test_log_probabilities_of_another_answer_are_not_used(short, changed):
    said_there = tokens_of(json.dumps({"1": [changed, 0, 1]}))
    with pytest.raises(NoLogprobs):
        simulation.read(said(short, '{"1": [5,0,1]}', logprobs=said_there), short)


def test_digits_that_are_not_tokens_or_have_no_alternatives_are_not_guessed_at(short):
    text = '{"1": [5,0,1]}'
    merged = (*tokens_of('{"1": ['), TokenLogprob("5,", 0.0, (("5,", 0.0),)), *tokens_of("0,1]}"))
    for logprobs in (merged, tokens_of(text, top=())):
        with pytest.raises(NoLogprobs, match="single digits"):
            simulation.read(said(short, text, logprobs=logprobs), short)


@pytest.mark.parametrize("wrong", [{"1": [0, 0]}, {"1": [0, 0, 0, 0]}, {"1": [0, 0, 10]}, {"1": [0, 0, -1]}, {"2": [0, 0, 0]}])
def test_an_answer_of_another_length_or_range_is_invalid(short, wrong):
    text = json.dumps(wrong)
    with pytest.raises(InvalidReply, match="breaks the schema") as raised:
        simulation.read(said(short, text, logprobs=tokens_of(text)), short)
    assert not isinstance(raised.value, NoLogprobs)
