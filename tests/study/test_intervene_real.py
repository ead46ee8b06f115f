"""Interventions in Gemma 3 270M through the demo's SAE of layer 12, against hooks by hand."""

from pathlib import Path

import polars as pl
import pytest
import torch

from scopeatlas.dictionaries.releases import SaeEntry, load_folder
from scopeatlas.storage.store import Store
from scopeatlas.study.attribution import attribute
from scopeatlas.study.edits import Edit
from scopeatlas.study.intervene import intervene
from scopeatlas.study.opening import OpenSae
from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "demo" / "releases" / "scope-atlas-demo-gemma-3-270m" / "resid_post" / "layer_12_width_4k_l0_medium"
PROMPT = "The capital of Japan is the city of"


@pytest.fixture(scope="module")
def opened(subject) -> OpenSae:
    dictionary = load_folder(DEMO)
    features = list(range(dictionary.width))
    same = {"label": "", "status": "ok", "f1": None, "max_activation": 1000.0, "kind": "sae"}
    rows = pl.DataFrame(
        {"feature": features, "key": [f"demo/{i}" for i in features], "trigger_tokens": [[""]] * len(features)}
    ).with_columns(**{name: pl.lit(value) for name, value in same.items()})
    opened = OpenSae(Store(Path("nowhere")), "demo", "corpus", SaeEntry.__new__(SaeEntry), subject, rows)
    vars(opened)["dictionary"] = dictionary
    return opened


@pytest.mark.slow
def test_ablating_a_feature_is_taking_its_part_out_of_the_residual_stream(opened, subject):
    found = attribute(opened, PROMPT, target=" Tokyo", against=" Paris", verify=5)
    feature = found.features["feature"][0]
    dictionary = opened.dictionary
    ids = subject.tokenizer(PROMPT)["input_ids"]
    tokyo, paris = (subject.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" Tokyo", " Paris"))

    def without(_module, _args, out):
        acts = out[0] if isinstance(out, tuple) else out
        a = dictionary.encode(acts[0]).dense(dictionary.width)[:, feature]
        a[0] = 0  # BOS
        return acts - (a[:, None] * dictionary.steering_vector(feature))[None]

    def difference() -> float:
        with torch.no_grad():
            logits = subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        return float(logits[tokyo] - logits[paris])

    clean = difference()
    handle = subject.model.model.layers[12].register_forward_hook(without)
    ablated = difference()
    handle.remove()
    assert found.difference == pytest.approx(clean, abs=1e-3) and clean > 0
    assert found.features["measured"][0] == pytest.approx(clean - ablated, abs=2e-3)
    part = found.explained
    assert part.features + part.error + part.bias == pytest.approx(part.total, abs=1e-3)
    assert found.agreement is not None and found.agreement > 0.8


@pytest.mark.slow
def test_steering_changes_the_text_and_an_edit_of_nothing_does_not(opened):
    strong = intervene(opened, PROMPT, edits=[Edit(12, "add", 2000.0)], tokens=6)
    assert strong.kl > 0.1 and strong.edited != strong.clean and len(strong.clean.ids) == 6
    nothing = intervene(opened, PROMPT, edits=[Edit(12, "scale", 1.0)], tokens=6)
    assert nothing.kl == 0 and nothing.edited == nothing.clean == strong.clean
