"""The `publication` stage of one SAE: its rows embedded and brought live in the atlas.

What belongs here: from finished stages to a publication, skipping one that is live already. What does not: rows
(`rows.py`), vectors (`embedding.py`), the upsert (`publish.py`).
"""

from typing import Any

import polars as pl

from scopeatlas.activations.cache import activation_keys
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.publish import Publication, publish
from scopeatlas.atlas.rows import feature_rows
from scopeatlas.atlas.tables import FEATURES, PUBLICATIONS, has_table, newest_publications, open_table
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

STAGE_VERSION = 8


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

    Raises NotReadyError if labels or scores are missing, AtlasError if the atlas cannot take the rows.
    """
    stage = store.stage(entry.key, corpus.id, "publication")
    key = publication_key(store, corpus, entry, subject, embedder=embedder, labels=labels, scores=scores)
    if stage.is_done(key):
        path = stage.root / str(stage.record(key).facts["path"])
        live = _live(store, entry.key)
        if path.exists() and live is not None and live["generation"] == stage.record(key).facts["generation"]:
            return Publication(entry.key, live["generation"], live["rows"], live["table_version"], path, True)
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
    progress = Progress("feature index: embedding", rows["search_text"].n_unique(), "texts", log)
    vectors = EmbeddingCache(store.root, embedder).embed(
        rows["search_text"].to_list(), progress=lambda done, _total: progress.advance(done - progress.done)
    )
    progress.finish()
    publication = publish(rows, vectors, root=store.root, folder=stage.root, embedder=embedder)
    facts = {"generation": publication.generation, "path": publication.path.name, "rows": publication.rows}
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


def publication_facts(store: Store, sae: str, corpus_id: str) -> dict[str, Any]:
    """What is recorded of an SAE's live publication over a corpus: generation, path, rows; uses, the identities of the stages
    that it was made from; subject, the recipe of its subject model. Empty if nothing of this corpus is live."""
    if not has_table(store.root, PUBLICATIONS):
        return {}
    live = newest_publications(open_table(store.root, PUBLICATIONS)).filter(sae=sae, corpus=corpus_id)["generation"].to_list()
    found = (r.facts for r in store.stage(sae, corpus_id, "publication").records() if r.facts.get("generation") in live)
    return next((facts for facts in found if "uses" in facts), {})


def _finished(store: Store, corpus: Corpus, entry: SaeEntry, name: str, key: ShardKey) -> pl.DataFrame:
    stage = store.stage(entry.key, corpus.id, name)
    if not stage.is_done(key):
        raise NotReadyError(f"{entry.key} has no {name} made with these settings: run that stage first")
    return pl.read_parquet(readable(stage.data_path(key, ".parquet")))


def _live(store: Store, sae: str) -> dict | None:
    """The ledger's newest line for an SAE, if as many rows are there as it says."""
    if not (has_table(store.root, PUBLICATIONS) and has_table(store.root, FEATURES)):
        return None
    lines = newest_publications(open_table(store.root, PUBLICATIONS)).filter(sae=sae).to_dicts()
    if not lines:
        return None
    from lancedb.expr import col, lit

    condition = (col("sae") == lit(sae)) & (col("generation") == lit(lines[0]["generation"]))
    held = open_table(store.root, FEATURES).count_rows(condition.to_sql())
    return lines[0] if held == lines[0]["rows"] else None
