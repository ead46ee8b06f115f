"""A corpus of random text, two random SAEs and a subject model of three layers: a cache that is made in a second, anywhere."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scopeatlas.activations.cache import CacheResult, cache_activations
from scopeatlas.corpus.build import Corpus, CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.runner.work import ShardRunner
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.conftest import Stored, activations_at, entry_of, sae_tensors, write_sae
from tests.tiny_models import tiny_gemma3, tiny_tokenizer

SITE = "model.layers.1.output"


@dataclass(frozen=True)
class CacheRun:
    """A store with a corpus in it, and what is to be cached."""

    store: Store
    corpus: Corpus
    entries: list[SaeEntry]
    subject: SubjectModel
    settings: CorpusSettings

    def at(self, root: Path) -> "CacheRun":
        """The same corpus in another store, with nothing cached."""
        store = Store(root)
        corpus, _ = build_corpus(store, self.settings, self.subject)
        return replace(self, store=store, corpus=corpus)

    def run(self, runner: ShardRunner, **arguments) -> CacheResult:
        return cache_activations(self.store, self.corpus, self.entries, self.subject, runner=runner, **arguments)

    def data(self) -> dict[str, bytes]:
        """The bytes of every data file, null features' too; records carry timings and are left out."""
        root = self.store.root / "saes"
        files = [path for stage in ("activations", "nulls") for path in root.rglob(f"{stage}/*")]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in files if not p.name.endswith(".commit.json")}

    def committed(self) -> dict[str, int]:
        """When each shard of activations was committed, by its place: nanoseconds."""
        root = self.store.root / "saes"
        found = root.rglob("activations/*.commit.json")
        return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in found}


def tiny_cache(root: Path, rng: np.random.Generator) -> CacheRun:
    """Everything, written below `root`, from random numbers."""
    model, tokenizer = tiny_gemma3(int(rng.integers(1000))), tiny_tokenizer(bos="<s>")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text").mkdir()
    for number in range(80):
        words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(200)]
        (root / "text" / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    subject = SubjectModel(str(root / "model"), device="cpu", batch_tokens=256)
    store = Store(root / "store")
    source = Source("files", paths=(f"{root}/text/*.txt",))
    settings = CorpusSettings("tiny", source, Sampling(shard_bits=4), ContextRules(48, 3))
    corpus, _ = build_corpus(store, settings, subject)
    x = activations_at(SITE, Stored(store, corpus, []), subject)
    entries = [entry_of(write_sae(root / name, sae_tensors(x, seed=seed))) for seed, name in enumerate(("one", "two"))]
    return CacheRun(store, corpus, entries, subject, settings)
