import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.mining import promoted
from scopeatlas.mining.promoted import TOKENS, promoted_tokens
from scopeatlas.subject.capture import capture, editing
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site, parse_hook_point

SIZES = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def with_rows(dictionary: SparseDictionary, rows: torch.Tensor) -> SparseDictionary:
    """The dictionary with these decoder rows [F, 1, d_out] in place of its own."""
    layer = dictionary.layers[0]
    return replace(dictionary, layers=(LayerWeights(layer.w_enc[:, : len(rows)], layer.b_enc[: len(rows)], rows),))


def logit_effects(rows: torch.Tensor, subject, at: torch.Tensor) -> torch.Tensor:
    """How the logits move when a row is added to the final residual `at`, the norm's scale held: [F, vocabulary]."""
    norm, head = subject.model.model.norm, subject.model.lm_head

    def size(x):
        return x.square().mean(-1, keepdim=True).sqrt()

    with torch.no_grad():
        return head(norm(at + rows) * size(at + rows) / size(at)) - head(norm(at))


def readable(token: str, subject) -> bool:
    return not token.startswith("<unused") and token not in subject.tokenizer.all_special_tokens


def test_promoted_and_suppressed_tokens_are_those_whose_logits_move_most(small, subject):
    dictionary = open_dictionary(small.entry)
    found = promoted_tokens(dictionary, subject)
    at = torch.randn(640) * 50
    effects = logit_effects(dictionary.layers[0].w_dec[:8, 0] * 5, subject, at).double()
    strings = subject.tokenizer.convert_ids_to_tokens(list(range(len(subject.tokenizer))))
    allowed = torch.tensor([i for i, s in enumerate(strings) if readable(s, subject)])
    for feature in range(8):
        effect = effects[feature]
        for ids, sign in ((found.promoted[feature], 1), (found.suppressed[feature], -1)):
            cutoff = (sign * effect[allowed]).topk(TOKENS).values[-1]
            assert (sign * effect[ids] >= cutoff - 0.02 * cutoff.abs()).all()
            assert (np.diff(sign * effect[ids].numpy()) <= 0.02 * float(cutoff.abs())).all()
        z = (effect[found.promoted[feature]] - effect.mean()) / effect.std()
        assert np.allclose(found.strength[feature], z.numpy(), rtol=0.02)


def test_special_and_unused_tokens_are_never_promoted(small, subject):
    found = promoted_tokens(open_dictionary(small.entry), subject)
    shown = subject.tokenizer.convert_ids_to_tokens(np.unique(np.r_[found.promoted, found.suppressed]).tolist())
    assert all(readable(token, subject) for token in shown)


def test_the_row_of_a_token_promotes_that_token(small, subject):
    dictionary = open_dictionary(small.entry)
    gain = 1 + subject.model.model.norm.weight
    ids = subject.tokenizer.convert_tokens_to_ids(["▁January", "▁water", "▁Paris"])
    rows = subject.model.lm_head.weight[ids] / gain
    planted = with_rows(dictionary, torch.nn.functional.normalize(rows, dim=1)[:, None])
    assert promoted_tokens(planted, subject).promoted[:, 0].tolist() == ids


def test_feature_tiles_change_nothing(small, subject, monkeypatch):
    dictionary = open_dictionary(small.entry)
    whole = promoted_tokens(dictionary, subject)
    monkeypatch.setattr(promoted, "TILE_FEATURES", 37)
    tiled = promoted_tokens(dictionary, subject)
    assert (whole.promoted == tiled.promoted).mean() > 0.999 and np.allclose(whole.strength, tiled.strength, rtol=1e-4)


def test_a_dictionary_that_does_not_write_to_the_residual_stream_promotes_nothing(small, subject):
    dictionary = open_dictionary(small.entry)
    narrow = replace(dictionary, layers=with_rows(dictionary, torch.randn(96, 1, 1024)).layers, b_dec=torch.zeros(1, 1024))
    assert promoted_tokens(narrow, subject) is None
    inside = replace(dictionary, sites_out=(parse_hook_point("model.layers.1.pre_feedforward_layernorm.output"),))
    assert promoted_tokens(inside, subject) is None


def test_a_row_of_zeros_promotes_nothing(small, subject):
    silent = promoted_tokens(with_rows(open_dictionary(small.entry), torch.zeros(4, 1, 640)), subject)
    assert (silent.strength == 0).all()


def test_a_clt_writes_the_sum_over_its_output_layers_and_a_crosscoder_its_last(small, subject, rng):
    torch.manual_seed(int(rng.integers(2**32)))
    rows = torch.randn(12, 3, 640)
    residual = open_dictionary(small.entry)
    for kind, module, one in (("clt", "post_feedforward_layernorm", rows.sum(1)), ("crosscoder", "", rows[:, -1])):
        sites = tuple(Site(layer, module, "output") for layer in (0, 4, 9))
        halves = [LayerWeights(torch.zeros(640, 6), torch.zeros(6), half) for half in rows.split(6)]
        layers = LazyLayers(lambda i, halves=halves: halves[i], 2)
        several = replace(residual, kind=kind, sites_in=sites[:2], sites_out=sites, layers=layers, b_dec=torch.zeros(3, 640))
        found, expected = (promoted_tokens(d, subject) for d in (several, with_rows(residual, one[:, None])))
        assert (found.promoted == expected.promoted).all() and np.allclose(found.strength, expected.strength, rtol=1e-4)


