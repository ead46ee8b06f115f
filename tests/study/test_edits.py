"""Edits inside tiny models in float64, against hooks by hand."""

import numpy as np
import pytest
import torch

from scopeatlas.errors import AtlasError, ConfigError, SubjectModelError
from scopeatlas.study.edits import Edit, Editor, edits_of, feature_id
from scopeatlas.subject.capture import next_token_logits
from tests.study.tiny_opened import WIDTH, tiny_opened


def prompt_of(rng) -> np.ndarray:
    """BOS and ten bytes."""
    return np.concatenate([[257], rng.integers(0, 256, 10)])


def logits(opened, ids: np.ndarray, hooks: dict | None = None) -> torch.Tensor:
    """Next-token logits, with functions of hidden states [t, d] put in place of the outputs of modules."""

    def put(function):
        def hook(_module, _args, out):
            acts = (out[0] if isinstance(out, tuple) else out).clone()
            acts[0] = function(acts[0])
            return (acts, *out[1:]) if isinstance(out, tuple) else acts

        return hook

    handles = [module.register_forward_hook(put(function)) for module, function in (hooks or {}).items()]
    with torch.no_grad():
        found = opened.subject.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return found


def edited(opened, ids: np.ndarray, edits: list[Edit], mask: np.ndarray, **arguments) -> torch.Tensor:
    with torch.no_grad(), Editor(opened.dictionary, opened.subject.model, edits, **arguments).over(mask):
        return next_token_logits(opened.subject.model, torch.from_numpy(ids))


def dense(dictionary, layer: int, x: torch.Tensor) -> torch.Tensor:
    """JumpReLU activations of one encoder layer, float64 [t, WIDTH]."""
    weights = dictionary.layers[layer]
    pre = x.double() @ weights.w_enc.double() + weights.b_enc.double()
    return torch.where(pre > weights.threshold.double(), pre, 0.0)


def active(opened, ids: np.ndarray, mask: np.ndarray, count: int) -> list[int]:
    """The features of the first encoder layer that fire on most of the tokens in the mask."""
    layer = opened.subject.model.model.layers[opened.dictionary.sites_in[0].layer]
    kept = []
    handle = layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    logits(opened, ids)
    handle.remove()
    fires = dense(opened.dictionary, 0, kept[0][0][mask]) > 0
    return fires.sum(0).argsort(descending=True)[:count].tolist()


def same_effect(found: torch.Tensor, expected: torch.Tensor, clean: torch.Tensor) -> bool:
    """Whether two edits move the clean logits, and alike to a hundredth of the largest move."""
    move = float((expected - clean).abs().max())
    return move > 0 and float((found - expected).abs().max()) < 0.01 * move


TEXT = np.arange(11) > 0
CHANGES = {
    "ablate": lambda a, v: 0 * a,
    "set": lambda a, v: 0 * a + v,
    "scale": lambda a, v: a * v,
    "add": lambda a, v: a + v,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_edit_adds_the_change_in_activation_times_the_decoder_row_and_keeps_the_rest(rng, change):
    opened = tiny_opened(rng)
    ids, mask = prompt_of(rng), TEXT & (rng.random(11) < 0.7)
    mask[-2:] = True  # the last layer looks back at few tokens
    value = float(rng.uniform(0.5, 3))
    features = active(opened, ids, mask, 2)
    edits = [Edit(feature, change, value) for feature in features]
    block = opened.subject.model.model.layers[1]

    def by_hand(x):
        a = dense(opened.dictionary, 0, x)[:, features]
        difference = (CHANGES[change](a, value) - a) @ opened.dictionary.layers[0].w_dec[features, 0].double()
        return torch.where(torch.from_numpy(mask)[:, None], x + difference, x)

    clean, expected = logits(opened, ids), logits(opened, ids, {block: by_hand})
    assert same_effect(edited(opened, ids, edits, mask), expected, clean)


@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "llama", "gpt2", "neox", "qwen3", "gemma3-vision"])
def test_an_edit_that_changes_nothing_leaves_every_bit(rng, architecture):
    opened = tiny_opened(rng, architecture=architecture)
    ids = prompt_of(rng)
    ids[0] = 2
    changes = [Edit(1, "scale", 1.0), Edit(2, "add", 0.0)]
    assert torch.equal(edited(opened, ids, changes, TEXT), logits(opened, ids))
    assert not torch.equal(edited(opened, ids, [Edit(2, "add", 1.0)], TEXT), logits(opened, ids))


