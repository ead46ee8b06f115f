import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations import fidelity as measuring
from scopeatlas.activations import splicing as module
from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.fidelity import Fidelity, measure_fidelity, read_fidelity
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.storage.store import Store
from tests.conftest import Stored, entry_of, sae_tensors, write_sae


@pytest.fixture(scope="module", autouse=True)
def few_spliced():
    """Losses on two contexts only: logits over Gemma's vocabulary are what takes the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SPLICE_TOKENS", 128)
        yield


@pytest.fixture(scope="module")
def small(small, tmp_path_factory) -> Stored:
    """A copy of the small cache, to be measured in."""
    root = tmp_path_factory.mktemp("measured") / "store"
    shutil.copytree(small.store.root, root)
    return replace(small, store=Store(root))


@pytest.fixture(scope="module")
def measured(small, subject) -> Fidelity:
    return measure_fidelity(small.store, small.corpus, small.entries, subject).found[small.entry.key]


@pytest.fixture(scope="module")
def plain(small, subject):
    """Every context by id, with its split and per token the residual after layer 1, run one by one."""
    rows = []
    for shard in small.corpus.shards:
        contexts = small.corpus.contexts(shard)
        for number, split, tokens in zip(contexts.ids, contexts.splits, contexts.tokens, strict=True):
            ids = torch.tensor(tokens[tokens >= 0]).long()[None]
            with torch.no_grad():
                hidden = subject.model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2][0]
            rows.append((int(number), SPLITS[split], ids, hidden))
    return [row[1:] for row in sorted(rows, key=lambda row: row[0])]


def dense_reconstruction(dictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    layer = dictionary.layers[0]
    pre = x.double() @ layer.w_enc.double() + layer.b_enc.double()
    acts = pre * (pre > layer.threshold.double())
    return acts, acts @ layer.w_dec[:, 0].double() + dictionary.b_dec.double()


@pytest.mark.parametrize("split", [None, "report"])
def test_fvu_and_l0_equal_a_dense_float64_computation(measured, plain, small, split):
    x = torch.cat([hidden[1:] for of, _, hidden in plain if split in (None, of)])
    acts, y = dense_reconstruction(open_dictionary(small.entry), x)
    fvu = float((x.double() - y).square().sum() / (x.double() - x.double().mean(0)).square().sum())
    l0 = float((acts > 0).sum() / len(x))
    got = (measured.fvu, measured.l0) if split is None else (measured.report_fvu, measured.report_l0)
    assert np.allclose(got, (fvu, l0), rtol=1e-3)


def test_dead_and_dense_shares_equal_counting(measured, plain, small):
    x = torch.cat([hidden[1:] for _, _, hidden in plain])
    fired = (dense_reconstruction(open_dictionary(small.entry), x)[0] > 0).double().mean(0)
    assert measured.tokens == len(x) == small.corpus.facts["tokens"]
    assert measured.dead == pytest.approx(float((fired == 0).double().mean()), abs=0.011)
    assert measured.dense == pytest.approx(float((fired > 0.1).double().mean()), abs=0.03)


def loss(subject, ids: torch.Tensor, replace_with=None) -> list[float]:
    """Cross-entropies of the tokens of one context, layer 1's output replaced but at BOS."""

    def hook(_m, _a, out):
        return torch.cat([out[:, :1], replace_with(out[:, 1:])], dim=1)

    handle = subject.model.model.layers[1].register_forward_hook(hook) if replace_with else None
    with torch.no_grad():
        logits = subject.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    if handle:
        handle.remove()
    return (-logits.log_softmax(-1)[range(len(logits)), ids[0, 1:]]).tolist()


