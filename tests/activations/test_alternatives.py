"""A dictionary at the wrong site is blocked, and the mistake is named, on the real model.

Each test takes a dictionary whose right reading is known because it was solved for there (least squares, principal
components, or the model's own matrix), and misreads it as releases have been misread.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scopeatlas.activations import splicing
from scopeatlas.activations.alternatives import bf16_flips, try_alternatives
from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.fidelity import Fidelity, measure_fidelity
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site
from tests.conftest import REPOSITORY, Stored, activations_at, entry_of, text_mask, write_sae

LAYER = 3
NORMED, ADDED = (f"model.layers.{LAYER}.{norm}_feedforward_layernorm.output" for norm in ("pre", "post"))
STREAM = f"model.layers.{LAYER}.output"
TRAINED = REPOSITORY / "demo/releases/scope-atlas-demo-gemma-3-270m/resid_post/layer_9_width_2k_l0_medium"


@pytest.fixture(autouse=True)
def few_spliced(monkeypatch):
    """Losses on two contexts only: logits over Gemma's vocabulary are what takes the time here."""
    monkeypatch.setattr(splicing, "SPLICE_TOKENS", 128)


@pytest.fixture
def stored(small_corpus, tmp_path) -> Stored:
    shutil.copytree(small_corpus.store.root / "corpus", tmp_path / "store" / "corpus")
    return replace(small_corpus, store=Store(tmp_path / "store"))


def measured(stored: Stored, folder: Path, subject: SubjectModel) -> Fidelity:
    entry = entry_of(folder)
    result = cache_activations(stored.store, stored.corpus, [entry], subject)
    assert not result.failed
    return measure_fidelity(stored.store, stored.corpus, [entry], subject).found[entry.key]


def principal_directions(x_td: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """A dictionary of both signs of the first principal directions: `count` of 2 * `count` features fire on a token."""
    mean = x_td.mean(0)
    rows = torch.linalg.svd(x_td - mean, full_matrices=False).Vh[:count]
    w_dec = torch.cat([rows, -rows]).contiguous()
    return {
        "w_enc": w_dec.T.contiguous(),
        "b_enc": -(w_dec @ mean),
        "threshold": torch.zeros(len(w_dec)),
        "w_dec": w_dec,
        "b_dec": mean,
    }


def skip_transcoder(x_td: torch.Tensor, y_td: torch.Tensor) -> dict[str, torch.Tensor]:
    """A transcoder that is all skip: the ridge solution y = x @ A + b, and features that never fire but on one token in a
    hundred."""
    x, y = x_td.double(), y_td.double()
    centred, penalty = x - x.mean(0), 0.3 * (x - x.mean(0)).square().sum(0).mean()
    matrix = torch.linalg.solve(
        centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64), centred.T @ (y - y.mean(0))
    )
    directions = torch.nn.functional.normalize(torch.randn(16, x.shape[1]), dim=1)
    return {
        "w_enc": directions.T.contiguous(),
        "b_enc": torch.zeros(16),
        "threshold": (x_td @ directions.T).quantile(0.99, dim=0).clamp(min=1e-3),
        "w_dec": torch.nn.functional.normalize(torch.randn(16, y.shape[1]), dim=1),
        "b_dec": (y.mean(0) - x.mean(0) @ matrix).float(),
        "affine_skip_connection": matrix.float().contiguous(),
    }


def as_transcoder(**config: object) -> dict[str, object]:
    return {"type": "transcoder", "hf_hook_point_in": NORMED, "hf_hook_point_out": ADDED, "l0": None, **config}


def test_a_dictionary_read_as_it_should_be_is_not_blocked(stored, subject, tmp_path):
    tensors = principal_directions(activations_at(STREAM, stored, subject), 40)
    found = measured(
        stored, write_sae(tmp_path / "right", tensors, hf_hook_point_in=STREAM, hf_hook_point_out=STREAM, l0=40), subject
    )
    assert found.blocks() is None and found.fits[0].name == "as specified" and len(found.fits) > 4


@pytest.fixture
def trained(tmp_path) -> Path:
    """A copy of the demo's SAE of the residual stream after layer 9."""
    return Path(shutil.copytree(TRAINED, tmp_path / TRAINED.name))


@pytest.mark.parametrize("wrong", [8, 10])
def test_a_wrong_layer_is_blocked_and_the_right_one_named(stored, subject, trained, wrong):
    config = trained / "config.json"
    config.write_text(config.read_text().replace("model.layers.9.", f"model.layers.{wrong}."))
    assert "likeliest cause: it fits with layer 9" in measured(stored, trained, subject).blocks()


def test_a_transposed_skip_is_blocked_and_named(stored, subject, tmp_path):
    tensors = skip_transcoder(activations_at(NORMED, stored, subject), activations_at(ADDED, stored, subject))
    assert measured(stored, write_sae(tmp_path / "right", tensors, **as_transcoder()), subject).blocks() is None
    transposed = tensors | {"affine_skip_connection": tensors["affine_skip_connection"].T.contiguous()}
    found = measured(stored, write_sae(tmp_path / "wrong", transposed, **as_transcoder()), subject)
    assert "likeliest cause: it fits with the affine skip transposed" in found.blocks()


