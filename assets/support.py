"""What every asset body needs: errors turned into Failures, the run's SAEs, each one's own outcome.

Not here: anything about a single stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dagster as dg

from resources.corpus import CorpusResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import ScopeAtlasError, said
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

Metadata = dict[str, dg.MetadataValue]
Outcome = tuple[Metadata, str, bool]
"""Of one SAE in one stage: metadata, the data version (a generation), whether everything was in place."""
Events = Iterator[dg.AssetMaterialization | dg.AssetCheckResult | dg.MaterializeResult]

CHAIN = ("activation_cache", "fidelity", "feature_examples", "feature_labels", "label_scores", "feature_index")
"""What an SAE goes through, in order, as `store.errors` names it: an error in one stops it before the next."""

# A run over several partitions materialises all of them or, with this tag, those that it says itself.
_SAY_MATERIALISATIONS = "dagster/defer_asset_events"


@contextmanager
def failures(stage: str, store: Store | None = None, saes: list[str] | None = None) -> Iterator[None]:
    """Turn an error of ours that stops the whole step into a Failure, remembered in the store for `scopeatlas status`."""
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
    """What a step over one or more SAEs works with. blocked: why SAEs of the run were stopped, by key."""

    store: Store
    corpus: Corpus
    subject: SubjectModel
    entries: list[SaeEntry]
    blocked: dict[str, str]

    @property
    def open_entries(self) -> list[SaeEntry]:
        return [entry for entry in self.entries if entry.key not in self.blocked]


def open_run(context: dg.AssetExecutionContext, store: StoreResource, corpus: CorpusResource, subject: SubjectResource) -> SaeRun:
    """The run's SAEs in the order of its partition keys, the corpus they share, and which an earlier stage stopped."""
    opened, model = store.open(), subject.open()
    entries: list[SaeEntry] = []
    blocked: dict[str, str] = {}
    earlier = CHAIN[: CHAIN.index(context.asset_key.to_user_string())]
    for key in context.partition_keys:
        try:
            entries.append(SaeEntry.from_json(opened.entry(key)))
        except ScopeAtlasError as error:  # a partition of another store, or of an earlier version
            blocked[key] = str(error)
        if errors := [text for stage, text in opened.errors(key).items() if stage in earlier]:
            blocked[key] = "; ".join(errors)
    return SaeRun(opened, open_corpus(opened, corpus.settings().corpus_id(model)), model, entries, blocked)


def each_sae(
    context: dg.AssetExecutionContext,
    run: SaeRun,
    work: Callable[[SaeEntry], Outcome],
    *,
    checks: Callable[[], Sequence[dg.AssetCheckResult]] = tuple,
) -> Events:
    """Do `work` for every SAE that nothing has stopped; each has its own outcome on its own partition. `checks` is
    called after the last.

    An SAE that fails is named, remembered in the store and left unmaterialised; the others go on. The last stage of the
    run then fails, so that Dagster shows exactly those partitions as failed, and a backfill of them comes to an end.
    """
    stage = context.asset_key.to_user_string()
    stopped, done = dict(run.blocked), {}
    for entry in run.open_entries:
        try:
            done[entry.key] = work(entry)
        except Exception as error:  # whatever it is, it is about this SAE alone
            stopped[entry.key] = said(error)
            if not isinstance(error, ScopeAtlasError):
                context.log.exception(f"{stage}: {entry.key}")
        run.store.record_error(entry.key, stage, stopped.get(entry.key))
    for key, (_, _, reused) in done.items():
        context.log.info(f"{stage}: {key}: {'reused, nothing had changed' if reused else 'done'}")
    for key, reason in stopped.items():
        context.log.warning(f"{stage}: {key} is left out: {reason}")
    if stopped:
        yield from _only_the_done(context, done)
        if not done or _is_last(context, stage):
            yield from checks()
            raise _failure(stopped, len(context.partition_keys))
    else:
        context.run.tags.pop(_SAY_MATERIALISATIONS, None)  # pyright: ignore[reportAttributeAccessIssue]  # of an earlier step
    for key, (metadata, _, reused) in done.items():
        context.add_asset_metadata({**metadata, "reused": dg.MetadataValue.bool(reused)}, partition_key=key)
    # A run of several partitions has one data version to give in its result, so it gives none rather than a wrong one.
    only = next(iter(done.values()))[1] if len(context.partition_keys) == 1 else None
    yield dg.MaterializeResult(data_version=dg.DataVersion(only[:16]) if only else None, check_results=list(checks()))


def _only_the_done(context: dg.AssetExecutionContext, done: Mapping[str, Outcome]) -> Iterator[dg.AssetMaterialization]:
    """Materialisations of these partitions, and of no other of the run."""
    # Read when the step's result is recorded, in this process; the stored run keeps the tags it was launched with.
    context.run.tags[_SAY_MATERIALISATIONS] = "true"  # pyright: ignore[reportIndexIssue]
    for key, (metadata, version, reused) in done.items():
        yield dg.AssetMaterialization(
            context.asset_key,
            partition=key,
            metadata={**metadata, "reused": dg.MetadataValue.bool(reused)},
            tags={"dagster/data_version": version[:16]},
        )


def _is_last(context: dg.AssetExecutionContext, stage: str) -> bool:
    """Whether no later stage is part of the run; every job of ours ends with the last one."""
    selection = context.run.asset_selection
    selected = [s for s in CHAIN if dg.AssetKey(s) in selection] if selection else CHAIN
    return selected[-1] == stage


def _failure(stopped: Mapping[str, str], total: int) -> dg.Failure:
    listed = "; ".join(f"{key}: {reason}" for key, reason in stopped.items())
    others = f"; the other {total - len(stopped)} are finished" if total > len(stopped) else ""
    return dg.Failure(
        description=f"{len(stopped)} of {total} SAEs stopped: {listed}{others}" if total > 1 else next(iter(stopped.values())),
        metadata={key: dg.MetadataValue.text(reason) for key, reason in stopped.items()},
        allow_retries=False,
    )
