"""A tiny model, a small corpus, and two dictionaries of it through every stage into an atlas."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from scopeatlas.activations.cache import cache_activations
from scopeatlas.api import Atlas
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.stage import index_features
from scopeatlas.corpus.build import CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry, describe_sae
from scopeatlas.labels.stage import FeatureLabels, LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.scoring.stage import LabelScores, ScoreSettings, score_labels
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.conftest import RESIDUAL, Stored, activations_at, sae_tensors, write_sae
from tests.multi_layer import multi_layer_tensors, seen_at, write_multi_layer
from tests.tiny_models import tiny_llama, tiny_tokenizer

MODEL = "tiny/toy-4b"
WIDTH, CROSS_WIDTH, CROSS_LAYERS = 60, 16, [0, 2]
LENGTH, DOCUMENTS = 48, 120
WORDS = ("river", "stone", "the", "of", "winter", "and", "sings", "running", "1987", "Paris", "cold", "(see", "it)", "music,")
LABELS, SCORES = LabelSettings(), ScoreSettings(retrieved_features=500)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SubjectModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(bos="<s>").save_pretrained(folder)
    return SubjectModel(str(folder), device="cpu", serves=(MODEL,))


@dataclass(frozen=True)
class Built(Stored):
    """A store whose atlas holds an SAE (`entries[0]`) and a crosscoder (`entries[1]`)."""

    subject: SubjectModel
    embedder: Embedder

    @property
    def atlas(self) -> Atlas:
        atlas = Atlas.at(self.store.root, embedder=self.embedder)
        atlas.subject = self.subject
        return atlas

    def copy(self, root: Path) -> "Built":
        shutil.copytree(str(self.store.root), root)
        return replace(self, store=Store(root))

    def labelled(self) -> FeatureLabels:
        return label_features(self.store, self.corpus, self.entry, self.subject, settings=LABELS)[0]

    def scored(self) -> LabelScores:
        there = self.store, self.corpus, self.entry, self.subject
        return score_labels(*there, labels=LABELS, settings=SCORES, embed=self.embedder.embed)[0]

    def publish(self, entry: SaeEntry) -> None:
        there = self.store, self.corpus, entry, self.subject
        index_features(*there, embedder=self.embedder, labels=LABELS, scores=SCORES)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture(scope="session")
def built(tiny, embedder, tmp_path_factory) -> Built:
    root = tmp_path_factory.mktemp("exchange")
    draw = np.random.default_rng(0)
    texts = (" ".join(draw.choice(WORDS, 30)) + f" {number}" for number in range(DOCUMENTS))
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    source = Source("files", paths=(str(root / "texts.jsonl"),), min_characters=1)
    store = Store(root / "store")
    corpus = build_corpus(store, CorpusSettings("tiny", source, Sampling(shard_bits=1), ContextRules(LENGTH)), tiny)[0]
    stored = Stored(store, corpus, [])
    x = activations_at(RESIDUAL, stored, tiny)
    write_sae(root / "release" / "res", sae_tensors(x, width=WIDTH, l0=4), model_name=MODEL)
    seen = seen_at("crosscoder", CROSS_LAYERS, stored, tiny)
    write_multi_layer(
        root / "release" / "cross", "crosscoder", CROSS_LAYERS, multi_layer_tensors(seen.xs, width=CROSS_WIDTH, l0=4)
    )
    config = root / "release" / "cross" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"model_name": MODEL}), encoding="utf-8")
    entries = [describe_sae(root / "release" / name, release="toy", path=name) for name in ("res", "cross")]
    assert not cache_activations(store, corpus, entries, tiny).failed
    made = Built(store, corpus, entries, tiny, embedder)
    for entry in entries:
        store.register(entry.key, entry.as_json())
        mine_examples(store, corpus, entry, tiny)
        label_features(store, corpus, entry, tiny, settings=LABELS)
        score_labels(store, corpus, entry, tiny, labels=LABELS, settings=SCORES, embed=embedder.embed)
        made.publish(entry)
    return made


@pytest.fixture
def fresh(built, tmp_path) -> Built:
    """A copy, to be changed."""
    return built.copy(tmp_path / "store")
