"""Every site of every supported architecture, against forward passes written out by hand (`by_hand.py`)."""

from functools import partial

import pytest
import torch

from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.capture import capture, editing, run_model
from scopeatlas.subject.sites import EMBEDDING, Site, parse_hook_point, resolve, site_variants
from tests.subject import by_hand
from tests.tiny_models import (
    LAYERS,
    TINY_MODELS,
    tiny_gemma2,
    tiny_gemma3,
    tiny_gemma3_with_vision,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
)

# The model, where in it the base model's weights lie, and its forward pass written out.
ARCHITECTURES = {
    "gemma2": (tiny_gemma2, "model.", partial(by_hand.gemma, version=2)),
    "gemma3": (tiny_gemma3, "model.", partial(by_hand.gemma, version=3)),
    "gemma3-vision": (tiny_gemma3_with_vision, "model.language_model.", partial(by_hand.gemma, version=3)),
    "llama": (tiny_llama, "model.", by_hand.llama),
    "qwen2": (TINY_MODELS["qwen2"], "model.", by_hand.llama),
    "qwen3": (TINY_MODELS["qwen3"], "model.", partial(by_hand.llama, head_norms=True)),
    "gpt2": (tiny_gpt2, "transformer.", by_hand.gpt2),
    "neox": (tiny_neox, "gpt_neox.", by_hand.neox),
    "neox-sequential": (partial(tiny_neox, parallel=False), "gpt_neox.", partial(by_hand.neox, parallel=False)),
}


@pytest.fixture
def seed(rng) -> int:
    return int(rng.integers(1 << 31))


@pytest.fixture
def tokens(rng) -> torch.Tensor:
    """Two sequences of 12 and 7 ordinary tokens: int64 [2, 12], the second padded with -1."""
    tokens = torch.from_numpy(rng.integers(0, 256, (2, 12)))
    tokens[1, 7:] = -1
    return tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_site_is_the_tensor_that_the_architecture_defines(name, seed, tokens):
    make, prefix, forward = ARCHITECTURES[name]
    model = make(seed)
    weights = by_hand.weights_of(model, prefix)
    expected = [forward(weights, row[row >= 0]) for row in tokens]
    sites = {text: parse_hook_point(text) for text in expected[0]}
    captured = capture(model, tokens, sites.values())
    assert len(sites) > 40
    for text, site in sites.items():
        for row, sequence in zip(expected, captured[site], strict=True):
            torch.testing.assert_close(
                sequence[: len(row[text])].double(), row[text], rtol=1e-4, atol=1e-4, msg=lambda m, at=text: f"{at}: {m}"
            )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_unknown_site_is_an_error_that_lists_sites_the_model_has(name, seed):
    model = TINY_MODELS[name](seed)
    with pytest.raises(SubjectModelError, match="no site model.layers.1.nowhere.output: ") as caught:
        resolve(model, Site(1, "nowhere", "output"))
    message = str(caught.value)
    modules = message.partition("with the modules ")[2].partition(", and blocks.N. with ")[0].split(", ")
    lens = message.rpartition("blocks.N. with ")[2].split(", ")
    assert len(modules) > 8 and len(lens) > 8
    for site in (*(f"model.layers.2.{m}.output" for m in modules), *(f"blocks.2.{n}" for n in lens), "model.embed_tokens.output"):
        resolve(model, parse_hook_point(site))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_layer_past_the_last_is_an_error_that_says_how_many_there_are(name, seed):
    model = TINY_MODELS[name](seed)
    for site in (f"model.layers.{LAYERS}.output", f"blocks.{LAYERS}.hook_mlp_out"):
        with pytest.raises(SubjectModelError, match=rf"no site {site}: .* has layers 0 to {LAYERS - 1}"):
            resolve(model, parse_hook_point(site))


def test_nothing_lies_between_attention_and_mlp_where_they_run_in_parallel(seed):
    with pytest.raises(SubjectModelError, match="GPTNeoXForCausalLM adds attention and MLP to the residual stream in parallel"):
        resolve(tiny_neox(seed), parse_hook_point("blocks.1.hook_resid_mid"))


