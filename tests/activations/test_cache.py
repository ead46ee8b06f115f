import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.memory import Footprint, batch_bytes, footprint_of, held_bytes
from scopeatlas.activations.nulls import Calibration
from scopeatlas.activations.reading import packed
from scopeatlas.activations.reading import text_mask as library_mask
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import StoreError
from scopeatlas.storage.store import Store
from tests.conftest import Stored, entry_of, sae_tensors, text_mask, write_sae


def data_of(store: Store, stage: str = "activations") -> dict[str, bytes]:
    """The bytes of every data file of a stage; records carry timings and are left out."""
    root = store.root / "saes"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob(f"{stage}/*")
        if not path.name.endswith(".commit.json")
    }


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the finished small cache that may be broken."""
    shutil.copytree(small.store.root, tmp_path / "store")
    return replace(small, store=Store(tmp_path / "store"))


@pytest.fixture
def fresh(small, tmp_path):
    """The small corpus in a store without activations."""
    shutil.copytree(small.store.root / "corpus", tmp_path / "fresh" / "corpus")
    return replace(small, store=Store(tmp_path / "fresh"))


def test_a_shard_holds_what_a_plain_forward_pass_and_a_dense_encoder_give(small, subject):
    dictionary = open_dictionary(small.entry)
    stage = small.store.stage(small.entry.key, small.corpus.id, "activations")
    shard, key = small.corpus.shards[0], activation_keys(small.corpus, small.entry, subject)[0]
    acts = read_shard(stage.data_path(key, ".parquet"))
    tokens = small.corpus.contexts(shard).tokens
    stored = np.zeros((tokens.size, dictionary.width), dtype=np.float32)
    stored[acts.token, acts.feature] = acts.value
    close = 0
    for row, context in enumerate(tokens):
        ids = torch.tensor(context[context >= 0]).long()
        with torch.no_grad():
            hidden = subject.model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[2][0]
        layer = dictionary.layers[0]
        pre = (hidden.double() @ layer.w_enc.double() + layer.b_enc.double()).numpy()
        threshold = layer.threshold.double().numpy()
        expected = np.where(pre > threshold, pre, 0)
        expected[0] = 0  # BOS
        got = stored[row * len(context) : row * len(context) + len(ids)]
        undecided = np.abs(pre - threshold) < 1e-3 * np.abs(threshold)
        close += undecided.sum()
        assert np.allclose(got[~undecided], expected[~undecided], rtol=2e-3, atol=1e-3)
    assert close < 0.01 * stored.size
    assert not stored.reshape(*tokens.shape, -1)[~text_mask(tokens, subject)].any()


def test_bos_and_padding_are_masked_and_nothing_else(small, subject):
    for shard in small.corpus.shards:
        tokens = small.corpus.contexts(shard).tokens
        lengths = (tokens >= 0).sum(1)
        expected = [[0 < i < n for i in range(tokens.shape[1])] for n in lengths]
        assert (text_mask(tokens, subject) == expected).all()


def test_records_count_tokens_and_non_zeros_and_say_how_they_were_computed(small, subject):
    stage = small.store.stage(small.entry.key, small.corpus.id, "activations")
    records = stage.manifest(activation_keys(small.corpus, small.entry, subject))
    assert sum(r.facts["tokens"] for r in records) == small.corpus.facts["tokens"]
    for record in records:
        assert record.facts["nonzeros"] == len(read_shard(stage.data_path(record.key, ".parquet")))
        assert record.facts["dtype"] == "torch.float32" and record.facts["device"] == "cpu"
        assert record.facts["threads"] == torch.get_num_threads()


def test_a_finished_cache_is_left_alone(copy, subject):
    before = {path: path.stat().st_mtime_ns for path in copy.store.root.rglob("activations/*")}
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert result.reused and result.shards_reused == 2 * len(copy.corpus.shards) and result.seconds == 0
    assert before == {path: path.stat().st_mtime_ns for path in copy.store.root.rglob("activations/*")}


@pytest.mark.parametrize("lost", [".parquet", ".moments.npz", ".commit.json"])
def test_only_the_shard_that_lost_a_file_is_done_again_and_byte_for_byte(copy, subject, lost):
    before = data_of(copy.store)
    key = activation_keys(copy.corpus, copy.entry, subject)[1]
    copy.store.stage(copy.entry.key, copy.corpus.id, "activations").data_path(key, lost).unlink()
    result = cache_activations(copy.store, copy.corpus, copy.entries, subject)
    assert (result.shards_done, result.shards_reused) == (1, 2 * len(copy.corpus.shards) - 1)
    assert data_of(copy.store) == before


def test_a_truncated_data_file_is_noticed_and_done_again(copy, subject):
    before = data_of(copy.store)
    key = activation_keys(copy.corpus, copy.entry, subject)[2]
    path = copy.store.stage(copy.entry.key, copy.corpus.id, "activations").data_path(key, ".parquet")
    path.write_bytes(path.read_bytes()[:100])
    assert cache_activations(copy.store, copy.corpus, copy.entries, subject).shards_done == 1
    assert data_of(copy.store) == before


def test_saes_that_share_a_pass_give_the_bytes_that_each_gives_alone(small, fresh, subject):
    for entry in reversed(fresh.entries):
        cache_activations(fresh.store, fresh.corpus, [entry], subject)
    assert data_of(fresh.store) == data_of(small.store)


def test_one_forward_pass_serves_every_sae(fresh, subject):
    contexts = []
    handle = subject.model.model.layers[1].register_forward_hook(lambda _m, args, _o: contexts.append(args[0].shape))
    try:
        cache_activations(fresh.store, fresh.corpus, fresh.entries, subject)
    finally:
        handle.remove()
    rows = [shape[0] for shape in contexts if shape[1] > 2]  # sites are tried on two tokens
    assert sum(rows) == fresh.corpus.facts["contexts"] + len(Calibration(fresh.corpus, subject).contexts)


def test_a_bad_sae_is_named_and_the_good_one_finishes(fresh, small, subject, residual, tmp_path):
    tensors = sae_tensors(residual)
    tensors["w_enc"][3, 5] = torch.nan
    bad = entry_of(write_sae(tmp_path / "bad", tensors))
    result = cache_activations(fresh.store, fresh.corpus, [bad, *fresh.entries], subject)
    assert result.shards_done == 2 * len(fresh.corpus.shards)
    assert list(result.failed) == [bad.key] and "w_enc holds 1 value(s) that are NaN" in result.failed[bad.key]
    assert fresh.store.errors(bad.key) == {"activation_cache": result.failed[bad.key]}
    assert data_of(fresh.store) == data_of(small.store)


def test_an_sae_whose_activations_overflow_stops_only_itself(fresh, small, subject, residual, tmp_path):
    tensors = sae_tensors(residual)
    tensors["threshold"] = torch.full_like(tensors["threshold"], 1e-9)  # the scale follows the threshold
    bad = entry_of(write_sae(tmp_path / "overflows", tensors))
    result = cache_activations(fresh.store, fresh.corpus, [bad, *fresh.entries], subject)
    assert list(result.failed) == [bad.key] and "does not fit 16 bits" in result.failed[bad.key]
    assert fresh.store.errors(bad.key) == {"activation_cache": result.failed[bad.key]}
    assert data_of(fresh.store) == data_of(small.store)


def test_an_error_is_forgotten_once_the_sae_has_been_mended(fresh, subject, residual, tmp_path):
    entry = entry_of(write_sae(tmp_path / "mended", sae_tensors(residual)))
    weights = Path(entry.folder) / "params.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    result = cache_activations(fresh.store, fresh.corpus, [entry], subject)
    assert result.shards_done == 0 and "truncated" in fresh.store.errors(entry.key)["activation_cache"]
    weights.write_bytes(whole)
    cache_activations(fresh.store, fresh.corpus, [entry], subject)
    assert fresh.store.errors(entry.key) == {}


def test_an_sae_of_another_model_is_refused_with_both_sizes(fresh, subject, tmp_path):
    entry = entry_of(write_sae(tmp_path / "wide", sae_tensors(torch.randn(200, 768)), model_name="openai/gpt2"))
    failed = cache_activations(fresh.store, fresh.corpus, [entry], subject).failed[entry.key]
    assert "768" in failed and "640" in failed and "openai/gpt2" in failed and entry.folder in failed


def test_an_sae_at_a_site_that_the_model_lacks_is_refused(fresh, subject, residual, tmp_path):
    folder = write_sae(tmp_path / "late", sae_tensors(residual), hf_hook_point_in="model.layers.99.output")
    failed = cache_activations(fresh.store, fresh.corpus, [entry_of(folder)], subject).failed
    assert "has layers 0 to 17" in next(iter(failed.values()))


def test_a_transcoder_reads_one_site_and_is_measured_against_another(fresh, subject, residual, tmp_path):
    before, after = "model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output"
    tensors = sae_tensors(residual) | {"affine_skip_connection": torch.eye(640)}
    folder = write_sae(tmp_path / "tc", tensors, type="transcoder", hf_hook_point_in=before, hf_hook_point_out=after)
    entry = entry_of(folder)
    cache_activations(fresh.store, fresh.corpus, [entry], subject)
    dictionary = open_dictionary(entry)
    weights = dictionary.layers[0]
    stage = fresh.store.stage(entry.key, fresh.corpus.id, "activations")
    tokens = torch.tensor(fresh.corpus.contexts(fresh.corpus.shards[0]).tokens).long()
    layer, seen = subject.model.model.layers[1], {}
    handles = [
        layer.pre_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: seen.update(x=out)),
        layer.post_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: seen.update(y=out)),
    ]
    with torch.no_grad():
        subject.model(input_ids=tokens.clamp(min=0), attention_mask=(tokens >= 0).long(), use_cache=False)
    for handle in handles:
        handle.remove()
    contexts = fresh.corpus.contexts(fresh.corpus.shards[0])
    mask = torch.from_numpy(text_mask(contexts.tokens, subject))
    with np.load(stage.data_path(activation_keys(fresh.corpus, entry, subject)[0], ".moments.npz")) as moments:
        for index in range(len(SPLITS)):
            members = mask & torch.from_numpy(contexts.splits == index)[:, None]
            x, y = seen["x"][members].double(), seen["y"][members].double()
            acts = (x @ weights.w_enc.double() + weights.b_enc).double()
            acts = acts * (acts > weights.threshold)
            error = y - (acts @ weights.w_dec[:, 0].double() + dictionary.b_dec.double() + x)
            assert moments["tokens"][index] == len(x)
            assert moments["nonzeros"][index] == pytest.approx(int((acts > 0).sum()), abs=2)
            assert np.allclose(moments["sum_y"][index, 0], y.sum(0).numpy(), rtol=1e-3, atol=1e-3)
            assert np.isclose(moments["sum_y2"][index, 0], float(y.square().sum()), rtol=1e-4)
            assert np.isclose(moments["sum_error2"][index, 0], float(error.square().sum()), rtol=1e-3)


def test_shard_identities_change_with_the_sae_and_the_precision_and_not_with_the_revision(small, subject):
    keys = activation_keys(small.corpus, small.entry, subject)
    assert keys == activation_keys(small.corpus, replace(small.entry, revision="another"), subject)
    assert not set(keys) & set(activation_keys(small.corpus, small.entries[1], subject))
    assert not set(keys) & set(activation_keys(small.corpus, small.entry, replace(subject, precision="bfloat16")))


def test_a_store_that_cannot_be_written_is_an_error_before_any_work(small, subject, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write to the store .*file/x.*set store.root"):
        cache_activations(Store(tmp_path / "file" / "x"), small.corpus, small.entries, subject)


def shard_bytes(stored: Stored, entry: SaeEntry, subject) -> list[bytes]:
    stage = stored.store.stage(entry.key, stored.corpus.id, "activations")
    return [stage.data_path(key, ".parquet").read_bytes() for key in activation_keys(stored.corpus, entry, subject)]


def batches_of(stored: Stored, subject) -> int:
    lengths = [stored.corpus.contexts(shard).lengths() for shard in stored.corpus.shards]
    return sum(len(list(packed(of_shard, subject.batch_tokens))) for of_shard in lengths)


def test_several_saes_at_several_sites_cost_the_forward_passes_of_one(fresh, small, subject, residual, tmp_path):
    elsewhere = {"hf_hook_point_in": "model.layers.0.output", "hf_hook_point_out": "model.layers.0.output"}
    third = entry_of(write_sae(tmp_path / "three", sae_tensors(residual, seed=7), **elsewhere))
    alone = cache_activations(fresh.store, fresh.corpus, small.entries[:1], subject)
    shared = cache_activations(fresh.store, fresh.corpus, [small.entries[1], third], subject)
    assert alone.forward_passes == shared.forward_passes == batches_of(fresh, subject)


def enough(stored: Stored, footprint: Footprint, subject) -> int:
    """Bytes that one SAE of this footprint needs over the corpus."""
    shard = max(int(stored.corpus.contexts(shard).lengths().sum()) for shard in stored.corpus.shards)
    batch = batch_bytes([footprint], subject.batch_tokens)
    return footprint.resident + footprint.nulls + batch + held_bytes([footprint], shard)


def test_what_does_not_fit_into_memory_together_is_split_and_gives_the_same_bytes(fresh, small, subject):
    said: list[str] = []
    one = footprint_of(open_dictionary(small.entry))
    enough_for_one = enough(fresh, one, subject)
    result = cache_activations(fresh.store, fresh.corpus, small.entries, subject, memory_bytes=enough_for_one, log=said.append)
    assert not result.failed and any("2 SAEs in 2 passes" in line for line in said)
    assert result.forward_passes == 2 * batches_of(fresh, subject)
    for entry in small.entries:
        assert shard_bytes(fresh, entry, subject) == shard_bytes(small, entry, subject)


def test_an_sae_that_does_not_fit_alone_is_refused_with_the_number_and_the_others_go_on(
    fresh, small, subject, residual, tmp_path
):
    wide = entry_of(write_sae(tmp_path / "wide", sae_tensors(residual, width=960)))
    one = footprint_of(open_dictionary(small.entry))
    result = cache_activations(
        fresh.store,
        fresh.corpus,
        [wide, small.entry],
        subject,
        memory_bytes=enough(fresh, one, subject),
    )
    assert result.failed.keys() == {wide.key} and result.shards_done == len(fresh.corpus.shards)
    assert "of memory (weights 4.9 MB" in result.failed[wide.key] and "raise subject.memory_gb" in result.failed[wide.key]


def test_an_sae_of_another_model_is_left_out_by_name(fresh, small, subject, residual, tmp_path):
    other = entry_of(write_sae(tmp_path / "other", sae_tensors(residual), model_name="google/gemma-2-2b"))
    named = replace(subject, serves=("google/gemma-3-270m-pt",))
    result = cache_activations(fresh.store, fresh.corpus, [other, small.entry], named)
    assert result.failed.keys() == {other.key}
    assert "trained on google/gemma-2-2b, and the subject model is package:gemma3" in result.failed[other.key]


def test_whatever_goes_wrong_with_one_sae_of_a_pass_stops_that_one_alone(fresh, small, subject, residual, tmp_path, monkeypatch):
    odd = entry_of(write_sae(tmp_path / "odd", sae_tensors(residual), l0=77))
    encode = SparseDictionary.encode

    def fails(self, *args, **kwargs):
        if self.target_l0 == 77:
            raise torch.OutOfMemoryError("out of memory")
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(SparseDictionary, "encode", fails)
    result = cache_activations(fresh.store, fresh.corpus, [odd, small.entry], subject)
    assert result.failed == {odd.key: "OutOfMemoryError: out of memory"} and result.shards_done == len(fresh.corpus.shards)
    assert fresh.store.errors(odd.key) == {"activation_cache": "OutOfMemoryError: out of memory"}


def test_a_dictionary_on_which_nearly_everything_fires_is_stopped_at_its_first_batch(fresh, subject, residual, tmp_path):
    tensors = sae_tensors(residual, width=4096)
    entry = entry_of(write_sae(tmp_path / "open", tensors | {"threshold": torch.zeros(4096)}))
    (reason,) = cache_activations(fresh.store, fresh.corpus, [entry], subject).failed.values()
    assert "more than 1,000 features fire on the average token" in reason


def test_where_a_model_has_no_bos_the_first_token_takes_its_place(small, subject):
    without = replace(subject)
    without.__dict__["tokenizer"] = deepcopy(subject.tokenizer)
    without.tokenizer.bos_token = None
    contexts = small.corpus.contexts(small.corpus.shards[0])
    plain = replace(contexts, tokens=np.where(contexts.tokens == 2, 100, contexts.tokens).astype(np.int32))  # 100 is a word
    assert not library_mask(plain, without)[:, 0].any() and library_mask(plain, without)[:, 1].all()
    assert library_mask(plain, subject)[:, 0].all()
