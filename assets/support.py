"""What every asset body needs: errors turned into Failures, the run's SAEs, metadata for one partition.

Not here: anything about a single stage.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dagster as dg

from resources.corpus import CorpusResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import ScopeAtlasError
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

Metadata = dict[str, dg.MetadataValue]


@contextmanager
def failures(stage: str, store: Store | None = None, saes: list[str] | None = None) -> Iterator[None]:
    """Turn an error of ours into a Failure with its message, remembered in the store for `scopeatlas status`."""
    try:
        yield
    except ScopeAtlasError as error:
        for sae in saes or []:
            _try_to_record(store, sae, stage, str(error))
        # Retrying what a person has to mend wastes a run; run-level retries are for killed workers.
        raise dg.Failure(description=str(error), metadata={"error": type(error).__name__}, allow_retries=False) from error


def _try_to_record(store: Store | None, sae: str, stage: str, message: str) -> None:
    try:
        if store is not None:
            store.record_error(sae, stage, message)
    except ScopeAtlasError:
        pass  # the store itself is what failed; the Failure says so


@dataclass(frozen=True)
class SaeRun:
    """What a step over one or more SAEs works with. `blocked`: SAEs that an earlier stage of theirs stopped."""

    store: Store
    corpus: Corpus
    subject: SubjectModel
    entries: list[SaeEntry]
    blocked: dict[str, str]

    @property
    def open_entries(self) -> list[SaeEntry]:
        return [entry for entry in self.entries if entry.key not in self.blocked]


def open_run(context: dg.AssetExecutionContext, store: StoreResource, corpus: CorpusResource, subject: SubjectResource) -> SaeRun:
    """The run's SAEs in the order of its partition keys, and the corpus they share."""
    opened, model = store.open(), subject.open()
    entries = [SaeEntry(**opened.entry(key)) for key in context.partition_keys]
    errors = {entry.key: opened.errors(entry.key) for entry in entries}
    early = ("activation_cache", "fidelity")
    blocked = {key: "; ".join(e[s] for s in early if s in e) for key, e in errors.items() if any(s in e for s in early)}
    return SaeRun(opened, open_corpus(opened, corpus.settings().corpus_id(model)), model, entries, blocked)


def for_each_sae(
    context: dg.AssetExecutionContext, run: SaeRun, work: Callable[[SaeEntry], tuple[Metadata, str, bool]]
) -> dg.MaterializeResult:
    """Do `work` for every SAE that is not blocked, put each one's metadata on its own partition.

    work returns metadata, the data version (a generation) and whether it found everything in place.
    """
    stage = context.asset_key.to_user_string()
    versions = {}
    for entry in run.open_entries:
        with failures(stage, run.store, [entry.key]):
            metadata, version, reused = work(entry)
        run.store.record_error(entry.key, stage, None)
        versions[entry.key] = version
        said = "reused, nothing had changed" if reused else "done"
        context.log.info(f"{stage}: {entry.key}: {said}")
        context.add_asset_metadata({**metadata, "reused": dg.MetadataValue.bool(reused)}, partition_key=entry.key)
    for key, reason in run.blocked.items():
        context.log.warning(f"{stage}: {key} is left out: {reason}")
        context.add_asset_metadata({"left_out": dg.MetadataValue.text(reason)}, partition_key=key)
    if not versions:
        raise dg.Failure(
            description=f"every SAE of this run is blocked: {next(iter(run.blocked.values()), '')}", allow_retries=False
        )
    # A version per partition can only be given for a run of one; a run of several shows none rather than a wrong one.
    only = next(iter(versions.values())) if len(context.partition_keys) == 1 else None
    return dg.MaterializeResult(data_version=dg.DataVersion(only[:16]) if only else None)