def test_the_vision_tower_is_never_matched(seed):
    model = tiny_gemma3_with_vision(seed)
    names = {module: name for name, module in model.named_modules()}
    for layer in range(LAYERS):
        for module in ("", "mlp", "self_attn", "self_attn.o_proj"):
            assert names[resolve(model, Site(layer, module, "output"))[0]].startswith(f"model.language_model.layers.{layer}")
    assert names[resolve(model, Site(EMBEDDING, "", "output"))[0]] == "model.language_model.embed_tokens"
    with pytest.raises(
        SubjectModelError, match="no site model.layers.0.mlp.fc1.output"
    ):  # SigLIP calls its MLP's first matrix fc1
        resolve(model, Site(0, "mlp.fc1", "output"))


def test_the_norm_without_gain_is_refused_by_models_with_another_norm(seed, tokens):
    for model in (tiny_gpt2(seed), tiny_neox(seed)):
        with pytest.raises(SubjectModelError, match="has no RMS norms"):
            capture(model, tokens, [parse_hook_point("blocks.1.ln2.hook_normalized")])


def test_the_embeddings_scale_is_refused_by_models_without_one(seed, tokens):
    with pytest.raises(SubjectModelError, match="LlamaForCausalLM scales no embedding"):
        capture(tiny_llama(seed), tokens, [parse_hook_point("model.embed_tokens.output.unscaled")])


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("site", ["blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "hook_embed"])
def test_an_edit_replaces_what_the_rest_of_the_model_reads(name, site, seed, tokens):
    model, site, later = TINY_MODELS[name](seed), parse_hook_point(site), parse_hook_point("blocks.2.hook_resid_post")
    clean = capture(model, tokens, [site, later])
    replacement = torch.randn_like(clean[site])
    with editing(model, site, lambda acts: replacement if torch.equal(acts, clean[site]) else acts * torch.nan):
        edited = capture(model, tokens, [site, later])
    assert torch.equal(edited[site], replacement)
    assert (edited[later] - clean[later])[tokens >= 0].abs().mean() > 0.01


def test_an_edit_of_the_unscaled_embedding_is_scaled_on_its_way_back(seed, tokens):
    model = tiny_gemma2(seed)
    site, scaled = (parse_hook_point(f"model.embed_tokens.output{end}") for end in (".unscaled", ""))
    clean = capture(model, tokens, [site, scaled])
    other = torch.randn_like(clean[site])
    with editing(model, site, lambda acts: acts + other):
        edited = capture(model, tokens, [site, scaled])
    torch.testing.assert_close(edited[site], clean[site] + other)
    torch.testing.assert_close(edited[scaled], clean[scaled] + other * 32**0.5)


def test_an_edit_of_a_normalised_tensor_is_refused(seed):
    site = parse_hook_point("blocks.1.ln2.hook_normalized")
    with pytest.raises(SubjectModelError, match="ln2.input.rms_norm can be read but not edited"):
        with editing(tiny_gemma2(seed), site, lambda acts: acts):
            pass


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_variant_given_for_a_model_can_be_captured_and_differs(name, seed, tokens):
    model = TINY_MODELS[name](seed)
    for text in (
        "blocks.0.hook_resid_post",
        "blocks.1.hook_mlp_in",
        "blocks.2.hook_mlp_out",
        "blocks.1.mlp.hook_in",
        "hook_embed",
    ):
        site = parse_hook_point(text)
        variants = site_variants(site, model)
        captured = capture(model, tokens, [site, *(variant for _, variant in variants)])
        for _, variant in variants:
            assert (captured[variant] - captured[site])[tokens >= 0].abs().max() > 0.01


def test_bfloat16_models_give_transformed_sites_in_float32(seed, tokens):
    model = tiny_gemma3(seed).bfloat16()
    raw, bare = (parse_hook_point(f"model.layers.1.pre_feedforward_layernorm.input{end}") for end in ("", ".rms_norm"))
    scaled, unscaled = (parse_hook_point(f"model.embed_tokens.output{end}") for end in ("", ".unscaled"))
    seen = capture(model, tokens, [raw, bare, scaled, unscaled])
    assert seen[raw].dtype == torch.bfloat16 and seen[bare].dtype == torch.float32
    torch.testing.assert_close(seen[bare].double(), by_hand.bare_rms_norm(seen[raw].double()), rtol=1e-5, atol=1e-5)
    weights = model.model.embed_tokens.weight[tokens.clamp(min=0)].float()
    torch.testing.assert_close(seen[unscaled], weights, rtol=2**-8, atol=0)  # one rounding to bfloat16 lies between


def test_the_whole_model_runs_with_its_wrapper(seed, tokens):
    logits = run_model(tiny_gemma3_with_vision(seed), tokens, logits=True)
    assert logits.shape == (2, 12, 300) and logits.isfinite().all()