def test_what_a_norm_reads_and_the_embedding_are_the_stream_itself(small, subject):
    residual = with_rows(open_dictionary(small.entry), torch.randn(4, 1, 640))
    expected = promoted_tokens(residual, subject)
    for hook in ("blocks.3.hook_resid_mid", "blocks.3.hook_resid_pre", "model.layers.3.input_layernorm.input", "hook_embed"):
        found = promoted_tokens(replace(residual, sites_out=(parse_hook_point(hook),)), subject)
        assert (found.promoted == expected.promoted).all()


TINY = {
    "gemma3": Gemma3TextConfig(head_dim=16, num_key_value_heads=1, **SIZES),
    "llama": LlamaConfig(num_key_value_heads=1, **SIZES),
    "gpt2": GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2, activation_function="relu"),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
WRITING = [
    ("gemma3", "model.layers.1.self_attn.o_proj.input"),
    ("gemma3", "model.layers.1.self_attn.output"),
    ("gemma3", "model.layers.1.post_attention_layernorm.output"),
    ("gemma3", "model.layers.1.mlp.down_proj.input"),
    ("gemma3", "model.layers.1.post_feedforward_layernorm.output"),
    ("gemma3", "blocks.1.hook_mlp_out"),
    ("llama", "blocks.1.attn.hook_z"),
    ("llama", "blocks.1.hook_attn_out"),
    ("llama", "model.layers.1.mlp.output"),
    ("gpt2", "blocks.1.attn.hook_z"),
    ("gpt2", "blocks.1.mlp.hook_post"),
    ("gpt2", "blocks.1.hook_resid_post"),
    ("gpt_neox", "blocks.1.attn.hook_z"),
    ("gpt_neox", "blocks.1.hook_attn_out"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random model of an architecture, saved and loaded as any subject model is, its MLP in the last layer off."""

    def make(name: str, *, mlp: bool) -> SubjectModel:
        folder = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(TINY[name])
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3 + (1 if parameter.ndim == 1 else 0)
        if not mlp:
            last = [w for n, w in model.named_parameters() if re.search(r"\.1\.mlp\.(down_proj|c_proj|dense_4h_to_h)\.", n)]
            for parameter in last:
                parameter.data.zero_()
        model.save_pretrained(folder)
        words = Tokenizer(WordLevel({f"word{i}": i for i in range(200)}, unk_token="word0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0").save_pretrained(folder)
        return SubjectModel(str(folder), device="cpu")

    return make


@contextmanager
def norms_held(model, tokens):
    """What each norm divides by stays what it is on `tokens`, whatever is added to its input."""

    def size(norm, x):
        return (
            x.std(-1, keepdim=True, unbiased=False)
            if isinstance(norm, torch.nn.LayerNorm)
            else x.square().mean(-1, keepdim=True).sqrt()
        )

    norms = [m for n, m in model.named_modules() if re.search(r"(norm|ln_f|ln_\d)$", n)]
    clean = {}
    handles = [m.register_forward_hook(lambda m, args, _: clean.update({m: size(m, args[0])})) for m in norms]
    model(tokens)
    for handle in handles:
        handle.remove()

    def hold(norm, args, out):
        bias = norm.bias if isinstance(norm, torch.nn.LayerNorm) else 0
        return (out - bias) * size(norm, args[0]).clamp(min=1e-9) / clean[norm].clamp(min=1e-9) + bias

    handles = [m.register_forward_hook(hold) for m in norms]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("name", "hook"), WRITING)
def test_steering_at_any_site_moves_the_logits_as_promoted_tokens_say(tiny, rng, name, hook):
    torch.manual_seed(int(rng.integers(2**32)))
    is_of_mlp = "mlp" in hook or "feedforward" in hook
    subject = tiny(name, mlp=is_of_mlp)
    model, site, tokens = subject.model, parse_hook_point(hook), torch.tensor([[3, 14, 15, 92, 65]])
    d = capture(model, tokens, [site])[site].shape[-1]
    rows = torch.randn(5, d)
    layer = LayerWeights(torch.zeros(d, 5), torch.zeros(5), rows[:, None])
    sae = SparseDictionary("sae", (site,), (site,), "", (layer,), torch.zeros(1, d), Activation("relu"))
    found = promoted_tokens(sae, subject)
    with torch.no_grad(), norms_held(model, tokens):
        clean = model(tokens).logits[0, -1]
        for feature, row in enumerate(rows):
            with editing(model, site, lambda acts, row=row: acts + row):
                effect = model(tokens).logits[0, -1] - clean
            z = (effect - effect.mean()) / effect.std()
            said = torch.from_numpy(np.concatenate([found.promoted[feature], found.suppressed[feature]]))
            ordered = z[1:].sort().values  # word 0 is a special token
            assert torch.allclose(z[said], torch.cat([ordered.flip(0)[:TOKENS], ordered[:TOKENS]]), rtol=1e-2, atol=1e-2)
            assert np.allclose(found.strength[feature], z[found.promoted[feature]], rtol=1e-2, atol=1e-2)