def test_losses_equal_splicing_one_context_at_a_time(measured, plain, small, subject):
    dictionary = open_dictionary(small.entry)
    report = [(ids, hidden) for of, ids, hidden in plain if of == "report"][:2]
    mean = torch.cat([hidden[1:] for _, hidden in report]).double().mean(0).float()
    edits = {
        "loss_clean": None,
        "loss_spliced": lambda acts: dense_reconstruction(dictionary, acts[0])[1].float()[None],
        "loss_mean_ablated": lambda acts: mean.expand_as(acts),
        "loss_zero_ablated": torch.zeros_like,
    }
    for name, edit in edits.items():
        expected = np.mean([value for ids, _ in report for value in loss(subject, ids, edit)])
        assert getattr(measured, name) == pytest.approx(expected, rel=2e-3), name
    assert measured.splice_tokens == sum(ids.shape[1] for ids, _ in report)


def test_a_perfect_dictionary_adds_no_loss_and_leaves_no_variance(small, subject, tmp_path):
    identity = torch.cat([torch.eye(640), -torch.eye(640)])
    tensors = {"w_enc": identity.T.contiguous(), "b_enc": torch.zeros(1280), "threshold": torch.zeros(1280)}
    entry = entry_of(write_sae(tmp_path / "perfect", tensors | {"w_dec": identity, "b_dec": torch.zeros(640)}, l0=640))
    cache_activations(small.store, small.corpus, [entry], subject)
    perfect = measure_fidelity(small.store, small.corpus, [entry], subject).found[entry.key]
    assert perfect.fvu < 1e-6 and abs(perfect.loss_added) < 1e-3 and perfect.recovered == pytest.approx(1, abs=1e-3)
    assert perfect.l0 == pytest.approx(640, abs=1) and perfect.blocks() is None


def test_figures_are_measured_once(small, measured, subject, monkeypatch):
    monkeypatch.setattr(module, "run_model", lambda *_, **__: pytest.fail("the model was run"))
    assert measure_fidelity(small.store, small.corpus, small.entries, subject).found[small.entry.key] == measured
    assert read_fidelity(small.store, small.corpus.id, small.entry.key) == measured
    assert read_fidelity(small.store, small.corpus.id, "none") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fvu": 0.99, "l0": 10.0}, None),
        ({"fvu": 1.0, "l0": 10.0}, "FVU 1.00 is no better than the mean"),
        ({"fvu": 0.5, "l0": 31.0}, "L0 31.0 is off the release's own target of 10 by more than 3x"),
        ({"fvu": 0.5, "l0": 3.0}, "L0 3.0 is off"),
        ({"fvu": 0.5, "l0": 31.0, "target_l0": None}, None),
    ],
)
def test_figures_that_mean_a_wrong_site_block(measured, change, reason):
    blocked = replace(measured, target_l0=10, **{k: v for k, v in change.items() if k != "target_l0"})
    blocked = replace(blocked, target_l0=None) if "target_l0" in change else blocked
    assert blocked.blocks() is None if reason is None else reason in blocked.blocks()


def test_recovery_is_relative_to_what_the_ablation_destroys(measured):
    figures = replace(measured, loss_clean=2.0, loss_spliced=3.0, loss_zero_ablated=12.0, loss_mean_ablated=6.0)
    assert figures.recovered == pytest.approx(0.9) and figures.recovered_against_mean == pytest.approx(0.75)
    assert figures.loss_added == 1.0


def test_sae_tensors_of_the_fixtures_are_what_they_claim(measured):
    assert 5 < measured.l0 < 20 and sae_tensors(torch.randn(50, 8), width=12)["w_dec"].shape == (12, 8)


def test_an_sae_that_cannot_be_measured_is_named_and_the_others_are_measured(small, subject, monkeypatch):
    one, two = small.entries
    flips = measuring.bf16_flips

    def fails(dictionary, *args):
        if torch.equal(dictionary.layers[0].w_enc, open_dictionary(one).layers[0].w_enc):
            raise torch.OutOfMemoryError("out of memory")
        return flips(dictionary, *args)

    monkeypatch.setattr(measuring, "bf16_flips", fails)
    measuring.fidelity_path(small.store, small.corpus.id, one.key).unlink(missing_ok=True)
    result = measure_fidelity(small.store, small.corpus, [one, two], subject)
    assert result.failed == {one.key: "OutOfMemoryError: out of memory"} and result.found.keys() == {two.key}
