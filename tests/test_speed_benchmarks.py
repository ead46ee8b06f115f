"""The speed benchmarks measure what they say: the same tokens on both sides, stand-ins of the L0 asked for."""

import json

import pytest

from bench import floor, scaling
from bench.standins import corpus_of, stand_ins, without_outputs
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.storage.store import Store
from tests.conftest import changed


@pytest.fixture(scope="module")
def prepared(subject, tmp_path_factory):
    """Store, corpus of about 3,000 tokens, and two stand-ins."""
    folder = tmp_path_factory.mktemp("bench")
    store = Store(folder / "store")
    model = changed(subject, batch_tokens=256)
    corpus = corpus_of(store, model, 3_000, shard_bits=1)
    return store, corpus, stand_ins(folder, model, corpus, [0, 1], 512, l0=10), model


@pytest.mark.slow
def test_the_floor_reads_every_token_that_the_cache_reads_and_keeps_nothing(prepared, tmp_path):
    store, corpus, entries, subject = prepared
    without_outputs(store, entries, subject)
    report = floor.measure(store, corpus, entries, subject, 1, outputs=False)
    assert report["tokens"] == corpus.facts["tokens"]
    assert report["l0"] == pytest.approx(10, rel=0.35)  # calibrated on some of the same text
    assert len(report["cache_over_floor_parts"]) == floor.PARTS and report["floor_seconds"] > 0
    assert report["cache_seconds"] >= report["outside_batches_seconds"] > 0 and report["bytes_per_nonzero"] > 2
    floor.draw(json.loads(json.dumps(report)), tmp_path / "floor.png")


def test_a_stand_in_is_a_sound_sae_of_unit_decoder_rows(prepared):
    dictionary = open_dictionary(prepared[2][1])
    assert dictionary.width == 512 and dictionary.sites_in[0].layer == 1
    assert dictionary.layers[0].w_dec.norm(dim=2).numpy() == pytest.approx(1, abs=1e-5)


def test_growth_is_printed_over_the_first_point():
    one = {name: {"seconds": 2.0, "peak_bytes": 1e9, "stored_bytes": 1e6, "nonzeros": 4e5} for name in ("cache", "examples")}
    twice = {name: {field: 2 * value for field, value in figures.items()} for name, figures in one.items()}
    lines = scaling.table("tokens", [1000, 2000], [one, twice]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].split("|")[2:4] == [" 4.0 ", " 2.00 "] and lines[2].split("|")[3] == " 1.00 "