def test_a_reconstruction_put_in_place_gives_something_else_so_the_error_is_kept(rng):
    opened = tiny_opened(rng)
    ids = prompt_of(rng)
    feature = active(opened, ids, TEXT, 1)[0]

    def reconstructed(x):
        a = dense(opened.dictionary, 0, x)
        a[:, feature] = 0
        y = a @ opened.dictionary.layers[0].w_dec[:, 0].double() + opened.dictionary.b_dec.double()
        return torch.where(torch.from_numpy(TEXT)[:, None], y, x)

    without_error = logits(opened, ids, {opened.subject.model.model.layers[1]: reconstructed})
    assert not torch.allclose(edited(opened, ids, [Edit(feature)], TEXT), without_error, atol=1e-2)


def test_a_transcoder_is_read_before_its_module_and_edited_after_it(rng):
    opened = tiny_opened(rng, kind="transcoder")
    ids, value = prompt_of(rng), 2.0
    layer = opened.subject.model.model.layers[1]
    seen = []
    handle = layer.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits(opened, ids)
    handle.remove()
    a = dense(opened.dictionary, 0, seen[0][0])
    feature = int((a[1:] > 0).sum(0).argmax())
    row = opened.dictionary.layers[0].w_dec[feature, 0].double()
    by_hand = {layer.post_feedforward_layernorm: lambda y: torch.cat([y[:1], y[1:] - a[1:, feature, None] * row])}
    expected = logits(opened, ids, by_hand)
    assert same_effect(edited(opened, ids, [Edit(feature)], TEXT), expected, logits(opened, ids))
    steered = edited(opened, ids, [Edit(feature, "add", value)], TEXT)
    by_hand = {layer.post_feedforward_layernorm: lambda y: torch.cat([y[:1], y[1:] + value * row])}
    assert same_effect(steered, logits(opened, ids, by_hand), logits(opened, ids))


