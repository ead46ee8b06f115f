"""The memory plan: what shares a pass, what is refused, and that no weight is read for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scopeatlas.activations import memory
from scopeatlas.activations.memory import Footprint, batch_bytes, footprint_of, held_bytes, plan_pass
from scopeatlas.activations.shards import SPILL_BYTES
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.storage.files import human_bytes
from scopeatlas.subject.sites import Site

LAYERS, D, F = 3, 8, 20


def layer() -> LayerWeights:
    return LayerWeights(torch.zeros(D, F), torch.zeros(F), torch.zeros(F, LAYERS, D), torch.ones(F))


@pytest.fixture
def clt() -> SparseDictionary:
    sites = tuple(Site(i, "ln2", "output") for i in range(LAYERS)), tuple(Site(i, "mlp", "output") for i in range(LAYERS))
    layers = LazyLayers(lambda _: layer(), LAYERS)
    return SparseDictionary("clt", *sites, "", layers, torch.zeros(LAYERS, D), Activation("jumprelu"), target_l0=5)


@pytest.fixture
def one(clt) -> Footprint:
    return footprint_of(clt)


def plan(footprints: dict[str, Footprint], available: int, store: Path = Path(), tokens: int = 100):
    return plan_pass(
        footprints,
        tokens=dict.fromkeys(footprints, tokens),
        batch_tokens=64,
        shard_tokens=0,
        device="cpu",
        available=available,
        store=store,
    )


def test_a_streamed_dictionary_needs_one_layer_and_a_resident_one_all_of_them(clt, one):
    per_layer = 4 * (D * F + F + F + F * LAYERS * D)
    assert one.streamed and one.resident == per_layer
    resident = footprint_of(replace(clt, layers=tuple(clt.layers)))
    assert not resident.streamed and resident.resident == LAYERS * per_layer
    assert one.stored == resident.stored == LAYERS * per_layer + 4 * LAYERS * D


def test_the_null_features_of_a_single_layer_are_counted_and_a_multi_layer_kind_has_none(clt, one):
    single = replace(clt, kind="sae", sites_in=clt.sites_in[:1], layers=(layer(),))
    nulls = footprint_of(single).nulls
    assert one.nulls == 0 and nulls == 4 * memory.NULL_FEATURES * (2 * D + memory.NULL_TOKENS)
    alone = replace(footprint_of(single), sites={})
    enough = alone.resident + nulls + batch_bytes([alone], 64)
    assert plan({"a": alone}, enough).chunks == [["a"]]
    assert f"null features {human_bytes(nulls)}" in plan({"a": alone}, enough - 1).refused["a"]


def test_half_precision_on_disk_is_counted_as_the_float32_that_it_becomes(clt):
    half = replace(clt, layers=tuple(replace(w, w_dec=w.w_dec.half()) for w in clt.layers))
    assert footprint_of(half).resident == footprint_of(replace(clt, layers=tuple(clt.layers))).resident


def test_saes_at_the_same_sites_share_their_activations_and_take_turns_with_the_rest(one):
    assert batch_bytes([one, one], 64) == batch_bytes([one], 64)
    elsewhere = replace(one, sites={Site(9, "", "output"): D})
    assert batch_bytes([one, elsewhere], 64) == batch_bytes([one], 64) + 4 * 64 * D


def test_saes_fill_one_pass_after_the_other_in_their_order(one):
    both = 2 * one.resident + batch_bytes([one], 64)
    assert plan({"a": one, "b": one, "c": one}, both).chunks == [["a", "b"], ["c"]]
    assert plan({"a": one, "b": one, "c": one}, both - 1).chunks == [["a"], ["b"], ["c"]]


def test_one_that_does_not_fit_alone_is_refused_with_the_numbers_and_takes_no_room(one):
    large = replace(one, resident=10**9)
    planned = plan({"a": one, "large": large, "b": one}, 10**8)
    assert planned.chunks == [["a", "b"]]
    assert (
        "needs 1.0 GB of memory (weights 1.0 GB" in planned.refused["large"]
        and "100.0 MB are available" in planned.refused["large"]
    )


def test_what_the_disk_cannot_hold_is_refused_once_those_before_have_taken_their_room(one, monkeypatch, tmp_path):
    needed = int(100 * one.l0 * memory.BYTES_PER_NONZERO)
    free = type("Usage", (), {"free": int(1.5 * needed / memory.SHARE_OF_FREE)})()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: free)
    planned = plan({"a": one, "b": one}, 10**9, store=tmp_path / "not" / "there" / "yet")
    assert planned.chunks == [["a"]] and "on disk" in planned.refused["b"]


def test_the_plan_reads_as_lines_that_name_every_sae_with_its_bytes(one):
    lines = list(plan({"a": one, "large": replace(one, resident=10**9)}, 10**8).lines())
    assert lines[0].startswith("memory plan: 1 SAEs in 1 pass of the subject model, 100.0 MB available on cpu")
    assert any("streamed by layer" in line and " a:" in line for line in lines) and any(" large: needs" in line for line in lines)


def test_the_non_zeros_of_a_shard_count_against_main_memory_and_not_against_a_gpus(one):
    tight = 2 * one.resident + batch_bytes([one], 64)
    asked = {"footprints": {"a": one, "b": one}, "tokens": {"a": 1, "b": 1}, "batch_tokens": 64, "shard_tokens": 10_000}
    on_cpu, on_gpu = (
        plan_pass(
            asked["footprints"],
            **{k: v for k, v in asked.items() if k != "footprints"},
            device=device,
            available=tight,
            store=Path(),
        )
        for device in ("cpu", "cuda:0")
    )
    assert on_gpu.chunks == [["a", "b"]] and on_gpu.held == [int(3 * 10_000 * one.l0 * memory.BYTES_HELD)]
    assert not on_cpu.chunks and "a shard's non-zeros" in on_cpu.refused["a"]


def test_what_a_shard_holds_stops_growing_where_it_is_spilled(one):
    held = [held_bytes([one, one], tokens) for tokens in (10_000, 10**8, 10**9)]
    assert held[0] < held[1] == held[2] == 2 * SPILL_BYTES + memory.MERGE_BYTES
