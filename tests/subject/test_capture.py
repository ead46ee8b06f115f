import numpy as np
import pytest
import torch

from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.capture import adding, batches, capture, counting_passes, editing, run_model
from scopeatlas.subject.sites import Site, parse_hook_point, resolve
from tests.tiny_models import VOCABULARY, tiny_gemma2


@pytest.fixture(scope="module")
def tokens(medium_corpus) -> torch.Tensor:
    """Four real contexts, the first cut short: int64 [4, 64]."""
    tokens = torch.tensor(medium_corpus.corpus.contexts(medium_corpus.corpus.shards[0]).tokens[:4]).long()
    tokens[0, 40:] = -1
    return tokens


@pytest.fixture(scope="module")
def hidden_states(tokens, subject):
    """What transformers itself reports: the embedding, then each layer's output."""
    with torch.no_grad():
        return subject.model(
            input_ids=tokens.clamp(min=0), attention_mask=(tokens >= 0).long(), output_hidden_states=True, use_cache=False
        ).hidden_states


def test_a_layers_output_is_the_hidden_state_that_transformers_reports(tokens, subject, hidden_states):
    layers = (0, 1, 9, 16)  # transformers reports the last layer's after the final norm
    seen = capture(subject.model, tokens, [Site(layer, "", "output") for layer in layers])
    for layer in layers:
        assert torch.equal(seen[Site(layer, "", "output")][tokens >= 0], hidden_states[layer + 1][tokens >= 0])


def test_a_layers_input_is_the_output_of_the_one_before(tokens, subject, hidden_states):
    seen = capture(subject.model, tokens, [Site(2, "", "input")])
    assert torch.equal(seen[Site(2, "", "input")], hidden_states[2])


def test_padding_does_not_change_what_is_captured(tokens, subject):
    site = Site(2, "", "output")
    alone = capture(subject.model, tokens[:1, :40], [site])[site]
    padded = capture(subject.model, tokens, [site])[site][:1, :40]
    assert torch.allclose(alone, padded, rtol=1e-3, atol=1e-2)


def test_the_pass_stops_after_the_last_site(tokens, subject):
    ran = []
    layers = subject.model.model.layers
    handles = [layers[i].register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i)) for i in range(len(layers))]
    handles.append(subject.model.lm_head.register_forward_hook(lambda _m, _a, _o: ran.append("head")))
    try:
        capture(subject.model, tokens, [Site(3, "mlp", "input"), Site(1, "", "output")])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2]


def test_no_hook_stays_behind(tokens, subject):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())

    before = hooks()
    with editing(subject.model, Site(1, "mlp", "input"), lambda acts: acts):
        capture(subject.model, tokens, [Site(1, "", "output"), Site(2, "self_attn", "input")])
    with pytest.raises(ZeroDivisionError), editing(subject.model, Site(1, "", "output"), lambda acts: acts):
        raise ZeroDivisionError
    assert hooks() == before


def test_the_input_of_o_proj_is_what_o_proj_multiplies(tokens, subject):
    before, after = Site(1, "self_attn.o_proj", "input"), Site(1, "self_attn.o_proj", "output")
    seen = capture(subject.model, tokens, [before, after])
    assert seen[before].shape == (4, 64, 1024)
    assert torch.allclose(
        seen[before] @ subject.model.model.layers[1].self_attn.o_proj.weight.T, seen[after], rtol=1e-4, atol=1e-4
    )


def test_the_output_of_a_norm_is_what_the_residual_stream_gains(tokens, subject):
    norm, into, out = (
        Site(2, "post_feedforward_layernorm", "output"),
        Site(2, "pre_feedforward_layernorm", "input"),
        Site(2, "", "output"),
    )
    seen = capture(subject.model, tokens, [norm, into, out])
    assert torch.allclose(seen[into] + seen[norm], seen[out], rtol=1e-5, atol=1e-3)


def test_the_input_of_attention_is_the_output_of_the_norm_before_it(tokens, subject):
    seen = capture(subject.model, tokens, [Site(1, "self_attn", "input"), Site(1, "input_layernorm", "output")])
    assert torch.equal(seen[Site(1, "self_attn", "input")], seen[Site(1, "input_layernorm", "output")])


def test_the_output_of_attention_is_that_of_o_proj(tokens, subject):
    seen = capture(subject.model, tokens, [Site(1, "self_attn", "output"), Site(1, "self_attn.o_proj", "output")])
    assert torch.equal(seen[Site(1, "self_attn", "output")], seen[Site(1, "self_attn.o_proj", "output")])


@pytest.mark.parametrize(
    "site",
    [
        Site(2, "", "output"),
        Site(3, "", "input"),
        Site(2, "self_attn", "output"),
        Site(2, "self_attn", "input"),
        Site(2, "mlp", "input"),
    ],
    ids=str,
)
def test_editing_replaces_the_activation_and_ends_with_its_block(tokens, subject, site):
    later = Site(3, "mlp", "input")
    clean = capture(subject.model, tokens, [site, later])
    replacement = torch.randn_like(clean[site])
    given = []

    def replace(acts):
        given.append(acts)
        return replacement

    with editing(subject.model, site, replace):
        edited = capture(subject.model, tokens, [later])
    assert torch.equal(given[0], clean[site])
    assert (edited[later] - clean[later]).abs().mean() > 0.01
    assert torch.equal(capture(subject.model, tokens, [later])[later], clean[later])


def test_replacing_a_layers_output_is_running_the_rest_from_there(tokens, subject, hidden_states):
    other = hidden_states[3].flip(-1)
    with editing(subject.model, Site(2, "", "output"), lambda _: other):
        after = capture(subject.model, tokens, [Site(3, "", "input")])[Site(3, "", "input")]
    assert torch.equal(after, other)


