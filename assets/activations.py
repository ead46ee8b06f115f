"""The activation cache asset and its blocking fidelity check. Not here: the pass or the figures (scopeatlas/activations)."""

from dataclasses import replace

import dagster as dg

from assets.corpus import corpus_sample
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.support import Events, Outcome, SaeRun, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.runner import ShardRunnerResource
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.activations import cache
from scopeatlas.activations.fidelity import Fidelity, measure_fidelity
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.scoring.stage import scores_key
from scopeatlas.storage.records import generation


@dg.asset(
    deps=[corpus_sample],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="activations",
    kinds={"pytorch", "parquet"},
    owners=OWNERS,
    pool="gpu",
    code_version=str(cache.STAGE_VERSION),
    check_specs=[
        dg.AssetCheckSpec(
            "fidelity",
            asset="activation_cache",
            blocking=True,
            description="FVU below 1, L0 within a factor of three of the release's own, no other reading that fits better.",
        )
    ],
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("token", "uint32", "Context row of the shard times context length, plus position."),
                dg.TableColumn("value", "float16", "Activation, in units of the SAE's scale (in the file's footer)."),
            ]
        )
    },
)
def activation_cache(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    saes: SaeSourceResource,
    labelling: LabellingResource,
    embedder: EmbedderResource,
    runner: ShardRunnerResource,
) -> Events:
    """Non-zero activations of every SAE of the run from one shared pass of the subject model, as feature-sorted shards."""
    log = context.log.info
    with failures("activation_cache", store.open(), list(context.partition_keys)):
        run = open_run(context, store, corpus, subject)
        missing = saes.fetch(run.entries, log=log)
        present = [e for e in run.entries if e.key not in missing]
        scored = [e.key for e in present if _is_scored(run, e, labelling, embedder.identity())]
        result = cache.cache_activations(
            run.store,
            run.corpus,
            present,
            run.subject,
            unneeded=scored,
            memory_bytes=subject.memory_bytes(),
            runner=runner.open(log=log),
            log=log,
        )
        sound = [e for e in present if e.key not in result.failed]
        measured = measure_fidelity(run.store, run.corpus, sound, run.subject, log=log)
    for reasons, stage in ((missing, "activation_cache"), (measured.failed, "fidelity")):
        for key, reason in reasons.items():
            run.store.record_error(key, stage, reason)
    stopped = run.blocked | missing | result.failed | measured.failed
    for key, fidelity in measured.found.items():
        reason = fidelity.blocks()
        run.store.record_error(key, "fidelity", reason)
        if reason:
            stopped[key] = reason

    def describe(entry: SaeEntry) -> Outcome:
        fidelity = measured.found[entry.key]
        context.log.info(f"fidelity: {entry.key}: {summary(fidelity)}")
        metadata = fidelity_metadata(fidelity)
        if result.tokens:
            metadata["tokens_per_second"] = dg.MetadataValue.float(round(result.tokens / result.seconds, 1))
            metadata["forward_passes_of_the_run"] = dg.MetadataValue.int(result.forward_passes)
        return metadata, generation(cache.activation_keys(run.corpus, entry, run.subject)), result.reused

    yield from each_sae(
        context, replace(run, blocked=stopped), describe, checks=lambda: [_check(stopped, len(context.partition_keys))]
    )


def _is_scored(run: SaeRun, entry: SaeEntry, labelling: LabellingResource, embedder: str) -> bool:
    """Whether everything that reads activations is finished, so that pruned ones need not come back."""
    key = scores_key(run.store, run.corpus, entry, run.subject, labelling.labels(), labelling.scores(embedder))
    return run.store.stage(entry.key, run.corpus.id, "scores").is_done(key)


def _check(blocked: dict[str, str], total: int) -> dg.AssetCheckResult:
    """Fails, and so halts the run, only if no SAE of it passed; a blocked one among good ones is a warning."""
    return dg.AssetCheckResult(
        check_name="fidelity",
        passed=not blocked,
        severity=dg.AssetCheckSeverity.ERROR if len(blocked) == total else dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{key}: {reason}" for key, reason in blocked.items()) or "all SAEs of the run are within bounds",
        metadata={"blocked": len(blocked), "saes": total},
    )


def summary(f: Fidelity) -> str:
    """Fidelity as one line."""
    return (
        f"FVU {f.fvu:.3f} ({f.report_fvu:.3f} on report documents), L0 {f.l0:.1f}, {f.dead:.1%} dead, "
        f"+{f.loss_added:.2f} nats spliced in, {f.recovered:.1%} of the loss recovered"
    )


def fidelity_metadata(f: Fidelity) -> dict[str, dg.MetadataValue]:
    """Fidelity as numbers that Dagster charts."""
    numbers = {
        "fvu": f.fvu,
        "report_fvu": f.report_fvu,
        "l0": f.l0,
        "dead_share": f.dead,
        "dense_share": f.dense,
        "loss_added": f.loss_added,
        "loss_recovered": f.recovered,
        "loss_recovered_against_mean": f.recovered_against_mean,
        "bf16_flips": f.bf16_flips,
    }
    metadata: dict[str, dg.MetadataValue] = {name: dg.MetadataValue.float(round(value, 4)) for name, value in numbers.items()}
    if len(f.fvu_per_output) > 1:
        metadata["fvu_per_output"] = dg.MetadataValue.json([round(value, 4) for value in f.fvu_per_output])
    return {**metadata, "readings_tried": _fits_table(f), "tokens": dg.MetadataValue.int(f.tokens)}


def _fits_table(f: Fidelity) -> dg.MetadataValue:
    """The release's own reading and every alternative, as a table."""
    lines = ["| reading | FVU | L0 |", "|---|---|---|", *(f"| {fit.name} | {fit.fvu:.3f} | {fit.l0:.1f} |" for fit in f.fits)]
    return dg.MetadataValue.md("\n".join(lines))
