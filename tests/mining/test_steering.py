"""Steering the real model, against hooks and softmax by hand."""

import numpy as np
import pytest
import torch

from scopeatlas.dictionaries.releases import load_folder, open_dictionary
from scopeatlas.errors import SubjectModelError
from scopeatlas.mining.steering import auroc_of_tokens, raised_tokens, random_direction_changes, token_changes
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import REPOSITORY, entry_of, sae_tensors, write_sae
from tests.multi_layer import multi_layer_tensors, seen_at, write_multi_layer

DEMO = REPOSITORY / "demo" / "releases" / "scope-atlas-demo-gemma-3-270m" / "resid_post" / "layer_12_width_4k_l0_medium"


@pytest.fixture(scope="module")
def demo():
    return load_folder(DEMO)


@pytest.fixture(scope="module")
def prompts(small_corpus) -> np.ndarray:
    """Seven prompts of 12 tokens, two of them shorter: more than one batch."""
    tokens = small_corpus.corpus.contexts(small_corpus.corpus.shards[0]).tokens[:7, :12].copy()
    tokens[1, 8:], tokens[4, 5:] = -1, -1
    return tokens


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("scopeatlas.mining.steering.BATCH_TOKENS", 36)


def log_probabilities(subject, prompts: np.ndarray, added: dict[int, torch.Tensor], kind: str = "") -> np.ndarray:
    """Mean log-probabilities of each prompt, run alone, with rows added to the outputs of decoder layers (or their `kind`)."""
    means = []
    for prompt in prompts:
        ids = torch.tensor(prompt[prompt >= 0]).long()[None]

        def add(_m, _a, out, row=None):
            out = out.clone()
            out[:, 1:] += row
            return out

        blocks = [(subject.model.model.layers[layer], row) for layer, row in added.items()]
        handles = [
            (getattr(block, kind) if kind else block).register_forward_hook(lambda m, a, o, row=row: add(m, a, o, row))
            for block, row in blocks
        ]
        with torch.no_grad():
            logits = subject.model(input_ids=ids, use_cache=False).logits[0, 1:].double()
        for handle in handles:
            handle.remove()
        means.append(logits.log_softmax(1).mean(0).numpy())
    return np.stack(means)


def mean_norm(subject, prompts: np.ndarray, layer: int) -> float:
    """The mean norm of the residual stream after a layer, BOS left out."""
    norms = []
    for prompt in prompts:
        ids = torch.tensor(prompt[prompt >= 0]).long()[None]
        with torch.no_grad():
            hidden = subject.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
        norms += hidden[0, 1:].double().norm(dim=1).tolist()
    return float(np.mean(norms))


def test_a_steered_model_gives_what_hooks_and_a_softmax_by_hand_give(demo, subject, prompts, rng):
    features = rng.choice(demo.width, 2, replace=False).tolist()
    clean, norm = log_probabilities(subject, prompts, {}), mean_norm(subject, prompts, 12)
    for feature, change in zip(features, token_changes(demo, subject, prompts, features, scale=0.5), strict=True):
        row = torch.nn.functional.normalize(demo.steering_vector(feature), dim=0) * 0.5 * norm
        expected = log_probabilities(subject, prompts, {12: row}) - clean
        assert change.feature == feature and change.effects.dtype == np.float32
        assert np.allclose(change.effects, expected, atol=2e-3)


def test_a_random_direction_is_as_long_and_no_decoder_row_and_the_same_for_the_same_seed(demo, subject, prompts, rng):
    feature = int(rng.integers(demo.width))
    added = []
    handle = subject.model.model.layers[13].register_forward_pre_hook(lambda _m, args: added.append(args[0].detach().clone()))
    try:
        (steered,) = token_changes(demo, subject, prompts, [feature])
        (random,) = random_direction_changes(demo, subject, prompts, [feature], seed=1)
        (again,) = random_direction_changes(demo, subject, prompts, [feature], seed=1)
        (other,) = random_direction_changes(demo, subject, prompts, [feature], seed=2)
    finally:
        handle.remove()
    passes = len(added) // 8  # each of the four has a clean and a steered run over every batch
    assert len(added) == 8 * passes
    first = [added[i * passes][0, 1] for i in range(8)]
    row, drawn = first[1] - first[0], first[3] - first[2]
    assert row.norm() == pytest.approx(float(drawn.norm()), rel=1e-3)
    assert abs(torch.nn.functional.cosine_similarity(row, drawn, dim=0)) < 0.3
    assert (random.effects == again.effects).all()
    assert not np.allclose(random.effects, other.effects, atol=1e-2) and not np.allclose(
        random.effects, steered.effects, atol=1e-2
    )