def test_an_edit_that_returns_its_input_changes_no_logit(tokens, subject):
    with torch.no_grad():
        clean = run_model(subject.model, tokens[:1], logits=True)
        with editing(subject.model, Site(2, "", "output"), lambda acts: acts):
            assert torch.equal(run_model(subject.model, tokens[:1], logits=True), clean)
    assert clean.dtype == torch.float32 and clean.shape[:2] == (1, 64)


SCALED, UNSCALED = (parse_hook_point(f"model.embed_tokens.output{end}") for end in ("", ".unscaled"))


@pytest.fixture
def tiny(rng):
    """A model whose embedding is scaled, and int64 [3, 16] of tokens for it."""
    return tiny_gemma2(int(rng.integers(1 << 31))), torch.from_numpy(rng.integers(0, VOCABULARY, (3, 16)))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)], ids=str)
def test_what_is_not_edited_at_a_scaled_site_stays_as_it_is(tiny, dtype, rtol):
    model, tokens = tiny[0].to(dtype), tiny[1]
    clean = torch.randn(3, 16, 32, dtype=dtype)  # not itself a product with the scale, which division undoes
    chosen = torch.zeros(tokens.shape, dtype=torch.bool)
    chosen[:, 3:7] = True
    added = torch.randn(clean.shape[-1], dtype=torch.promote_types(dtype, torch.float32))
    with editing(model, SCALED, lambda _: clean), editing(model, UNSCALED, adding(added, chosen)):
        edited = capture(model, tokens, [SCALED])[SCALED]
    assert edited.dtype == dtype and torch.equal(edited[~chosen], clean[~chosen])
    scale = float(model.get_input_embeddings().embed_scale)
    expected = clean[chosen].double() + added.double() * scale
    torch.testing.assert_close(edited[chosen].double(), expected, rtol=rtol, atol=10 * rtol)


def test_what_replaces_a_scaled_site_is_scaled_to_the_bit(tiny):
    model, tokens = tiny
    other = torch.randn(3, 16, 32)
    with editing(model, UNSCALED, lambda _: other):
        assert torch.equal(capture(model, tokens, [SCALED])[SCALED], other * float(model.get_input_embeddings().embed_scale))


def test_a_zero_added_at_a_scaled_site_has_its_gradient(tiny):
    model, tokens = tiny[0].double(), tiny[1]
    gradients = []
    for site in (SCALED, UNSCALED):
        zero = torch.zeros(32, dtype=torch.float64, requires_grad=True)
        with editing(model, site, lambda acts, zero=zero: acts + zero):
            gradients += torch.autograd.grad(run_model(model, tokens, logits=True)[..., 5].sum(), zero)
    torch.testing.assert_close(gradients[1], gradients[0] * float(model.get_input_embeddings().embed_scale))
    assert gradients[0].abs().max() > 1e-3


def test_sites_of_every_sort_come_from_one_pass(tokens, subject, hidden_states):
    texts = (
        "model.embed_tokens.output",
        "model.embed_tokens.output.unscaled",
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_mid",
        "blocks.2.attn.hook_z",
        "model.layers.2.pre_feedforward_layernorm.output",
        "model.layers.2.pre_feedforward_layernorm.input.rms_norm",
    )
    with counting_passes() as count:
        seen = {str(site): x for site, x in capture(subject.model, tokens, map(parse_hook_point, texts)).items()}
    assert count.passes == 1 and count.tokens == 40 + 3 * 64
    assert torch.equal(seen["model.embed_tokens.output"], hidden_states[0])
    norm = subject.model.model.layers[2].pre_feedforward_layernorm
    bare = seen["model.layers.2.pre_feedforward_layernorm.input.rms_norm"]
    torch.testing.assert_close(bare * (1 + norm.weight), seen["model.layers.2.pre_feedforward_layernorm.output"])
    assert torch.allclose(bare.square().mean(-1), torch.tensor(1.0), atol=1e-3)
    scale = seen["model.embed_tokens.output"] / seen["model.embed_tokens.output.unscaled"]
    assert scale.nanmean().item() == pytest.approx(640**0.5, rel=1e-3)


def test_passes_are_counted_while_asked_for_and_contexts_nest(tokens, subject):
    site = Site(0, "", "output")
    with counting_passes() as outer:
        capture(subject.model, tokens[:1], [site])
        with counting_passes() as inner:
            capture(subject.model, tokens[1:], [site])
        capture(subject.model, tokens[:1], [site])
    capture(subject.model, tokens, [site])
    assert (outer.passes, outer.tokens) == (3, 40 + 3 * 64 + 40)
    assert (inner.passes, inner.tokens) == (1, 3 * 64)


def test_an_unknown_module_is_an_error_that_lists_those_there_are(tokens, subject):
    with pytest.raises(
        SubjectModelError, match="no site model.layers.1.attn.output: .* with the modules self_attn, .*post_feedforward_layernorm"
    ):
        capture(subject.model, tokens, [Site(1, "attn", "output")])


def test_an_unknown_layer_is_an_error_that_says_how_many_there_are(subject):
    with pytest.raises(SubjectModelError, match="no site model.layers.18.output: .* has layers 0 to 17"):
        resolve(subject.model, parse_hook_point("model.layers.18.output"))


def test_batches_cover_every_row_once_and_depend_on_their_number_alone():
    covered = [list(range(10))[rows] for rows in batches(np.zeros((10, 3)), 4)]
    assert covered == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
