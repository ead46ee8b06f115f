"""Attribution on tiny models in float64, against finite differences."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.errors import ConfigError
from scopeatlas.study.attribution import attribute
from scopeatlas.study.edits import Edit, Editor
from scopeatlas.study.generation import read_prompt
from scopeatlas.subject.capture import next_token_logits
from tests.study.tiny_opened import PROMPT, SITES, WIDTH, tiny_opened

KINDS = list(SITES)


def difference(opened, edits=(), *, mask=None, prompt=PROMPT) -> float:
    """The logit of "a" less that of "b"."""
    read = read_prompt(opened.subject, prompt)
    editor = Editor(opened.dictionary, opened.subject.model, list(edits) or [Edit(0, "scale", 1.0)])
    with torch.no_grad(), editor.over(read.is_text if mask is None else mask):
        logits = next_token_logits(opened.subject.model, torch.from_numpy(read.ids))
    a, b = opened.subject.tokenizer.convert_tokens_to_ids(["a", "b"])
    return float(logits[a] - logits[b])


@pytest.mark.parametrize("kind", KINDS)
def test_an_attribution_is_what_a_small_step_towards_ablation_takes_away_per_step(rng, kind):
    opened = tiny_opened(rng, kind=kind)
    found = attribute(opened, PROMPT, target="a", against="b")
    clean, step = difference(opened), 0.03  # norms are computed in float32: a smaller step would drown in rounding
    assert found.difference == pytest.approx(clean, abs=1e-9)
    scale = float(found.features["attribution"].abs().max())
    for feature, value in found.features.select("feature", "attribution").head(6).iter_rows():
        sides = [difference(opened, [Edit(feature, "scale", 1 + sign * step)]) for sign in (1, -1)]
        assert value == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=0.01 * scale)


def test_the_attribution_at_one_token_is_that_of_a_step_there_alone(rng):
    opened = tiny_opened(rng)
    found = attribute(opened, PROMPT, target="a", against="b")
    best = found.places.sort(pl.col("attribution").abs(), descending=True).row(0, named=True)
    mask = np.zeros(len(PROMPT) + 1, dtype=bool)
    mask[best["position"] + 1] = True
    assert best["token"] == PROMPT[best["position"]]
    sides = [difference(opened, [Edit(best["feature"], "scale", 1 + step)], mask=mask) for step in (0.03, -0.03)]
    assert best["attribution"] == pytest.approx((sides[0] - sides[1]) / 0.06, rel=0.01)
    sums = found.places.group_by("feature").agg(pl.col("attribution").sum(), pl.len(), pl.col("activation").max())
    joined = found.features.join(sums, on="feature")
    assert joined.height == found.features.height == sums.height
    assert np.allclose(joined["attribution"], joined["attribution_right"]) and (joined["tokens"] == joined["len"]).all()
    assert found.by_token == pytest.approx(
        [found.places.filter(pl.col("position") == t)["attribution"].sum() for t in range(len(PROMPT))]
    )


@pytest.mark.parametrize(
    ("kind", "norm"), [*((kind, "none") for kind in KINDS), *(("sae", norm) for norm in ("token_norm", "layer_norm"))]
)
def test_features_error_and_bias_make_up_activation_times_gradient(rng, kind, norm):
    part = attribute(tiny_opened(rng, kind=kind, norm=norm), PROMPT, target="a", against="b").explained
    size = abs(part.features) + abs(part.error) + abs(part.bias)
    assert part.features + part.error + part.bias == pytest.approx(part.total, abs=1e-5 * size)
    assert 0 < part.share < 1


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "gpt2", "neox", "gemma3-vision"])
def test_completeness_holds_in_every_architecture(rng, architecture):
    opened = tiny_opened(rng, architecture=architecture)
    part = attribute(opened, PROMPT, target="a").explained
    size = abs(part.features) + abs(part.error) + abs(part.bias)
    assert part.features + part.error + part.bias == pytest.approx(part.total, abs=1e-5 * size)


def test_measured_values_are_those_of_real_ablations_one_by_one_and_all_at_once(rng):
    opened = tiny_opened(rng)
    found = attribute(opened, PROMPT, target="a", against="b", verify=4)
    clean = difference(opened)
    for feature, measured in found.features.select("feature", "measured").head(4).iter_rows():
        assert measured == pytest.approx(clean - difference(opened, [Edit(feature)]), abs=1e-9)
    assert found.features["measured"].null_count() == found.features.height - 4
    top = found.features.head(4)
    assert found.agreement == pytest.approx(np.corrcoef(top["attribution"], top["measured"])[0, 1])
    every = [Edit(feature) for feature in found.features["feature"]]
    assert found.explained.measured == pytest.approx(clean - difference(opened, every), abs=1e-5)
    assert attribute(opened, PROMPT, target="a", verify=2).agreement is None


def test_attribution_takes_place_at_the_position_that_is_asked_for(rng):
    opened = tiny_opened(rng)
    early, alone = attribute(opened, PROMPT, target="a", position=4), attribute(opened, PROMPT[:5], target="a")
    assert early.tokens == alone.tokens == tuple(PROMPT[:5])
    assert early.features.equals(alone.features) and early.explained == alone.explained
    with pytest.raises(ConfigError, match="no position 99"):
        attribute(opened, PROMPT, target="a", position=99)


def test_without_a_second_token_the_mean_logit_is_taken_off(rng):
    opened = tiny_opened(rng)
    found = attribute(opened, PROMPT, target="a")
    read = read_prompt(opened.subject, PROMPT)
    logits = next_token_logits(opened.subject.model, torch.from_numpy(read.ids))
    a = opened.subject.tokenizer.convert_tokens_to_ids("a")
    assert found.difference == pytest.approx(float(logits[a] - logits.mean())) and found.against == ""


def test_bos_and_a_chat_template_contribute_nothing(rng):
    opened = tiny_opened(rng)
    found = attribute(opened, [{"role": "user", "content": "Hi"}], target="a", against="b")
    assert set(found.places["token"]) <= {"H", "i"}
    with pytest.raises(ConfigError, match="no text up to token 1"):
        attribute(opened, [{"role": "user", "content": "Hi"}], target="a", position=1)


def test_an_attribution_is_a_table_json_html_and_a_picture(rng):
    opened = tiny_opened(rng)
    found = attribute(opened, "<i>" + PROMPT, target="a", against="b", verify=3)
    assert found.to_polars() is found.features
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["agreement"] == found.agreement
    page = found._repr_html_()
    assert "<i>" not in page and "&lt;" in page and "features explain" in page
    axis = found.plot().axes[0]
    shown = found.features.head(20)
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(shown["attribution"].to_list())
    assert list(axis.lines[-1].get_xdata()) == pytest.approx(shown["measured"].drop_nulls().to_list())
    assert found.features["feature"].is_unique().all() and found.features["feature"].max() < WIDTH
