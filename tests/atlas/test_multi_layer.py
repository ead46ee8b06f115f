"""Crosscoders and cross-layer transcoders through every stage, their features named by layer and index."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from click.testing import CliRunner

from scopeatlas.activations.cache import cache_activations
from scopeatlas.atlas.search import AtlasReader, open_reader
from scopeatlas.atlas.stage import index_features
from scopeatlas.atlas.tables import FEATURES, open_table
from scopeatlas.cli import cli
from scopeatlas.corpus.build import CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry, describe_sae, open_dictionary
from scopeatlas.errors import AtlasError
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.storage.store import Store
from tests.conftest import Stored
from tests.multi_layer import detect, hook, multi_layer_tensors, seen_at, write_multi_layer

WIDTH = 32
KINDS = ("clt", "crosscoder")
LAYERS = {"clt": [0, 1, 2], "crosscoder": [0, 2, 3]}
POSITION, INDEX = 1, 5
"""Where in each dictionary the feature is that fires on " of"."""
FLAT = POSITION * WIDTH + INDEX
CORPUS = CorpusSettings("short", Source("wikipedia-sample"), Sampling(shard_bits=1), ContextRules(32, 1))


@dataclass(frozen=True)
class Built(Stored):
    """A store with a dictionary of each kind in its atlas."""

    by_kind: dict[str, SaeEntry]
    atlas: AtlasReader

    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(cli, ["--store", str(self.store.root), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture(scope="module")
def built(subject, embedder, tmp_path_factory) -> Built:
    root = tmp_path_factory.mktemp("multi")
    store = Store(root / "store")
    corpus, _ = build_corpus(store, CORPUS, subject)
    by_kind = {}
    for kind in KINDS:
        seen = seen_at(kind, LAYERS[kind], Stored(store, corpus, []), subject)
        shards = multi_layer_tensors(seen.xs, width=WIDTH, l0=4)
        of = seen.tokens == subject.tokenizer.convert_tokens_to_ids("▁of")
        detect(shards[POSITION], INDEX, seen.xs[POSITION], of)
        by_kind[kind] = describe_sae(write_multi_layer(root / kind, kind, LAYERS[kind], shards), release=f"toy-{kind}", path=kind)
    entries = list(by_kind.values())
    assert not cache_activations(store, corpus, entries, subject).failed
    labels, scores = LabelSettings(), ScoreSettings()
    for entry in entries:
        there = store, corpus, entry, subject
        mine_examples(*there)
        label_features(*there, settings=labels)
        score_labels(*there, labels=labels, settings=scores)
        index_features(*there, embedder=embedder, labels=labels, scores=scores)
    return Built(store, corpus, entries, by_kind, open_reader(store.root, embedder=embedder))


@pytest.fixture(params=KINDS)
def entry(built, request) -> SaeEntry:
    return built.by_kind[request.param]


def test_every_feature_has_a_row_named_by_its_layer_and_index(built, entry):
    rows = open_table(built.store.root, FEATURES).search().where(f"sae = '{entry.key}'").to_polars().sort("feature")
    kind = entry.path
    names = [(layer, index) for layer in LAYERS[kind] for index in range(WIDTH)]
    assert rows["feature"].to_list() == list(range(3 * WIDTH))
    assert rows["key"].to_list() == [f"{entry.key}/{layer}.{index}" for layer, index in names]
    assert rows.select("layer", "index").rows() == names
    assert rows["site"].to_list() == [hook(kind, [layer], 0).replace("{", "").replace("}", "") for layer, _ in names]
    assert set(rows["site_out"]) == {hook(kind, LAYERS[kind], 1)}


def test_every_feature_has_a_decoder_norm_for_each_output_layer(built, entry):
    for position, layer in enumerate(LAYERS[entry.path]):
        expected = [0.0] * position + [1 / (1 + later) for later in range(3 - position)]
        found = built.atlas.feature(entry.key, f"{layer}.7").decoder_norms
        assert np.allclose(found, expected, rtol=1e-5)
        rows = open_dictionary(entry).layers[position].w_dec[7]
        assert np.allclose(found, rows.norm(dim=1).numpy(), rtol=1e-5)


def test_what_a_feature_fires_on_is_labelled_scored_and_found(built, entry):
    hit = built.atlas.search("of", by="token", k=1, sae=entry.key)[0]
    assert (hit.layer, hit.index, hit.feature) == (LAYERS[entry.path][POSITION], INDEX, FLAT)
    assert (hit.status, hit.method) == ("ok", "rule") and "of" in hit.label
    assert hit.f1 is not None and hit.f1 > 0.8 > 0.4 > (hit.shuffled_f1 or 0)
    assert all("«of»" in snippet for snippet in hit.snippets)


def test_a_feature_is_looked_up_by_layer_and_index_or_by_its_flat_id(built, entry):
    layer = LAYERS[entry.path][POSITION]
    assert built.atlas.feature(entry.key, f"{layer}.{INDEX}") == built.atlas.feature(entry.key, FLAT)
    with pytest.raises(AtlasError, match=f"has no feature {layer}.99"):
        built.atlas.feature(entry.key, f"{layer}.99")


def test_the_command_line_names_features_by_layer_and_says_what_they_write(built, entry):
    kind, name = entry.path, f"{LAYERS[entry.path][POSITION]}.{INDEX}"
    shown = built.run("show", entry.key, name)
    assert shown.startswith(f"{entry.key}/{name}\n") and shown == built.run("show", entry.key, str(FLAT))
    first, _, last = LAYERS[kind]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    outputs = f"3 sites, {hook(kind, [first], 1)} to {hook(kind, [last], 1)}".replace("{", "").replace("}", "")
    assert any(line.startswith(f"site {kind} reading") and outputs in line for line in lines)
    assert f"norms 1 at layer {LAYERS[kind][1]}, 0.5 at layer {last}" in lines
    assert json.loads(built.run("show", entry.key, name, "--json"))["examples"]
    assert f"{entry.key}/{name}" in built.run("search", "of", "--by", "token", "--sae", entry.key, "-k", "1")
    listed = built.run("ls", entry.key, "--limit", "100")
    assert f"{kind} writing {outputs}" in listed and any(line.split()[:1] == [name] for line in listed.splitlines())
    row = next(line for line in built.run("ls").splitlines() if line.startswith(entry.key))
    assert f"{kind} {first} to {last} {3 * WIDTH}" in " ".join(row.split())
