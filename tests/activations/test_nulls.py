"""Null features beside real SAEs on the real model: as dense as the features they are like, and in the same passes."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations import nulls as nulls_module
from scopeatlas.activations.accumulators import NullAccumulator
from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.nulls import MIN_FIRINGS, Calibration, NullFeatures, null_matches, null_shards, read_null_features
from scopeatlas.activations.reading import packed
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.build import build_corpus
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.hypotheses.nulls import null_firings
from scopeatlas.hypotheses.units import Units
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import counting_passes
from scopeatlas.subject.loading import BATCH_TOKENS
from tests.activations.test_cache import data_of
from tests.conftest import SMALL, Stored, entry_of, text_mask
from tests.multi_layer import multi_layer_tensors, seen_at, write_multi_layer


@pytest.fixture
def copy(small, tmp_path) -> Stored:
    """A copy of the finished small cache that may be broken."""
    shutil.copytree(small.store.root, tmp_path / "store")
    return replace(small, store=Store(tmp_path / "store"))


def drop_nulls(stored: Stored) -> None:
    for entry in stored.entries:
        shutil.rmtree(stored.store.stage(entry.key, stored.corpus.id, "nulls").root)


def directions(stored: Stored, subject) -> NullFeatures:
    keys = Calibration(stored.corpus, subject).keys(stored.entry)
    return read_null_features(stored.store.stage(stored.entry.key, stored.corpus.id, "nulls"), keys.directions)


def hidden(tokens: np.ndarray, subject) -> torch.Tensor:
    """The residual stream [n, 640] after layer 1 at the text of contexts, each run alone, float64."""
    rows = []
    for context in tokens:
        ids = torch.tensor(context[context >= 0]).long()
        with torch.no_grad():
            out = subject.model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        rows.append(out.hidden_states[2][0, 1:].double())
    return torch.cat(rows)


def batches_of(stored: Stored) -> int:
    return sum(len(list(packed(stored.corpus.contexts(shard).lengths(), BATCH_TOKENS))) for shard in stored.corpus.shards)


def test_a_null_feature_fires_as_often_on_the_calibration_text_as_the_feature_it_is_like(small, subject):
    nulls, dictionary = directions(small, subject), open_dictionary(small.entry)
    x = hidden(Calibration(small.corpus, subject).contexts.tokens, subject)
    layer = dictionary.layers[0]
    real = (x @ layer.w_enc.double() + layer.b_enc.double() > layer.threshold.double()).sum(0).numpy()
    null = (x @ torch.from_numpy(nulls.w_enc).double() + torch.from_numpy(nulls.b_enc) > torch.from_numpy(nulls.threshold)).sum(0)
    assert len(nulls.matched) > 50 and np.abs(null.numpy() - real[nulls.matched]).max() <= 1
    assert (real[nulls.matched] >= MIN_FIRINGS - 1).all() and (nulls.threshold > 0).all()


def test_a_null_direction_is_random_and_as_long_as_the_encoder_of_its_match(small, subject):
    nulls, dictionary = directions(small, subject), open_dictionary(small.entry)
    w_enc = dictionary.layers[0].w_enc.numpy()[:, nulls.matched]
    assert np.allclose(np.linalg.norm(nulls.w_enc, axis=0), np.linalg.norm(w_enc, axis=0), rtol=1e-4)
    unit = nulls.w_enc / np.linalg.norm(nulls.w_enc, axis=0)
    cosines = (unit.T @ unit)[np.triu_indices(unit.shape[1], 1)]
    assert abs(cosines.mean()) < 0.01 and cosines.std() == pytest.approx(640**-0.5, rel=0.1)
    assert np.abs((unit * w_enc).sum(0) / np.linalg.norm(w_enc, axis=0)).max() < 0.25
    assert len(np.unique(nulls.matched)) == len(nulls.matched)


def test_a_shard_of_null_features_holds_what_a_dense_encoder_gives(small, subject):
    nulls = directions(small, subject)
    shards = null_shards(small.store, small.corpus, small.entry, subject)
    assert shards is not None
    tokens = small.corpus.contexts(small.corpus.shards[0]).tokens
    pre = (hidden(tokens, subject) @ torch.from_numpy(nulls.w_enc).double() + torch.from_numpy(nulls.b_enc)).numpy()
    expected = np.where(pre > nulls.threshold, pre, 0)
    stored = np.zeros((tokens.size, len(nulls.matched)))
    stored[shards[0].token, shards[0].feature] = shards[0].value
    got = stored[text_mask(tokens, subject).ravel()]
    sure = np.abs(pre - nulls.threshold) > 1e-3 * nulls.threshold
    assert np.allclose(got[sure], expected[sure], rtol=3e-3, atol=1e-3) and (got > 0).sum() == pytest.approx(
        (expected > 0).sum(), rel=0.01
    )
    assert not stored[~text_mask(tokens, subject).ravel()].any()


def test_the_firings_of_null_features_are_read_like_those_of_an_sae(small, subject):
    units = Units(small.corpus, subject)
    firings = null_firings(small.store, small.corpus, small.entry, subject, units)
    matched = null_matches(small.store, small.corpus, small.entry, subject)
    assert firings is not None and firings.width == len(matched) == len(np.unique(firings.feature))
    assert units.counted[firings.position].all() and (firings.value > 0).all()
    real = [
        read_shard(p) for p in sorted(small.store.stage(small.entry.key, small.corpus.id, "activations").root.glob("*.parquet"))
    ]
    count = np.bincount(np.concatenate([shard.feature for shard in real]), minlength=96)[matched]
    assert len(firings.feature) == pytest.approx(count.sum(), rel=0.25)  # matched on some of the text, not on all


def test_null_features_cost_no_pass_of_their_own(small, subject, tmp_path):
    shutil.copytree(small.store.root / "corpus", tmp_path / "fresh" / "corpus")
    with counting_passes() as count:
        result = cache_activations(Store(tmp_path / "fresh"), small.corpus, small.entries, subject)
    assert result.forward_passes == batches_of(small) and result.nulls_done == result.shards_done == 2 * len(small.corpus.shards)
    tried = len(small.entries)
    calibrating = len(list(packed(Calibration(small.corpus, subject).contexts.lengths(), BATCH_TOKENS)))
    assert count.passes == result.forward_passes + tried + calibrating


def test_nulls_that_a_finished_sae_lacks_cost_one_pass_and_leave_its_activations_alone(copy, small, subject):
    drop_nulls(copy)
    root = copy.store.root / "saes"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("activations/*")}
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert (result.shards_done, result.nulls_done, result.forward_passes) == (0, 2 * len(copy.corpus.shards), batches_of(copy))
    assert not result.reused and before == {path: path.stat().st_mtime_ns for path in root.rglob("activations/*")}
    assert data_of(copy.store, "nulls") == data_of(small.store, "nulls")
    assert cache_activations(copy.store, copy.corpus, copy.entries, subject).reused


@pytest.mark.parametrize("lost", [".parquet", ".commit.json"])
def test_only_the_null_shard_that_lost_a_file_is_made_again_and_byte_for_byte(copy, subject, lost):
    before = data_of(copy.store, "nulls")
    key = Calibration(copy.corpus, subject).keys(copy.entry).shards[1]
    copy.store.stage(copy.entry.key, copy.corpus.id, "nulls").data_path(key, lost).unlink()
    assert null_shards(copy.store, copy.corpus, copy.entry, subject) is None
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert (result.shards_done, result.nulls_done) == (0, 1) and data_of(copy.store, "nulls") == before


def test_null_features_fail_alone_and_the_error_is_forgotten_once_they_are_made(copy, subject, monkeypatch):
    drop_nulls(copy)
    shutil.rmtree(copy.store.stage(copy.entry.key, copy.corpus.id, "activations").root)

    def fails(*_):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(NullAccumulator, "add", fails)
        result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert not result.failed and result.shards_done == len(copy.corpus.shards) and result.nulls_done == 0
    assert copy.store.errors(copy.entry.key) == {"null_features": "RuntimeError: no room"}
    assert null_firings(copy.store, copy.corpus, copy.entry, subject, Units(copy.corpus, subject)) is None
    cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert copy.store.errors(copy.entry.key) == {}


def test_an_sae_that_cannot_be_calibrated_leaves_the_others_theirs(copy, subject, monkeypatch):
    drop_nulls(copy)
    round_values, calls = nulls_module.round_values, iter(range(10_000))

    def fails(values, scale):
        if next(calls) == 0:  # the first batch of the first SAE
            raise RuntimeError("odd")
        return round_values(values, scale)

    monkeypatch.setattr(nulls_module, "round_values", fails)
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert not result.failed and result.nulls_done == len(copy.corpus.shards)
    assert copy.store.errors(copy.entry.key) == {"null_features": "RuntimeError: odd"}
    assert null_shards(copy.store, copy.corpus, copy.entries[1], subject) is not None


def test_an_sae_that_nothing_wants_activations_of_gets_no_null_features(copy, subject):
    drop_nulls(copy)
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject, unneeded=[e.key for e in copy.entries])
    assert result.reused and not data_of(copy.store, "nulls")


def test_a_larger_corpus_keeps_the_directions_and_the_shards_that_it_shares(subject, tmp_path, monkeypatch, two_saes):
    monkeypatch.setattr(nulls_module, "NULL_TOKENS", 5 * 64)
    store = Store(tmp_path)
    less, _ = build_corpus(store, SMALL, subject)
    before = Calibration(less, subject).keys(two_saes[0])
    more, _ = build_corpus(store, replace(SMALL, sampling=replace(SMALL.sampling, fraction=0.5)), subject)
    after = Calibration(more, subject).keys(two_saes[0])
    assert len(more.shards) > len(less.shards) and after.directions == before.directions
    assert set(before.shards[:-1]) <= set(after.shards)


def test_the_calibration_text_is_of_explain_documents_and_no_longer_than_it_may_be(medium, subject, monkeypatch):
    monkeypatch.setattr(nulls_module, "NULL_TOKENS", 1000)
    contexts = Calibration(medium.corpus, subject).contexts
    assert contexts.tokens.size <= 1000 < contexts.tokens.size + 64 and not contexts.splits.any()


def test_keys_change_with_the_sae_and_the_model_and_not_with_the_revision(small, subject):
    keys = Calibration(small.corpus, subject).keys(small.entry)
    assert keys == Calibration(small.corpus, subject).keys(replace(small.entry, revision="another"))
    others = [
        Calibration(small.corpus, subject).keys(small.entries[1]),
        Calibration(small.corpus, replace(subject, precision="bfloat16")).keys(small.entry),
        Calibration(small.corpus, replace(subject, random_seed=0)).keys(small.entry),
    ]
    assert all(other.directions != keys.directions and not set(other.shards) & set(keys.shards) for other in others)


def test_a_multi_layer_kind_has_none_and_asks_for_none_again(small_corpus, subject, tmp_path):
    store = Store(tmp_path / "store")
    shutil.copytree(small_corpus.store.root / "corpus", store.root / "corpus")
    seen = seen_at("clt", [0, 2], small_corpus, subject)
    entry = entry_of(write_multi_layer(tmp_path / "clt", "clt", [0, 2], multi_layer_tensors(seen.xs)))
    result = cache_activations(store, small_corpus.corpus, [entry], subject)
    assert not result.failed and result.nulls_done == 0
    assert null_firings(store, small_corpus.corpus, entry, subject, Units(small_corpus.corpus, subject)) is None
    assert cache_activations(store, small_corpus.corpus, [entry], subject).reused
    assert len(activation_keys(small_corpus.corpus, entry, subject)) == len(small_corpus.corpus.shards)
