"""Interventions and causal checks on tiny models in float64, against softmaxes by hand."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.errors import ConfigError
from scopeatlas.rendering.text import _jsonable
from scopeatlas.study.causal import causal_check
from scopeatlas.study.edits import Edit, Editor
from scopeatlas.study.generation import read_prompt
from scopeatlas.study.intervene import intervene
from scopeatlas.subject.capture import next_token_logits
from tests.study.tiny_opened import PROMPT, WIDTH, tiny_opened, with_rows

EDITS = [Edit(3, "add", 4.0), Edit(8)]


def probabilities(opened, prompt: str, edits=(), **arguments) -> np.ndarray:
    read = read_prompt(opened.subject, prompt)
    editor = Editor(opened.dictionary, opened.subject.model, list(edits) or [Edit(0, "scale", 1.0)], **arguments)
    with torch.no_grad(), editor.over(read.is_text):
        return next_token_logits(opened.subject.model, torch.from_numpy(read.ids)).softmax(0).numpy()


def test_risers_fallers_and_kl_are_those_of_the_two_distributions(rng):
    opened = tiny_opened(rng)
    found = intervene(opened, PROMPT, edits=EDITS, tokens=3)
    clean, edited = probabilities(opened, PROMPT), probabilities(opened, PROMPT, EDITS)
    order = np.argsort(clean - edited)
    assert found.next_tokens["token_id"].to_list() == [*order[:10], *order[-10:]]
    ids = found.next_tokens["token_id"].to_numpy()
    assert np.allclose(found.next_tokens["clean"], clean[ids]) and np.allclose(found.next_tokens["edited"], edited[ids])
    assert np.allclose(found.next_tokens["change"], (edited - clean)[ids])
    assert np.allclose(found.next_tokens["log_ratio"], np.log(edited / clean)[ids])
    assert found.kl == pytest.approx((clean * np.log(clean / edited)).sum(), rel=1e-6) and found.kl > 0


def test_an_intervention_says_what_it_did_where_and_how_the_model_went_on(rng):
    opened = tiny_opened(rng)
    found = intervene(opened, PROMPT, edits=EDITS, positions=[1, -1], tokens=4)
    assert found.tokens == tuple(PROMPT) and np.flatnonzero(found.edited_tokens).tolist() == [1, len(PROMPT) - 1]
    assert found.edits.select("feature", "key", "name", "change", "tokens").rows() == [
        (3, "toy/3", "label 3", "add", 2),
        (8, "toy/8", 'no label (incoherent); fires on "a"', "ablate", 2),
    ]
    assert max(len(found.clean.ids), len(found.edited.ids)) <= 4
    with pytest.raises(ConfigError, match="name a feature"):
        intervene(opened, PROMPT, edits=[])


def test_edits_that_change_nothing_move_nothing(rng):
    found = intervene(tiny_opened(rng), PROMPT, edits=[Edit(3, "scale", 1.0)], tokens=5)
    assert found.kl == 0 and found.next_tokens.is_empty() and found.clean == found.edited


def test_an_intervention_is_a_table_json_html_and_a_picture(rng):
    opened = tiny_opened(rng)
    opened = with_rows(opened, label=pl.Series(["<b>bold</b>"] * WIDTH))
    found = intervene(opened, "<i>" + PROMPT, edits=EDITS, tokens=3)
    assert found.to_polars() is found.next_tokens
    assert json.loads(json.dumps(_jsonable(found.as_dict()), allow_nan=False))["kl"] == found.kl
    page = found._repr_html_()
    assert "<b>bold" not in page and "<i>" not in page and "&lt;b&gt;bold" in page
    heights = [bar.get_width() for bar in found.plot().axes[0].patches]
    assert heights == pytest.approx(found.next_tokens["change"].to_list())


PROMPTS = ["A river runs.", "Two dogs", "Rain, again", "Some more", "No!"]


def test_the_quantity_of_a_causal_check_is_the_probability_or_the_log_odds_of_tokens(rng):
    opened = tiny_opened(rng)
    one = causal_check(opened, PROMPTS, edits=EDITS, tokens=["a", "b", 7], controls=2)
    two = causal_check(opened, PROMPTS, edits=EDITS, tokens=["a"], against=["b", "c"], controls=2)
    a, b, c = (opened.subject.tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    for row, other, prompt in zip(one.prompts.rows(named=True), two.prompts.rows(named=True), PROMPTS, strict=True):
        for name, p in (("clean", probabilities(opened, prompt)), ("edited", probabilities(opened, prompt, EDITS))):
            assert row[name] == pytest.approx(p[[a, b, 7]].sum(), rel=1e-6)
            assert other[name] == pytest.approx(np.log(p[a] / p[[b, c]].sum()), rel=1e-6, abs=1e-9)
    assert one.change[0] == pytest.approx((one.prompts["edited"] - one.prompts["clean"]).mean())
    assert one.change[1] <= one.change[0] <= one.change[2] and one.excess[1] <= one.excess[0] <= one.excess[2]
    assert "'a' or 'b' or" in one.quantity and two.quantity == "the log-odds of 'a' over 'b' or 'c'"
    assert one.edits["tokens"].to_list() == [sum(map(len, PROMPTS))] * 2


def test_controls_write_features_that_have_fired_as_long_as_the_edited_ones_and_by_as_much(rng):
    opened = tiny_opened(rng)
    fired = [0.0] * WIDTH
    fired[3] = fired[8] = fired[11] = 1.0  # so that 11 is every control
    opened = with_rows(opened, max_activation=pl.Series(fired))
    found = causal_check(opened, PROMPTS, edits=EDITS, tokens=["a"], controls=3)
    rows = opened.dictionary.layers[0].w_dec[:, 0]
    in_place = {f: (rows[11] * rows[f].norm() / rows[11].norm())[None] for f in (3, 8)}
    a = opened.subject.tokenizer.convert_tokens_to_ids("a")
    expected = [(probabilities(opened, p, EDITS, rows=in_place) - probabilities(opened, p))[a] for p in PROMPTS]
    assert np.allclose(found.prompts["control"], expected, rtol=1e-4, atol=1e-8)
    assert np.allclose(found.controls, np.mean(expected), rtol=1e-4, atol=1e-8)
    assert found.excess[0] == pytest.approx(found.change[0] - np.mean(expected), rel=1e-4, abs=1e-8)
    with pytest.raises(ConfigError, match="no control"):
        causal_check(with_rows(opened, max_activation=pl.Series([0.0] * WIDTH)), PROMPTS, edits=EDITS, tokens=["a"])


def test_a_planted_direction_moves_its_token_further_than_chance_and_is_said_to(rng):
    opened = tiny_opened(rng)
    a, b = (opened.subject.tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    rows, unembedding = opened.dictionary.layers[0].w_dec, opened.subject.model.get_output_embeddings().weight
    direct = (unembedding[a] - unembedding[b]).float()
    rows[3, 0] = direct / direct.norm() * rows[3, 0].norm()
    strong = [Edit(3, "add", 200.0)]  # so strong that nothing else is left of the stream
    found = causal_check(opened, PROMPTS, edits=strong, tokens=["a"], against=["b"], controls=40)
    assert found.change[0] > 0 and found.is_more and ", more than random" in found.verdict
    nothing = causal_check(opened, PROMPTS, edits=[Edit(3, "scale", 1.0)], tokens=["a"], controls=2)
    assert nothing.change == (0, 0, 0) and nothing.p_value == 1 and nothing.is_more is False
    assert ", no more than random" in nothing.verdict


def test_a_causal_check_is_a_table_json_html_and_a_picture_and_repeats_itself(rng):
    opened = tiny_opened(rng)
    found, again = (causal_check(opened, PROMPTS, edits=EDITS, tokens=["a"], controls=4, seed=1) for _ in range(2))
    assert found.controls == again.controls and found.change == again.change
    assert found.to_polars().height == len(PROMPTS) and found.plot().axes
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["verdict"] == found.verdict
    assert "toy" in found._repr_html_()
    for asked in ({"prompts": []}, {"edits": []}, {"tokens": []}, {"controls": 0}):
        arguments = {"prompts": PROMPTS, "edits": EDITS, "tokens": ["a"]} | asked
        with pytest.raises(ConfigError, match="at least one"):
            causal_check(opened, arguments.pop("prompts"), **arguments)
    with pytest.raises(ConfigError, match="generates nothing"):
        causal_check(opened, PROMPTS, edits=EDITS, tokens=["a"], positions="generated")
    with pytest.raises(ConfigError, match="seed is 0 or more"):
        causal_check(opened, PROMPTS, edits=EDITS, tokens=["a"], seed=-1)


@pytest.mark.slow
def test_random_features_are_seldom_said_to_do_more_than_random_features(rng):
    opened = tiny_opened(rng)
    found = [
        causal_check(opened, PROMPTS[:3], edits=[Edit(feature, "add", 20.0)], tokens=["a"], seed=feature)
        for feature in rng.choice(np.arange(1, WIDTH), 12, replace=False).tolist()
    ]
    assert sum(check.is_more is True for check in found) <= 5  # about one in 17 by chance
    assert all((", more than random" in check.verdict) == check.is_more for check in found)


def test_edits_that_do_less_than_random_features_are_not_said_to_do_more(rng):
    opened = tiny_opened(rng)
    check = causal_check(opened, PROMPTS[:2], edits=EDITS, tokens=["a"], controls=1)
    less = replace(check, change=(0.1, 0.09, 0.11), excess=(-0.4, -0.5, -0.3), p_value=0.04)
    assert less.is_more is False and ", no more than random" in less.verdict
    spread = replace(check, change=(0.9, 0.8, 1.0), excess=(0.4, 0.3, 0.5), p_value=0.2)  # many a draw does as much
    assert spread.is_more is False
    more = replace(spread, p_value=0.04)
    assert more.is_more is True and replace(more, excess=(0.4, -0.1, 0.9)).is_more is False
    opposite = replace(more, change=(-0.9, -1.0, -0.8), excess=(-0.4, -0.5, -0.3))
    assert opposite.is_more is True


def test_one_prompt_has_no_interval_and_no_verdict_on_chance(rng):
    found = causal_check(tiny_opened(rng), PROMPT, edits=EDITS, tokens=["a"], controls=2)
    assert found.prompts.height == 1 and found.change == (found.prompts["change"][0], None, None)
    assert found.is_more is None and "one prompt has no interval" in found.verdict and "more than random" not in found.verdict
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["excess"]["low"] is None
    assert "no interval" in found._repr_html_() and found.plot().axes


def test_a_token_counts_once_and_is_not_measured_against_itself(rng):
    opened = tiny_opened(rng)
    a = opened.subject.tokenizer.convert_tokens_to_ids("a")
    once, twice = (causal_check(opened, PROMPTS[:2], edits=EDITS, tokens=given, controls=1) for given in (["a"], ["a", a, "a"]))
    assert twice.prompts.equals(once.prompts) and twice.quantity == once.quantity
    with pytest.raises(ConfigError, match="'a' cannot be measured against itself"):
        causal_check(opened, PROMPTS, edits=EDITS, tokens=["a", "b"], against=["c", a], controls=1)
