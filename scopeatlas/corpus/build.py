"""Building a corpus in a store, and reading it back.

What belongs here: the corpus as a stage on disk. What does not: where its documents come from, or how they are cut.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import polars as pl

from scopeatlas.corpus.contexts import ContextRules, Contexts, cut_contexts, read_contexts, write_contexts
from scopeatlas.corpus.documents import SPLITS, Document, Split
from scopeatlas.corpus.sampling import Sampling, draw_sample, shard_of
from scopeatlas.corpus.sources import Source, open_source, source_fingerprint
from scopeatlas.errors import CorpusError, NotReadyError
from scopeatlas.storage.files import atomic_path, content_hash, read_json_if_there, write_json
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location, readable
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 1


@dataclass(frozen=True)
class CorpusSettings:
    """What a corpus is drawn from and how. `name` is for people; the corpus id adds a hash of the rest."""

    name: str
    source: Source
    sampling: Sampling = Sampling()
    rules: ContextRules = ContextRules()

    def corpus_id(self, subject: SubjectModel) -> str:
        """Everything but the sampled fraction and the cap on documents: a larger sample is the same corpus, grown."""
        source = {k: v for k, v in asdict(self.source).items() if k != "max_documents"}
        sampling = {k: v for k, v in asdict(self.sampling).items() if k != "fraction"}
        rules = {"length": self.rules.length}
        return f"{self.name}-{content_hash(source, sampling, rules, subject.tokenizer_identity)[:8]}"


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk. shards: the keys of its current generation. facts: documents and tokens, in all and by split."""

    id: str
    folder: Location
    shards: tuple[ShardKey, ...]
    facts: dict[str, Any]

    def contexts(self, shard: ShardKey) -> Contexts:
        return read_contexts(StageFolder(self.folder).data_path(shard, ".contexts.parquet"))

    @cached_property
    def documents(self) -> pl.DataFrame:
        """document_id, split, source, metadata (JSON), text: one row per document."""
        stage = StageFolder(self.folder)
        return pl.concat([pl.read_parquet(readable(stage.data_path(shard, ".documents.parquet"))) for shard in self.shards])


def build_corpus(
    store: Store, settings: CorpusSettings, subject: SubjectModel, *, log: Callable[[str], None] = lambda _: None
) -> tuple[Corpus, bool]:
    """Draw, split, cut and write the corpus; returns it and whether it was all there already.

    The request (settings, tokenizer, what the source holds) is hashed: an unchanged one reads nothing. A changed one
    writes only the shards whose contexts differ. Raises CorpusError if the source is missing or empty.
    """
    corpus_id = settings.corpus_id(subject)
    folder = store.corpus_folder(corpus_id)
    tokenizer = (subject.tokenizer_identity, subject.tokenizer.chat_template)
    request = content_hash(STAGE_VERSION, asdict(settings), source_fingerprint(settings.source), *tokenizer)
    built = read_json_if_there(folder / "corpus.json")
    if built is not None and built["request"] == request:
        corpus = open_corpus(store, corpus_id)
        if not StageFolder(folder).pending(corpus.shards):
            return corpus, True
    store.require_writable()
    sample = draw_sample(open_source(settings.source), settings.sampling)
    log(
        f"{len(sample.documents)} documents kept, {sample.exact_duplicates} exact and {sample.near_duplicates} near-duplicates dropped"
    )
    pairs = list(zip(sample.documents, sample.splits, strict=True))
    bits = settings.sampling.shard_bits
    keys: list[ShardKey] = []
    tokens = dict.fromkeys(SPLITS, 0)
    contexts_total = 0
    refused: list[str] = []
    for number, members in groupby(pairs, key=lambda pair: shard_of(pair[0].id, bits)):
        documents = list(members)
        contexts = cut_contexts(documents, subject.tokenizer, settings.rules, refused=refused)
        if not len(contexts):
            continue
        keys.append(write_corpus_shard(StageFolder(folder), f"{number:0{(bits + 3) // 4}x}", documents, contexts))
        contexts_total += len(contexts)
        for split, length in zip(contexts.splits, contexts.lengths(), strict=True):
            tokens[SPLITS[split]] += int(length) - 1
    if refused and not keys:
        raise CorpusError(f"the chat template takes none of the {len(refused)} conversations; the first: {refused[0]}")
    if refused:
        log(f"{len(refused)} conversations left out, which the chat template does not take; the first: {refused[0]}")
    facts = {
        "documents": len(sample.documents),
        "documents_per_split": sample.documents_per_split(),
        "contexts": contexts_total,
        "context_length": settings.rules.length,
        "tokens": sum(tokens.values()),
        "tokens_per_split": tokens,
        "exact_duplicates": sample.exact_duplicates,
        "near_duplicates": sample.near_duplicates,
        "refused_conversations": len(refused),
    }
    shards = [[key.name, key.identity] for key in keys]
    write_json(folder / "corpus.json", {"request": request, "settings": asdict(settings), "facts": facts, "shards": shards})
    return open_corpus(store, corpus_id), False


def open_corpus(store: Store, corpus_id: str) -> Corpus:
    """The corpus of that id. Raises NotReadyError if it has not been built."""
    path = store.corpus_folder(corpus_id) / "corpus.json"
    body = read_json_if_there(path)
    if body is None:
        raise NotReadyError(f"corpus {corpus_id} has not been built in {store.root}: materialise corpus_sample first")
    return Corpus(corpus_id, path.parent, tuple(ShardKey(name, identity) for name, identity in body["shards"]), body["facts"])


def write_corpus_shard(stage: StageFolder, name: str, documents: list[tuple[Document, Split]], contexts: Contexts) -> ShardKey:
    """Write and commit one shard of a corpus, unless it is there; returns its key."""
    key = ShardKey(name, content_hash(STAGE_VERSION, contexts.identity(), [d.id for d, _ in documents]))
    if stage.is_done(key):
        return key
    contexts_path, documents_path = stage.data_path(key, ".contexts.parquet"), stage.data_path(key, ".documents.parquet")
    write_contexts(contexts, contexts_path)
    table = pl.DataFrame(
        {
            "document_id": [d.id for d, _ in documents],
            "split": [s for _, s in documents],
            "source": [d.source for d, _ in documents],
            "title": [d.metadata.get("title", "") for d, _ in documents],
            "text": [d.text for d, _ in documents],
        }
    )
    with atomic_path(documents_path) as temporary:
        table.write_parquet(temporary)
    stage.commit(key, [contexts_path, documents_path], {"contexts": len(contexts), "documents": len(documents)})
    return key