def without_gain(stored: Stored, subject: SubjectModel) -> torch.Tensor:
    """What enters the norm before the MLP, at root mean square 1, computed from that input by hand."""
    x = activations_at(f"model.layers.{LAYER}.pre_feedforward_layernorm.input", stored, subject).double()
    return (x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()).float()


def test_a_transcoder_trained_without_the_norms_gain_and_read_with_it_is_blocked_and_named(stored, subject, tmp_path):
    tensors = skip_transcoder(without_gain(stored, subject), activations_at(ADDED, stored, subject))
    found = measured(stored, write_sae(tmp_path / "wrong", tensors, **as_transcoder()), subject)
    assert "it fits with input without the norm's gain" in found.blocks()


def test_a_transcoder_trained_with_the_norms_gain_and_read_without_it_is_named(stored, subject, tmp_path):
    """As a Gemma Scope 2 transcoder is that is taken for one of Gemma Scope 1."""
    tensors = skip_transcoder(activations_at(NORMED, stored, subject), activations_at(ADDED, stored, subject))
    dictionary = open_dictionary(entry_of(write_sae(tmp_path / "right", tensors, **as_transcoder())))
    misread = replace(dictionary, sites_in=(Site(LAYER, "pre_feedforward_layernorm", "input", "rms_norm"),))
    specified, *others = try_alternatives(misread, probe_of(stored), subject)
    best = min(others, key=lambda fit: fit.fvu)
    assert best.name == "input with the norm's gain" and best.fvu < 0.7 * specified.fvu


def test_a_first_token_that_is_not_masked_is_blocked_and_named(stored, subject, trained, monkeypatch):
    """As with a tokenizer that does not say that its BOS is special."""
    monkeypatch.setattr(type(subject.tokenizer), "all_special_ids", property(lambda _: []))
    blocked = measured(stored, trained, subject).blocks()
    assert "it fits with the first token of each context left out" in blocked


def test_an_l0_far_from_the_releases_own_is_blocked_though_nothing_explains_it(stored, subject, tmp_path):
    tensors = principal_directions(activations_at(STREAM, stored, subject), 40)
    found = measured(
        stored, write_sae(tmp_path / "sae", tensors, hf_hook_point_in=STREAM, hf_hook_point_out=STREAM, l0=400), subject
    )
    assert "L0 40.0 is off the release's own target of 400 by more than 3x; no alternative tried fits better" in found.blocks()


def test_the_attention_output_as_a_transcoder_is_exact_because_it_is_linear(stored, subject, tmp_path):
    """The output projection itself, both signs of every input: the one module whose transcoder is known exactly."""
    weight = subject.model.model.layers[LAYER].self_attn.o_proj.weight.detach()  # [640, 1024]
    norms = weight.norm(dim=0)
    directions = torch.diag(norms)
    rows = (weight / norms).T
    tensors = {
        "w_enc": torch.cat([directions, -directions], dim=1),
        "b_enc": torch.zeros(2048),
        "threshold": torch.zeros(2048),
        "w_dec": torch.cat([rows, -rows]),
        "b_dec": torch.zeros(640),
    }
    hooks = {
        "hf_hook_point_in": f"model.layers.{LAYER}.self_attn.o_proj.input",
        "hf_hook_point_out": f"model.layers.{LAYER}.self_attn.o_proj.output",
    }
    found = measured(stored, write_sae(tmp_path / "exact", tensors, type="transcoder", l0=1024, **hooks), subject)
    assert found.fvu < 1e-6 and abs(found.loss_added) < 1e-3 and found.blocks() is None


def probe_of(stored: Stored):
    return splicing.fixed_contexts(stored.corpus, 1024)


def test_bf16_flips_are_counted_as_those_of_a_dense_encoder(stored, subject, residual):
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, (1,))))
    w_enc = torch.nn.functional.normalize(torch.randn(640, 256, generator=generator), dim=0)  # of which about 60 flip
    layer = LayerWeights(w_enc, torch.zeros(256), w_enc.T[:, None].contiguous(), torch.full((256,), 20.0))
    site = Site(1, "", "output")
    dictionary = SparseDictionary("sae", (site,), (site,), "", (layer,), torch.zeros(1, 640), Activation("jumprelu"))
    x = _text_activations(stored, subject)
    exact = x @ w_enc > 20.0
    coarse = x.bfloat16().float() @ w_enc.bfloat16().float() > 20.0
    expected = float((exact != coarse).sum() / exact.sum())
    assert expected > 0 and bf16_flips(dictionary, probe_of(stored), subject) == pytest.approx(expected, rel=0.05)


def _text_activations(stored: Stored, subject: SubjectModel) -> torch.Tensor:
    from scopeatlas.subject.capture import capture

    tokens = probe_of(stored).tokens
    site = Site(1, "", "output")
    acts = capture(subject.model, torch.tensor(tokens).long(), [site])[site]
    return acts[torch.from_numpy(text_mask(tokens, subject))]