def test_a_clt_is_edited_at_every_output_from_its_layer_on_and_a_crosscoder_at_the_last(rng):
    ids, value = prompt_of(rng), 1.5
    opened = tiny_opened(rng, kind="clt")
    layers = opened.subject.model.model.layers
    added = {}
    for feature, norms in ((3, layers[:2]), (WIDTH + 3, layers[1:2])):
        rows = opened.dictionary.layers[feature // WIDTH].w_dec[feature % WIDTH].double() * value
        added[feature] = {norm.post_feedforward_layernorm: row for norm, row in zip(norms, rows, strict=True)}
    both: dict = {}
    for part in added.values():
        for module, row in part.items():
            both[module] = both.get(module, 0) + row
    by_hand = {module: lambda y, row=row: torch.cat([y[:1], y[1:] + row]) for module, row in both.items()}
    found = edited(opened, ids, [Edit(WIDTH + 3, "add", value), Edit(3, "add", value)], TEXT)
    assert same_effect(found, logits(opened, ids, by_hand), logits(opened, ids))
    opened = tiny_opened(rng, kind="crosscoder")
    layers, row = opened.subject.model.model.layers, opened.dictionary.layers[0].w_dec[3, 1].double() * value
    by_hand = {layers[1]: lambda x: torch.cat([x[:1], x[1:] + row])}
    found = edited(opened, ids, [Edit(3, "add", value)], TEXT)
    assert same_effect(found, logits(opened, ids, by_hand), logits(opened, ids))


@pytest.mark.parametrize("norm", ["token_norm", "layer_norm"])
def test_what_is_written_is_scaled_back_by_the_input_norm_as_decoding_does(rng, norm):
    opened = tiny_opened(rng, norm=norm)
    ids = prompt_of(rng)
    dictionary = opened.dictionary

    def by_hand(x):
        acts = dictionary.encode(x.float())
        kept = acts.feature != feature
        without = type(acts)(acts.token[kept], acts.feature[kept], acts.value[kept], acts.tokens)
        difference = dictionary.decode(without, x.float()) - dictionary.decode(acts, x.float())
        return torch.cat([x[:1], x[1:] + difference[1:].double()])

    block, seen = opened.subject.model.model.layers[1], []
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    clean = logits(opened, ids)
    handle.remove()
    feature = int(torch.bincount(dictionary.encode(seen[0][0, 1:].float()).feature).argmax())
    found = edited(opened, ids, [Edit(feature)], TEXT)
    assert same_effect(found, logits(opened, ids, {block: by_hand}), clean)


def test_the_report_counts_what_was_edited_and_says_the_means(rng):
    opened = tiny_opened(rng)
    ids, mask = prompt_of(rng), np.arange(11) > 4
    block, seen = opened.subject.model.model.layers[1], []
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    logits(opened, ids)
    handle.remove()
    a = dense(opened.dictionary, 0, seen[0][0][mask]).numpy()
    first, second = (int(i) for i in a.sum(0).argsort()[-2:])
    editor = Editor(opened.dictionary, opened.subject.model, [Edit(second, "scale", 3.0), Edit(first)])
    for part in (mask, mask, ~mask & False):
        with torch.no_grad(), editor.over(part):
            next_token_logits(opened.subject.model, torch.from_numpy(ids))
    report = editor.report(opened)
    assert report.select("feature", "change", "tokens").rows() == [(second, "scale", 12), (first, "ablate", 12)]
    assert report["fired"].to_list() == [2 * int((a[:, i] > 0).sum()) for i in (second, first)]
    assert report["before"].to_list() == pytest.approx([a[:, i].mean() for i in (second, first)], rel=1e-5)
    assert report["after"].to_list() == pytest.approx([3 * a[:, second].mean(), 0.0], rel=1e-5)


def test_a_site_that_forgets_its_norm_and_one_computed_too_early_are_errors(rng):
    from dataclasses import replace

    from scopeatlas.subject.sites import parse_hook_point

    opened = tiny_opened(rng)
    ids = prompt_of(rng)
    normed = replace(opened.dictionary, sites_out=(parse_hook_point("model.layers.1.mlp.input.rms_norm"),))
    early = replace(opened.dictionary, sites_out=(parse_hook_point("model.layers.0.output"),))
    for dictionary, words in ((normed, "read but not edited"), (early, "computed before")):
        vars(opened)["dictionary"] = dictionary
        with pytest.raises(SubjectModelError, match=words):
            edited(opened, ids, [Edit(1, "add", 1.0)], TEXT)


def test_features_are_named_by_id_or_by_layer_and_steered_in_units_of_their_greatest_activation(rng):
    opened = tiny_opened(rng, kind="clt")
    assert feature_id(opened, "1.3") == WIDTH + 3 == feature_id(opened, WIDTH + 3)
    found = edits_of(opened, ablate=[1], steer={"1.3": 2.0}, edits=[Edit(5, "set", 7.0)])
    assert found == (Edit(1), Edit(WIDTH + 3, "add", 2 * ((WIDTH + 3) / 10 + 1)), Edit(5, "set", 7.0))
    for name in (2 * WIDTH, "2.0", "x", -1, "1.3.4"):
        with pytest.raises(AtlasError, match="has no feature"):
            feature_id(opened, name)
    with pytest.raises(ConfigError, match="never fired"):
        edits_of(opened, steer={0: 1.0})
    for asked in ({}, {"ablate": [1, "0.1"]}):
        with pytest.raises(ConfigError, match="edited once"):
            edits_of(opened, **asked)
    with pytest.raises(ConfigError, match="no edit is called"):
        Edit(1, "remove")  # type: ignore[arg-type]