def test_bos_and_padding_are_not_steered(demo, subject, prompts, monkeypatch):
    seen = []
    handle = subject.model.model.layers[13].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    try:
        list(token_changes(demo, subject, prompts, [5]))
    finally:
        handle.remove()
    half = len(seen) // 2
    clean, steered = torch.cat(seen[:half]), torch.cat(seen[half:])
    moved = ((clean - steered).norm(dim=2) > 1e-3).numpy()
    assert (moved[:, 1:] == (prompts >= 0)[:, 1:]).all() and not moved[:, 0].any()


def test_a_clt_is_added_at_every_output_in_the_proportions_of_its_rows(small_corpus, subject, tmp_path, prompts):
    seen = seen_at("clt", [0, 2], small_corpus, subject)
    dictionary = open_dictionary(entry_of(write_multi_layer(tmp_path / "clt", "clt", [0, 2], multi_layer_tensors(seen.xs))))
    feature = 3  # of the first layer: it writes to both, half as strongly to the second
    (change,) = token_changes(dictionary, subject, prompts, [feature])
    outputs: dict[int, list[float]] = {0: [], 2: []}
    for prompt in prompts:
        ids = torch.tensor(prompt[prompt >= 0]).long()[None]
        hooks = [
            subject.model.model.layers[n].post_feedforward_layernorm.register_forward_hook(
                lambda _m, _a, out, n=n: outputs[n].extend(out[0, 1:].double().norm(dim=1).tolist())
            )
            for n in (0, 2)
        ]
        with torch.no_grad():
            subject.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    rows = [dictionary.steering_vector(feature, output).double() for output in (0, 1)]
    wanted = np.hypot(np.mean(outputs[0]), np.mean(outputs[2]))
    alpha = wanted / torch.cat(rows).norm()
    added = {layer: (row * alpha).float() for layer, row in zip((0, 2), rows, strict=True)}
    clean = log_probabilities(subject, prompts, {})
    expected = log_probabilities(subject, prompts, added, "post_feedforward_layernorm") - clean
    assert np.allclose(change.effects, expected, atol=5e-3)


def test_a_crosscoder_is_added_to_the_last_of_its_states_alone(small_corpus, subject, tmp_path, prompts):
    seen = seen_at("crosscoder", [0, 2], small_corpus, subject)
    folder = write_multi_layer(tmp_path / "cc", "crosscoder", [0, 2], multi_layer_tensors(seen.xs))
    dictionary = open_dictionary(entry_of(folder))
    (change,) = token_changes(dictionary, subject, prompts[:2], [20])
    row = torch.nn.functional.normalize(dictionary.steering_vector(20, 1), dim=0) * mean_norm(subject, prompts[:2], 2)
    expected = log_probabilities(subject, prompts[:2], {2: row}) - log_probabilities(subject, prompts[:2], {})
    assert np.allclose(change.effects, expected, atol=5e-3)


def test_a_site_that_cannot_be_edited_is_an_error_that_says_so(subject, residual, tmp_path, prompts):
    site = "model.layers.1.mlp.input.rms_norm"
    folder = write_sae(tmp_path / "normed", sae_tensors(residual), hf_hook_point_in=site, hf_hook_point_out=site)
    with pytest.raises(SubjectModelError, match="can be read but not edited"):
        list(token_changes(open_dictionary(entry_of(folder)), subject, prompts, [0]))


def test_the_auroc_of_claimed_tokens_is_that_of_all_pairs(rng):
    effects = rng.integers(0, 12, (5, 40)).astype(np.float32)  # many ties
    claimed = rng.choice(40, 4, replace=False).tolist()
    others = [token for token in range(40) if token not in claimed]
    for row, got in zip(effects, auroc_of_tokens(effects, [*claimed, claimed[0]]), strict=True):
        pairs = [(row[a] > row[b]) + (row[a] == row[b]) / 2 for a in claimed for b in others]
        assert got == pytest.approx(np.mean(pairs), abs=1e-6)


def test_raised_tokens_are_the_readable_ones_that_gain_most_on_average(demo, subject, prompts):
    (change,) = token_changes(demo, subject, prompts, [7])
    raised = raised_tokens(change, subject, count=20)
    mean = change.effects.astype(np.float64).mean(axis=0)
    assert [effect for _, effect in raised] == sorted((effect for _, effect in raised), reverse=True)
    assert all(effect == pytest.approx(mean[token]) for token, effect in raised)
    texts = token_texts(subject.tokenizer, [token for token, _ in raised])
    assert not any(text.startswith("<unused") for text in texts)
    given = {token for token, _ in raised}
    better = [token for token in np.flatnonzero(mean > raised[-1][1]) if int(token) not in given]
    spelled = subject.tokenizer.convert_ids_to_tokens(better)
    assert all(
        s.startswith("<unused") or "�" in s or t in subject.tokenizer.all_special_ids
        for t, s in zip(better, spelled, strict=True)
    )
