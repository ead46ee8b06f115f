"""The `publication` stage of one SAE: its rows embedded and brought live in the atlas.

What belongs here: from finished stages to a publication, skipping one that is live already. What does not: rows
(`rows.py`), vectors (`embedding.py`), the upsert (`publish.py`).
"""

from typing import Any

import polars as pl

from scopeatlas.activations.cache import activation_keys
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.history import refused_generations
from scopeatlas.atlas.publish import Publication, generation_path, republish, write_generation
from scopeatlas.atlas.rows import feature_rows, feature_vectors
from scopeatlas.atlas.tables import FEATURES, PUBLICATIONS, VECTORS, has_table, newest_publications, open_table, sql
from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.errors import NotReadyError
from scopeatlas.labels.stage import LabelSettings, labels_key
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.runner.local import Log, Progress, silent
from scopeatlas.scoring.stage import ScoreSettings, scores_key
from scopeatlas.scoring.table import published
from scopeatlas.storage.files import content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 9


def publication_key(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    embedder: Embedder,
    labels: LabelSettings,
    scores: ScoreSettings,
) -> ShardKey:
    """What determines the rows and vectors: the scores (and through them everything before) and the embedder."""
    scored = scores_key(store, corpus, entry, subject, labels, scores).identity
    return ShardKey("source", content_hash(STAGE_VERSION, scored, embedder.identity))


def index_features(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    embedder: Embedder,
    labels: LabelSettings,
    scores: ScoreSettings,
    log: Log = silent,
) -> Publication:
    """Publish an SAE's features; `reused` if this very generation is live.

    A generation that was rolled back is not published again: what is live stays. Raises NotReadyError if labels or scores are
    missing, AtlasError if the atlas cannot take the rows.
    """
    stage = store.stage(entry.key, corpus.id, "publication")
    key = publication_key(store, corpus, entry, subject, embedder=embedder, labels=labels, scores=scores)
    if stage.is_done(key):
        live = _kept_live(store, entry.key, str(stage.record(key).facts["generation"]), log)
        if live is not None and live.path.exists():
            return live
    store.require_writable()
    current = _finished(store, corpus, entry, "labels", labels_key(store, corpus, entry, subject, labels)).filter(
        pl.col("current")
    )
    tests = _finished(store, corpus, entry, "scores", scores_key(store, corpus, entry, subject, labels, scores))
    rows = feature_rows(
        entry,
        open_dictionary(entry),
        corpus.id,
        subject,
        open_examples(store, corpus.id, entry.key, examples_key(corpus, entry, subject)),
        current,
        published(tests, current),
    )
    texts = len({text for name in VECTORS.values() for text in rows[name]})
    progress = Progress("feature index: embedding", texts, "texts", log)
    cache = EmbeddingCache(store.root, embedder)
    vectors = feature_vectors(rows, cache, progress=lambda done, _total: progress.advance(done - progress.done))
    progress.finish()
    generation = write_generation(rows, vectors, root=store.root, folder=stage.root, embedder=embedder)
    is_refused = generation in refused_generations(store, entry.key)
    live = _kept_live(store, entry.key, generation, log) if is_refused else None
    publication = live or republish(generation, root=store.root, folder=stage.root)
    facts = {"generation": generation, "rows": publication.rows}
    uses = _uses(store, corpus, entry, subject, labels, scores)
    stage.commit(key, [], facts | {"uses": uses, "subject": subject.recipe()})
    return publication


def _uses(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, labels: LabelSettings, scores: ScoreSettings
) -> dict[str, list[str]]:
    """The identities that a publication was made from, by stage: not the last written, where settings went back and forth."""
    return {
        "activations": [key.identity for key in activation_keys(corpus, entry, subject)],
        "examples": [examples_key(corpus, entry, subject).identity],
        "labels": [labels_key(store, corpus, entry, subject, labels).identity],
        "scores": [scores_key(store, corpus, entry, subject, labels, scores).identity],
    }


def publication_facts(store: Store, sae: str, corpus_id: str, generation: str | None) -> dict[str, Any]:
    """What is recorded of how a generation of an SAE was made: generation, path, rows; uses, the identities of the stages
    that it was made from; subject, the recipe of its subject model. Empty if it is not of this corpus.

    generation: the one that is live, as `live_generation` says.
    """
    for record in store.stage(sae, corpus_id, "publication").records():
        if generation and record.facts.get("generation") == generation:
            return record.facts
    return {}


def live_generation(store: Store, sae: str) -> str | None:
    """The generation of an SAE that the ledger's last line is about; None if it was never published."""
    if not has_table(store.root, PUBLICATIONS):
        return None
    lines = newest_publications(open_table(store.root, PUBLICATIONS)).filter(sae=sae)["generation"].to_list()
    return lines[0] if lines else None


def _finished(store: Store, corpus: Corpus, entry: SaeEntry, name: str, key: ShardKey) -> pl.DataFrame:
    stage = store.stage(entry.key, corpus.id, name)
    if not stage.is_done(key):
        raise NotReadyError(f"{entry.key} has no {name} made with these settings: run that stage first")
    return pl.read_parquet(readable(stage.data_path(key, ".parquet")))


def _kept_live(store: Store, sae: str, generation: str, log: Log) -> Publication | None:
    """What is live, if it is this generation, or if somebody rolled this one back."""
    live = _live(store, sae)
    is_refused = generation in refused_generations(store, sae)
    if live is None or not (is_refused or live["generation"] == generation):
        return None
    if is_refused:
        log(f"feature index: {generation} was rolled back; `scopeatlas rollback {sae} --to {generation}` brings it back")
    folder = store.stage(sae, live["corpus"], "publication").root
    path = generation_path(folder, live["generation"])
    return Publication(sae, live["generation"], live["rows"], live["table_version"], path, True)


def _live(store: Store, sae: str) -> dict | None:
    """The ledger's newest line for an SAE, if as many rows are there as it says."""
    if not (has_table(store.root, PUBLICATIONS) and has_table(store.root, FEATURES)):
        return None
    lines = newest_publications(open_table(store.root, PUBLICATIONS)).filter(sae=sae).to_dicts()
    if not lines:
        return None
    from lancedb.expr import col, lit

    condition = (col("sae") == lit(sae)) & (col("generation") == lit(lines[0]["generation"]))
    held = open_table(store.root, FEATURES).count_rows(sql(condition))
    return lines[0] if held == lines[0]["rows"] else None
