"""Where each SAE stands, and freeing what is no longer needed.

What belongs here: `status` and `prune` over a whole store, from commit records alone. What does not: running stages.
"""

from dataclasses import asdict, dataclass

from scopeatlas.activations.fidelity import read_fidelity
from scopeatlas.atlas.stage import publication_facts
from scopeatlas.atlas.tables import PUBLICATIONS, has_table, newest_publications, open_table
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.errors import NotReadyError, UnknownSaeError
from scopeatlas.storage.records import IDENTITY_LENGTH, CommitRecord
from scopeatlas.storage.store import STAGES, Store

KEPT_PUBLICATIONS = 2
"""Generations of a publication that pruning keeps: the live one, and one to roll back to."""


@dataclass(frozen=True)
class SaeStatus:
    """One SAE over one corpus. stage: the last that is finished. shards_done of shards: activations cached (pruned
    ones count). labelled, scored, published: features. last_error: of the stage that failed last, or empty."""

    sae: str
    corpus: str
    stage: str
    shards_done: int
    shards: int
    pruned: bool
    labelled: int
    scored: int
    published: int
    bytes: int
    fvu: float | None
    l0: float | None
    last_error: str

    @property
    def complete(self) -> bool:
        return self.stage == "published" and not self.last_error and self.shards_done == self.shards

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def status(store: Store) -> list[SaeStatus]:
    """One line per SAE and corpus; an SAE that nothing has been done for has one line without a corpus."""
    published = _published(store)
    lines = []
    for sae in store.registered():
        for corpus_id in store.corpora_of(sae) or [""]:
            lines.append(_status_of(store, sae, corpus_id, published))
    return lines


def _status_of(store: Store, sae: str, corpus_id: str, published: dict[str, dict]) -> SaeStatus:
    errors = store.errors(sae)
    error = "; ".join(f"{stage}: {message}" for stage, message in errors.items())
    if not corpus_id:
        return SaeStatus(sae, "", "registered", 0, 0, False, 0, 0, 0, 0, None, None, error)
    corpus = _corpus(store, corpus_id)
    names = {shard.name for shard in corpus.shards} if corpus else set()
    newest = {stage: record_in_use(store, sae, corpus_id, stage, published) for stage in ("examples", "labels", "scores")}
    activations = store.stage(sae, corpus_id, "activations")
    cached = [record for record in activations.records() if record.key.name in names]
    done = len({record.key.name for record in cached})
    live = published.get(sae, {}) if published.get(sae, {}).get("corpus") == corpus_id else {}
    fidelity = read_fidelity(store, corpus_id, sae)
    by_status = newest["labels"].facts["by_status"] if newest["labels"] else {}
    stages = {
        "activations": bool(names) and done == len(names),
        "examples": newest["examples"] is not None,
        "labels": newest["labels"] is not None,
        "scores": newest["scores"] is not None,
        "published": bool(live),
    }
    finished = [name for name, is_finished in stages.items() if is_finished]
    return SaeStatus(
        sae=sae,
        corpus=corpus_id,
        stage=finished[-1] if finished else "registered",
        shards_done=done,
        shards=len(names),
        pruned=any(activations.is_pruned(record.key) for record in cached),
        labelled=by_status.get("ok", 0),
        scored=newest["scores"].facts["scored"] if newest["scores"] else 0,
        published=live.get("rows", 0),
        bytes=store.bytes_used("saes", sae, corpus_id),
        fvu=fidelity.fvu if fidelity else None,
        l0=fidelity.l0 if fidelity else None,
        last_error=error,
    )


def prune(store: Store, *, sae: str | None = None, dry_run: bool = False) -> dict[str, int]:
    """Free the activations of SAEs that are published, and generations that a newer one replaced.

    Nothing downstream becomes stale: a pruned shard still counts as done, and is made again only if a stage asks for
    it. Labels and scores are small and every version of them is kept. Returns bytes freed (or that would be) by SAE.
    Raises UnknownSaeError for an SAE that is not registered.
    """
    if sae is not None and sae not in store.registered():
        raise UnknownSaeError(f"no SAE '{sae}' in {store.root}; `scopeatlas status` lists them")
    published = _published(store)
    freed: dict[str, int] = {}
    for key in [sae] if sae else store.registered():
        for corpus_id in store.corpora_of(key):
            is_published = published.get(key, {}).get("corpus") == corpus_id
            kept = _kept_generations(store, key, corpus_id, published)
            for name in STAGES:
                stage = store.stage(key, corpus_id, name)
                uses = [one for generation in kept for one in _made_from(store, key, corpus_id, generation, name)]
                for record, keep_record in _disposable(store, key, corpus_id, name, is_published, uses):
                    size = stage.bytes_of(record)
                    if not dry_run:
                        stage.prune(record) if keep_record else stage.discard(record)
                    freed[key] = freed.get(key, 0) + size
    return freed


def _disposable(
    store: Store, sae: str, corpus_id: str, name: str, is_published: bool, uses: list[str]
) -> list[tuple[CommitRecord, bool]]:
    """Records of a stage whose data may go, each with whether to remember that it was done. uses: identities that what is
    published was made from; where they are not known, the record written last counts."""
    stage = store.stage(sae, corpus_id, name)
    records = _by_age(stage.root, list(stage.records()))
    if name in {"labels", "scores"} or not is_published:
        return []
    if name == "publication":
        generations = [record for record in records if record.key.name == "features"]
        return [(record, False) for record in generations if not record.key.identity.startswith(tuple(uses))]
    newest = {record.key.name: record for record in records}
    used = [record for record in records if record.key.identity in uses] or list(newest.values())
    # A generation newer than what is published may be on its way to be published.
    kept = {record.key.identity for record in (*used, *newest.values())}
    stale = [(record, False) for record in records if record.key.identity not in kept]
    if name in {"activations", "nulls"}:
        return stale + [(record, True) for record in used if not stage.is_pruned(record.key)]
    return stale


def _kept_generations(store: Store, sae: str, corpus_id: str, published: dict[str, dict]) -> list[str]:
    """The generations of a publication that pruning keeps, with what they were made from: the newest, and the live one, which
    somebody may have rolled back to."""
    stage = store.stage(sae, corpus_id, "publication")
    written = [record for record in _by_age(stage.root, list(stage.records())) if record.key.name == "features"]
    newest = [record.key.identity[:IDENTITY_LENGTH] for record in written[-KEPT_PUBLICATIONS:]]
    live = published.get(sae, {}).get("generation")
    return [*newest, *([live] if live else [])]


def _made_from(store: Store, sae: str, corpus_id: str, generation: str, name: str) -> list[str]:
    """The identities of a stage that a generation was made from; of the publication its own."""
    if name == "publication":
        return [generation]
    return publication_facts(store, sae, corpus_id, generation).get("uses", {}).get(name, [])


def _by_age(root, records: list[CommitRecord]) -> list[CommitRecord]:
    """Records, the one written last at the end."""
    return sorted(records, key=lambda record: (root / f"{record.key.stem}.commit.json").stat().st_mtime_ns)


def record_in_use(
    store: Store, sae: str, corpus_id: str, name: str, published: dict[str, dict] | None = None
) -> CommitRecord | None:
    """The record of a whole stage (examples, labels, scores) that what is published was made from; where that is not known,
    the one written last, if there is one. published: lines of the ledger by SAE, if they are at hand."""
    stage = store.stage(sae, corpus_id, name)
    records = [record for record in stage.records() if record.key.name == name]
    uses = _uses(store, sae, corpus_id, _published(store) if published is None else published).get(name)
    if uses is None:
        return (_by_age(stage.root, records) or [None])[-1]
    return next((record for record in records if record.key.identity in uses), None)


def _uses(store: Store, sae: str, corpus_id: str, published: dict[str, dict]) -> dict[str, list[str]]:
    """Stage -> identities that an SAE's live publication was made from."""
    return publication_facts(store, sae, corpus_id, published.get(sae, {}).get("generation")).get("uses", {})


def _published(store: Store) -> dict[str, dict]:
    if not has_table(store.root, PUBLICATIONS):
        return {}
    return {line["sae"]: line for line in newest_publications(open_table(store.root, PUBLICATIONS)).to_dicts()}


def _corpus(store: Store, corpus_id: str) -> Corpus | None:
    try:
        return open_corpus(store, corpus_id)
    except NotReadyError:
        return None
